"""What is observed of a layer, against NumPy, and against models that really lack what an ablation takes away."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax import testing
from visor_jax.analysis.layers import answers_of, linear_cka, programs
from visor_jax.model.decoder import run_layers
from visor_jax.model.likelihood import answer_tokens
from visor_jax.model.visor import embed, encode, stream_of

pytestmark = pytest.mark.usefixtures("quick")
ARCH = testing.tiny_architecture(4, plan="dense")
NONE = np.zeros(4, bool)
ALL = ~NONE


@pytest.fixture(scope="module")
def case() -> tuple[Any, dict[str, Any], Any, Any]:
    """Parameters, a batch of two samples with pictures and one without, its V(0), and its answers."""
    params = jax.tree.map(jnp.asarray, testing.random_params(ARCH))
    batch = testing.random_batch(ARCH, (((3, 4),), ((2, 2, 3),), ((7,),)))
    arrays = jax.tree.map(jnp.asarray, dict(batch.arrays))
    return params, arrays, encode(params, arrays, ARCH), answers_of(batch.arrays)


def reference(params: Any, arrays: Any, visual: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether each answer is right, and its mean log-likelihood per token, by the model's own scoring."""
    losses, correct, weights = map(np.asarray, answer_tokens(params, visual, arrays, (), ARCH))
    return np.all(correct | (weights == 0), axis=1), -losses.sum(axis=1) / weights.sum(axis=1)


def effect(case: Any, dropped: np.ndarray, frozen: np.ndarray) -> Any:
    params, arrays, visual, answers = case
    observe, ablate = programs(ARCH)
    unchanged = observe(params, visual, arrays, answers).log_probs
    return jax.tree.map(np.asarray, ablate(params, visual, arrays, answers, unchanged, dropped, frozen))


def test_nothing_taken_away_changes_nothing(case: Any) -> None:
    params, arrays, visual, _ = case
    right, likelihood = reference(params, arrays, visual)
    found = effect(case, NONE, NONE)
    assert found.right.tolist() == right.tolist()
    np.testing.assert_allclose(found.log_likelihood, likelihood, rtol=1e-5)
    np.testing.assert_allclose(found.divergence, 0, atol=1e-6)


def test_without_vision_in_all_layers_the_model_answers_as_without_a_picture(case: Any) -> None:
    params, arrays, visual, _ = case
    blind = {**arrays, "visual_segments": jnp.zeros_like(arrays["visual_segments"])}
    right, likelihood = reference(params, blind, visual)
    found = effect(case, ALL, NONE)
    assert found.right.tolist() == right.tolist()
    np.testing.assert_allclose(found.log_likelihood, likelihood, rtol=1e-5)
    assert np.all(found.divergence[:2] > 1e-4) and found.divergence[2] < 1e-6, "the third sample has no picture"


def test_a_frozen_layer_leaves_visual_tokens_as_they_are(case: Any) -> None:
    params, arrays, visual, answers = case
    stream, text = stream_of(arrays), embed(params, arrays["text_tokens"])
    _, after = run_layers(params, visual, text, stream, (), ARCH, layers=range(1))
    _, last = run_layers(params, visual, after, stream, (), ARCH, layers=range(1, 4))
    hidden = np.asarray(last, np.float64)
    hidden = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + ARCH.text.rms_norm_eps)
    head = params["lm_head"]["kernel"] if "lm_head" in params else params["embed_tokens"]["embedding"].T
    logits = hidden * np.asarray(params["norm"]["scale"]) @ np.asarray(head)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    rows = np.arange(3)[:, None]
    of_answers = log_probs[rows, answers.places, answers.labels]
    expected = np.where(answers.valid, of_answers, 0).sum(axis=1) / answers.valid.sum(axis=1)
    np.testing.assert_allclose(effect(case, NONE, np.arange(4) == 0).log_likelihood, expected, rtol=1e-4)


def test_visual_tokens_after_the_last_layer_are_not_read(case: Any) -> None:
    np.testing.assert_allclose(effect(case, NONE, np.arange(4) == 3).divergence, 0, atol=1e-6)


def test_attention_share_of_the_first_layer_is_that_of_numpy(case: Any) -> None:
    params, arrays, visual, answers = case
    shares = np.asarray(programs(ARCH)[0](params, visual, arrays, answers).attention_share)
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["blocks"])
    layer = layer[ARCH.layers[0].path.split("/")[1]]
    layer = layer.get(ARCH.layers[0].path.split("/")[-1], layer)
    text = ARCH.text
    both = np.concatenate([visual, embed(params, arrays["text_tokens"])], axis=1).astype(np.float64)
    positions = np.concatenate([arrays["visual_positions"], arrays["text_positions"]], axis=1)
    segments = np.concatenate([arrays["visual_segments"], arrays["text_segments"]], axis=1)
    x = both / np.sqrt(np.mean(both**2, axis=-1, keepdims=True) + text.rms_norm_eps)
    x = x * layer["input_layernorm"]["scale"]
    attn = layer["self_attn"]
    query, key = (
        (x @ attn[name]["kernel"] + attn[name]["bias"]).reshape(*x.shape[:2], -1, text.head_dim)
        for name in ("q_proj", "k_proj")
    )
    angles = positions[..., None, None] / text.rope_theta ** (np.arange(0, text.head_dim, 2) / text.head_dim)

    def turned(z: np.ndarray) -> np.ndarray:
        real, imaginary = np.split(z, 2, axis=-1)
        pairs = (real + 1j * imaginary) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    query, key, count = turned(query), turned(key), visual.shape[1]
    for row in range(3):
        found = []
        for place in np.asarray(answers.places)[row][np.asarray(answers.valid)[row]]:
            here = count + place
            seen = (segments[row] == segments[row, here]) & (positions[row] <= positions[row, here])
            for number in range(text.num_heads):
                keys = key[row, seen, number // (text.num_heads // text.num_kv_heads)]
                logits = keys @ query[row, here, number] / np.sqrt(text.head_dim)
                weights = np.exp(logits - logits.max())
                found.append(weights[np.flatnonzero(seen) < count].sum() / weights.sum())
        assert shares[0, row] == pytest.approx(np.mean(found), abs=1e-5)
    assert shares[0, 2] == 0 and np.all(shares[:, :2] > 0)


def cka_of_numpy(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al., 2019, section 3: HSIC with linear kernels, over tokens."""
    center = np.eye(len(x)) - 1 / len(x)
    one, other = (center @ (z @ z.T) @ center for z in (x, y))
    return float(np.trace(one @ other) / np.sqrt(np.trace(one @ one) * np.trace(other @ other)))


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 3), st.integers(0, 2**31))
def test_cka_is_that_of_its_definition_and_ignores_padding(tokens: int, size: int, padding: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 1, tokens + padding, size)).astype(np.float32)
    kept = np.arange(tokens + padding) < tokens
    found = float(linear_cka(jnp.asarray(x), jnp.asarray(y), jnp.asarray(kept[None]))[0])
    assert found == pytest.approx(cka_of_numpy(x[0, :tokens], y[0, :tokens]), abs=2e-3)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0].astype(np.float32)
    same = linear_cka(jnp.asarray(x), jnp.asarray(3 * x @ turn + 1), jnp.asarray(kept[None]))
    assert float(same[0]) == pytest.approx(1, abs=1e-4)
