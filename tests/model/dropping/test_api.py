"""Dense plans that drop visual tokens: as the published algorithms in NumPy, whatever shares a row."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.dropping import dropping_reference as reference
from visor_jax import testing
from visor_jax.architecture import AnyResArchitecture, Architecture, DroppingArchitecture
from visor_jax.data.collate import make_batch
from visor_jax.model.decoder import forward, layer_params
from visor_jax.model.dropping.api import run_dropping
from visor_jax.model.dropping.base import last_instruction_tokens, prompt_tokens
from visor_jax.model.stream import TokenStream
from visor_jax.model.visor import hidden_states, stream_of

FASTV = DroppingArchitecture("fastv", (2,), (0.5,))
PAPER = dataclasses.replace(FASTV, score="paper")
PYRAMID = DroppingArchitecture("pyramiddrop", (1, 3), (0.55, 0.25))
SPARSE = DroppingArchitecture("sparsevlm", (1, 3), (0.4, 0.2))
EACH = {"fastv code": FASTV, "fastv paper": PAPER, "pyramiddrop": PYRAMID, "sparsevlm": SPARSE}
SIZE = (36, 36)


def arch_of(dropping: DroppingArchitecture) -> Architecture:
    plain = testing.tiny_architecture(4, plan="dense")
    wide = dataclasses.replace(plain.vision, tile_size=9 * plain.vision.patch_size)
    return dataclasses.replace(plain, vision=wide, anyres=AnyResArchitecture(), dropping=dropping)


@cache
def params() -> Any:
    return testing.random_params(arch_of(FASTV))


def text_states(arch: Architecture, visual: Any, text: Any, stream: TokenStream) -> np.ndarray:
    run = testing.quick_jit(lambda v, t, s: run_dropping(params(), v, t, s, arch)[1])
    return np.asarray(run(visual, text, stream))


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("targets", [0, 3])
def test_it_is_the_published_algorithm(name: str, targets: int) -> None:
    arch = arch_of(EACH[name])
    example = testing.random_example(arch, (3, 9), size=SIZE, seed=5, num_targets=targets)
    batch = make_batch([[example]], testing.row_shape_of([[example]], 3), arch)
    visual, text, stream = testing.decoder_inputs(arch, batch)
    count, words = example.size.visual, example.size.text
    found = text_states(arch, visual, text, stream)[0, :words]

    layers = [jax.tree.map(lambda x: np.asarray(x, np.float64), layer_params(params(), place)) for place in arch.layers]
    start, length = 3, words + count
    sequence = np.concatenate([text[0, :start], visual[0, :count], text[0, start:words]]).astype(np.float64)
    prompt = length - targets
    if name == "pyramiddrop":
        settings = {"after": PYRAMID.layers, "ratios": PYRAMID.ratios}
        expected = reference.pyramiddrop(
            layers, sequence, start, count, lambda n: np.array([prompt - count + n - 1]), arch.text, **settings
        )
        remain = int(count * PYRAMID.ratios[-1])
    elif name == "sparsevlm":
        expected, remain = reference.sparsevlm(
            layers, sequence, start, count, prompt, arch.text, after=SPARSE.layers, ratios=SPARSE.ratios
        )
        assert SPARSE.remaining(1, count) == remain
    else:
        expected = reference.fastv(
            layers, sequence, start, count, prompt, arch.text, after=2, ratio=0.5, paper=name == "fastv paper"
        )
        remain = int(count * 0.5)
    of_text = np.concatenate([expected[:start], expected[start + remain :]])
    np.testing.assert_allclose(found, of_text, atol=2e-4)
    plain = testing.quick_jit(lambda v, t, s: forward(params(), v, t, s, (), arch.without_dropping)[1])
    assert np.abs(np.asarray(plain(visual, text, stream))[0, :words] - of_text).max() > 1e-2, "dropping has an effect"


def test_pyramiddrop_asks_the_last_token_of_every_instruction() -> None:
    arch = arch_of(PYRAMID)
    example = testing.random_example(arch, (3, 12), size=SIZE, seed=6)
    mask = np.zeros(15, bool)
    mask[[6, 7, 12, 13]] = True  # two answers
    example = example._replace(loss_mask=mask)
    batch = make_batch([[example]], testing.row_shape_of([[example]], 3), arch)
    visual, text, stream = testing.decoder_inputs(arch, batch)
    count = example.size.visual
    found = text_states(arch, visual, text, stream)[0, :15]
    layers = [jax.tree.map(lambda x: np.asarray(x, np.float64), layer_params(params(), place)) for place in arch.layers]
    sequence = np.concatenate([text[0, :3], visual[0, :count], text[0, 3:15]]).astype(np.float64)
    expected = reference.pyramiddrop(
        layers, sequence, 3, count, lambda n: n + np.array([5, 11]), arch.text, after=(1, 3), ratios=(0.55, 0.25)
    )
    remain = int(count * 0.25)
    np.testing.assert_allclose(found, np.concatenate([expected[:3], expected[3 + remain :]]), atol=2e-4)


@pytest.mark.parametrize("name", [name for name in EACH if name != "sparsevlm"])
def test_rows_that_samples_share_and_padding_change_nothing(name: str) -> None:
    arch = arch_of(EACH[name])
    run = partial(testing.quick_jit(lambda p, v, b: hidden_states(p, v, b, (), arch)), params())
    examples = [
        testing.random_example(arch, texts, size=SIZE, seed=seed)
        for seed, texts in enumerate([(3, 6), (2, 2, 4), (7,)])
    ]
    batch = make_batch([examples, []], testing.row_shape_of([examples], 5), arch)
    visual, _, _ = testing.decoder_inputs(arch, batch)
    shared = np.asarray(run(visual, batch.arrays))
    start_visual = start_text = 0
    for example in examples:
        size = example.size
        alone = make_batch([[example]], testing.row_shape_of([[example]], 2), arch)
        own = np.zeros((1, alone.arrays["visual_segments"].shape[1], visual.shape[2]), np.float32)
        own[0, : size.visual] = visual[0, start_visual : start_visual + size.visual]
        expected = np.asarray(run(own, alone.arrays))[0, : size.text]
        np.testing.assert_allclose(shared[0, start_text : start_text + size.text], expected, atol=1e-4)
        start_visual, start_text = start_visual + size.visual, start_text + size.text


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_reach_parameters_and_tokens(remat: str) -> None:
    arch = arch_of(PYRAMID)
    batch = testing.random_batch(arch)
    visual, text, stream = testing.decoder_inputs(arch, batch)

    def loss(params: Any, visual: Any) -> Any:
        _, out, _ = run_dropping(params, visual, text, stream, arch, remat=remat)
        return (out**2).sum()

    gradients, of_visual = testing.quick_jit(jax.grad(loss, argnums=(0, 1)))(params(), visual)
    for layer in ("head", "blocks", "tail"):
        for leaf in jax.tree.leaves(gradients.get(layer, {})):
            assert np.isfinite(leaf).all()
    kernel = gradients["blocks"]["self"]["self_attn"]["o_proj"]["kernel"]
    assert np.abs(kernel).min() > 0
    used = np.asarray(stream.visual_segments) > 0
    assert np.abs(np.asarray(of_visual)[used]).max(axis=-1).min() > 0, "the first layer read every token"


def test_who_rates() -> None:
    row = {"text_segments": [1, 1, 1, 1, 1, 2, 2, 2, 0], "loss_mask": [0, 0, 1, 0, 1, 0, 0, 0, 0]}
    arrays = {
        "visual_positions": np.zeros((1, 0), np.int32),
        "visual_segments": np.zeros((1, 0), np.int32),
        "text_positions": np.array([[0, 1, 2, 3, 4, 0, 1, 2, 0]], np.int32),
        "text_segments": np.array([row["text_segments"]], np.int32),
        "loss_mask": np.array([row["loss_mask"]], bool),
    }
    stream = jax.tree.map(jnp.asarray, stream_of(arrays))
    assert last_instruction_tokens(stream)[0].tolist() == [bool(x) for x in (0, 1, 0, 1, 0, 0, 0, 1, 0)]
    assert prompt_tokens(stream)[0].tolist() == [bool(x) for x in (1, 1, 0, 0, 0, 1, 1, 1, 0)]
    prompts = stream._replace(targets=None)
    assert last_instruction_tokens(prompts)[0].tolist() == [bool(x) for x in (0, 0, 0, 0, 1, 0, 0, 1, 0)]
    assert prompt_tokens(prompts)[0].tolist() == [True] * 8 + [False]
