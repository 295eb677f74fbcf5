"""Attention share of visual tokens, against NumPy in every layer."""

from __future__ import annotations

import numpy as np
import pytest

from tests.analysis import references
from tests.analysis.conftest import ARCH, Case


def test_attention_share_is_that_of_numpy(case: Case) -> None:
    found = case.probe.observed["attention_share"]
    assert found.shape == (ARCH.text.num_layers, 3)
    for row in range(3):
        sequence, places = references.sequence_of(case, row)
        weights = references.run(case, row).weights  # [L, heads, N, N]
        expected = weights[:, :, places, : sequence.num_visual].sum(axis=-1).mean(axis=(1, 2))
        np.testing.assert_allclose(found[:, row], expected, atol=1e-5)
    assert found[:, 2] == pytest.approx(0) and np.all(found[:, :2] > 0)
