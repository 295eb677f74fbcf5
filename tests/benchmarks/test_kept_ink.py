"""`kept_ink.py`: where a page's ink is, which patches a reduction keeps, and what the script refuses."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import visor_jax
from visor_jax.architecture import ReductionArchitecture
from visor_jax.config import load_config
from visor_jax.data.collate import Batch
from visor_jax.data.questions import Questions, single_questions
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
        script("kept_ink").measured("almanac-base", {}, None, 4, 1)


def test_questions_are_the_same_if_texts_and_pictures_are(script: Script) -> None:
    config, same = load_config("almanac_mini"), script("kept_ink").same_questions

    def asked(count: int = 4, **fields: Any) -> Questions:
        data = dataclasses.replace(config.data, **fields)
        return single_questions(dataclasses.replace(config, data=data), "test", count)

    assert same(asked(visual_length=20), asked())
    assert not any(same(asked(**fields), asked()) for fields in ({"mixed_share": 0.0}, {"path": "pages_unseen_fonts"}))
    assert not same(asked(), asked(count=5))


def test_a_model_that_is_asked_other_questions_than_the_base_is_refused(script: Script, tmp_path: Path) -> None:
    arch = dataclasses.replace(visor_jax.load("almanac-base").arch, reduction=ReductionArchitecture("divprune", 0.25))
    model = types.SimpleNamespace(arch=arch)
    others = single_questions(load_config("almanac_mini", ["--config.seed=2"]), "test", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visor_jax, "load", lambda name: model)
        with pytest.raises(RequestError, match=f"--models={tmp_path}: is asked other questions than --base"):
            script("kept_ink").measured(str(tmp_path), {}, others, 4, 1)


def test_models_of_the_same_name_are_refused(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("kept_ink").main(["--models", "a/run", "b/run"]) == 2
    assert "--models=a/run b/run: expected different folder names" in capsys.readouterr().err
