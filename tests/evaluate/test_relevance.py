"""On which patches an answer depends: gradients agree with small changes of single visual tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.config import architecture, as_config
from visor_jax.data.questions import single_questions
from visor_jax.evaluate import relevance as module
from visor_jax.evaluate.relevance import patch_relevance
from visor_jax.model.likelihood import answer_tokens
from visor_jax.model.visor import encode
from visor_jax.testing import tiny_config

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = as_config(tiny_config())
ARCH = architecture(CONFIG)


@pytest.fixture
def batch() -> Any:
    questions = single_questions(CONFIG, "test", 4)
    return questions.batch([questions.example(questions.plan()[0])], 1)


@pytest.mark.parametrize("bits", [(False, False), (True, True)])
def test_relevance_is_the_slope_of_the_loss_along_each_token(batch: Any, bits: tuple[bool, ...]) -> None:
    params = jax.tree.map(jnp.asarray, testing.random_params(ARCH))
    found = patch_relevance(params, batch, bits, ARCH)
    assert found is not None and found.shape == (6, 6) and found.max() == 1 and found.min() >= 0
    arrays = jax.tree.map(jnp.asarray, dict(batch.arrays))

    @jax.jit
    def loss(scales: jax.Array) -> jax.Array:
        visual = encode(params, arrays, ARCH) * scales[None, :, None]
        return jnp.sum(answer_tokens(params, visual, arrays, jnp.asarray(bits), ARCH)[0])

    def slope(token: int) -> float:
        ones = np.ones(arrays["visual_segments"].shape[1], np.float32)
        up, down = ones.copy(), ones.copy()
        up[token], down[token] = 1.02, 0.98
        return abs(float(loss(up)) - float(loss(down))) / 0.04

    gather, weights = batch.arrays["visual_gather"][0], batch.arrays["visual_weights"][0]
    tokens = [int(t) for t in np.flatnonzero((weights[:, 0] == 1) & (gather[:, 0] < 36))[[0, 7, 20]]]
    slopes = np.array([slope(token) for token in tokens])
    values = np.array([found.flat[gather[t, 0]] for t in tokens])
    np.testing.assert_allclose(values / values.max(), slopes / slopes.max(), atol=0.05)


def test_there_is_no_map_without_a_picture_or_of_too_many_tokens(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = jax.tree.map(jnp.asarray, testing.random_params(ARCH))
    arrays = {**batch.arrays, "loss_mask": np.zeros_like(batch.arrays["loss_mask"])}
    assert patch_relevance(params, batch._replace(arrays=arrays), (True, True), ARCH) is None, "no answer"
    monkeypatch.setattr(module, "MAX_VISUAL", 8)
    assert patch_relevance(params, batch, (True, True), ARCH) is None
