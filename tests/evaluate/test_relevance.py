"""On which patches an answer depends: gradients agree with small changes of single visual tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.budget import Plan
from visor_jax.config import architecture, as_config
from visor_jax.data.questions import single_questions
from visor_jax.evaluate import relevance as module
from visor_jax.evaluate.examples import example_places
from visor_jax.evaluate.relevance import cross_attention_maps, patch_relevance
from visor_jax.model.decoder import cross_params, run_layers
from visor_jax.model.likelihood import answer_tokens
from visor_jax.model.super_block import cross_keys_values
from visor_jax.model.visor import embed, encode, stream_of
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


@pytest.mark.parametrize("bits", [(False, False), (True, True)])
def test_attention_maps_are_the_softmax_of_every_cross_attention_layer(batch: Any, bits: tuple[bool, ...]) -> None:
    """A plain computation of the weights: logits of all heads, softmax, mean over heads and predictions."""
    params = jax.tree.map(jnp.asarray, testing.random_params(ARCH))
    arrays = {name: np.asarray(value) for name, value in batch.arrays.items()}
    maps = cross_attention_maps(params, batch, bits, ARCH)
    assert [one.layer for one in maps] == list(Plan.of(ARCH).cross)
    targets = arrays["loss_mask"][0, 1:] & (arrays["text_segments"][0, 1:] == arrays["text_segments"][0, :-1])
    real = arrays["visual_segments"][0] > 0
    on_device = jax.tree.map(jnp.asarray, dict(batch.arrays))
    stream, visual, text = (
        stream_of(on_device),
        encode(params, on_device, ARCH),
        embed(params, on_device["text_tokens"]),
    )
    for one in maps:
        before = run_layers(params, visual, text, stream, bits, ARCH, layers=range(one.layer))
        cross = cross_params(params, ARCH.layers[one.layer])
        key = np.asarray(cross_keys_values(cross, before[0], on_device["visual_segments"], ARCH.text)[0])[0]
        hidden = np.asarray(before[1][0], np.float64)
        normed = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + ARCH.text.rms_norm_eps)
        normed = normed * np.asarray(cross["text_norm"]["scale"])
        query = normed @ np.asarray(cross["q_proj"]["kernel"]) + np.asarray(cross["q_proj"]["bias"])
        size = ARCH.text.head_dim
        query, key = query.reshape(len(hidden), -1, size), np.repeat(key, ARCH.text.num_heads // key.shape[1], axis=1)
        logits = np.einsum("qhe,nhe->qhn", query[:-1][targets], key)[..., real] / np.sqrt(size)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        of_tokens = np.zeros(len(real))
        of_tokens[real] = (weights / weights.sum(-1, keepdims=True)).mean((0, 1))
        patches = np.zeros(36)
        for token, value in enumerate(of_tokens):
            for patch, weight in zip(
                arrays["visual_gather"][0, token], arrays["visual_weights"][0, token], strict=True
            ):
                if patch < 36 and weight > 0:
                    patches[patch] += weight * value
        assert one.on_tile == pytest.approx(patches.sum(), abs=1e-5)
        np.testing.assert_allclose(one.patches, (patches / patches.max()).reshape(6, 6), atol=1e-4)


def test_a_dense_model_has_no_attention_maps(batch: Any) -> None:
    arch = replace(ARCH, plan="dense")
    assert cross_attention_maps({}, batch, (), arch) == []


def test_examples_are_right_and_wrong_ones_where_there_are_both() -> None:
    tasks, right = ["a", "b", "a", "b", "a", "c", "c", "c"], [True, False, True, False, False, True, True, True]
    assert example_places(tasks, right) == [0, 1, 3, 4, 5, 6]
    assert example_places([], []) == []
