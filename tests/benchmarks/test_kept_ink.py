"""`kept_ink.py`: where a page's ink is, which patches a reduction keeps, and what the script refuses."""

from __future__ import annotations

import types
from collections.abc import Callable

import numpy as np
import pytest

from visor_jax.data.collate import Batch
from visor_jax.errors import RequestError

Script = Callable[[str], types.ModuleType]


def test_ink_is_what_differs_from_the_paper(script: Script) -> None:
    page = np.full((8, 12, 3), (250, 240, 230), np.uint8)
    page[0:2, 4:7] = (250, 240, 100)  # 6 pixels in the second patch of the first row
    page[7, 11] = (0, 0, 0)
    page[4:8, 0:4] = (250, 240, 200)  # a shade of the paper
    np.testing.assert_allclose(script("kept_ink").ink_of(page, 4), np.array([0, 6, 0, 0, 0, 1]) / 7)
    assert not script("kept_ink").ink_of(np.zeros((8, 8, 3), np.uint8), 4).any()


def test_kept_patches_are_those_of_kept_candidates(script: Script) -> None:
    pictures = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    gather = np.array([[0, 1, 2, 3, 9], [3, 2, 9, 0, 0]])[..., None]  # 9: a newline
    batch = Batch({"visual_pictures": pictures, "visual_gather": gather}, ids=["a", "b"], tasks=[], contents=[])
    kept = np.array([[0, 1, 0, 1, 1], [1, 0, 1, 1, 0]], bool)
    found = script("kept_ink").kept_patches(batch, kept, 4)
    np.testing.assert_array_equal(found, [[0, 1, 0, 1], [0, 0, 0, 1]])


def test_a_model_that_chooses_no_tokens_is_refused(script: Script) -> None:
    with pytest.raises(RequestError, match="--models=almanac-base: has no reduction that chooses tokens"):
        script("kept_ink").measured("almanac-base", {}, 4, 1)
