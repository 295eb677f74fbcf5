"""Linear CKA against its definition, and in the model against NumPy."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.analysis import references
from tests.analysis.conftest import Case
from visor_jax.analysis.cka import linear_cka


def cka_of_numpy(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al., 2019, section 3: HSIC with linear kernels, over tokens."""
    center = np.eye(len(x)) - 1 / len(x)
    one, other = (center @ (z @ z.T) @ center for z in (x, y))
    return float(np.trace(one @ other) / np.sqrt(np.trace(one @ one) * np.trace(other @ other)))


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 3), st.integers(0, 2**31))
@pytest.mark.slow
def test_cka_is_that_of_its_definition_and_ignores_padding(tokens: int, size: int, padding: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 1, tokens + padding, size)).astype(np.float32)
    kept = np.arange(tokens + padding) < tokens
    found = float(linear_cka(jnp.asarray(x), jnp.asarray(y), jnp.asarray(kept[None]))[0])
    assert found == pytest.approx(cka_of_numpy(x[0, :tokens], y[0, :tokens]), abs=2e-3)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0].astype(np.float32)
    same = linear_cka(jnp.asarray(x), jnp.asarray(3 * x @ turn + 1), jnp.asarray(kept[None]))
    assert float(same[0]) == pytest.approx(1, abs=1e-4)


def test_change_of_v_through_the_layers_is_that_of_numpy(case: Case) -> None:
    for row in range(2):
        visual = references.run(case, row).visual  # [L + 1, Nv, D]
        before = [cka_of_numpy(x, y) for x, y in itertools.pairwise(visual)]
        np.testing.assert_allclose(case.probe.observed["cka_before"][:, row], before, atol=1e-4)
        first = [cka_of_numpy(visual[0], y) for y in visual[1:]]
        np.testing.assert_allclose(case.probe.observed["cka_first"][:, row], first, atol=1e-4)
    assert np.isnan(case.probe.observed["cka_first"][:, 2]).all(), "no picture"
