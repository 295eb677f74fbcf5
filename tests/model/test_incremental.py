"""Generation with caches equals the full forward pass at every step, and caches only what is read again."""

from __future__ import annotations

import itertools
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.architecture import Architecture, DropCounts, DroppingArchitecture
from visor_jax.budget import LayerKind, Plan
from visor_jax.cost import cache_bytes
from visor_jax.data.collate import RowShape, make_batch, make_prompt_batch
from visor_jax.model.decoder import stack_layers, unstack_layers
from visor_jax.model.incremental import Cache, capacity, decode_step, grow_cache, prefill_prefix, prefill_rest
from visor_jax.model.visor import encode, logits, route

VISOR = testing.tiny_architecture(7)
DENSE = testing.tiny_architecture(4, plan="dense")
OTHER = testing.other_plan()
DROPPING = tuple(
    testing.tiny_architecture(4, plan="dense", dropping=dropping)
    for dropping in (
        DroppingArchitecture("fastv", (2,), (0.5,)),
        DroppingArchitecture("fastv", (2,), (0.3,), score="paper"),
        DroppingArchitecture("pyramiddrop", (1, 3), (0.6, 0.3)),
        DroppingArchitecture("sparsevlm", (1, 3), (0.6, 0.3)),
    )
)
BITS = list(itertools.product((False, True), repeat=2))
# One picture, one more after a longer text, two pictures, none: prompts of 8, 9, 6 and 3 text tokens in one batch.
ROWS = ((3, 5), (7, 2), (2, 1, 3), (3,))
NEW = 64  # tokens generated for each
CAPACITY = 80


@cache
def params(arch: Architecture) -> Any:
    return testing.random_params(arch)


@cache
def streams(arch: Architecture) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A batch of prompts, and the same rows with `NEW` tokens after the prompt."""
    prompts = [testing.random_example(arch, texts, seed=seed, num_targets=0) for seed, texts in enumerate(ROWS)]
    whole = RowShape(tiles=4, visual=16, text=11 + NEW)
    full = make_batch([[prompt] for prompt in prompts], whole, arch).arrays
    rng = np.random.default_rng(11)
    for row, prompt in enumerate(prompts):
        new = slice(len(prompt.text_tokens), len(prompt.text_tokens) + NEW)
        full["text_tokens"][row, new] = rng.integers(2, arch.text.vocab_size, NEW)
        full["text_positions"][row, new] = prompt.length + np.arange(NEW)
        full["text_segments"][row, new] = 1
        full["loss_mask"][row, new] = True
    return make_prompt_batch(prompts, RowShape(tiles=4, visual=16, text=11), arch).arrays, full


@cache
def prefix_program(arch: Architecture, routed: bool) -> Any:
    def run(params, batch):
        visual = encode(params, batch, arch)
        return prefill_prefix(params, visual, batch, 5, arch, routed=routed)

    return testing.quick_jit(run)


@cache
def full_program(arch: Architecture) -> Any:
    return testing.quick_jit(partial(logits, arch=arch))


def held_bytes(cache: Cache) -> int:
    """Bytes of all keys and values."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.layers, cache.cross)))


def prefilled(arch: Architecture, bits: tuple[bool, ...], *, routed: bool = False) -> tuple[np.ndarray, Cache]:
    prompts, _ = streams(arch)
    prefix, _ = prefix_program(arch, routed)(params(arch), prompts)
    rest = testing.quick_jit(partial(prefill_rest, bits=bits, capacity=CAPACITY, arch=arch))
    return rest(params(arch), prefix, prompts)


EVERY_BUDGET = [
    *((arch, bits) for arch in (VISOR, OTHER) for bits in BITS),
    *((arch, ()) for arch in (DENSE, *DROPPING)),
]


@pytest.mark.parametrize(("arch", "bits"), EVERY_BUDGET)
def test_every_step_equals_the_full_forward_pass(arch: Architecture, bits: tuple[bool, ...]) -> None:
    prompts, full = streams(arch)
    expected = np.asarray(full_program(arch)(params(arch), full, np.array(bits, bool)))
    lengths = np.sum(prompts["text_segments"] > 0, axis=1)
    rows = np.arange(len(ROWS))
    found, cache = prefilled(arch, bits, routed=arch.plan == "visor")
    step = testing.quick_jit(partial(decode_step, bits=bits, arch=arch))
    for count in range(NEW + 1):
        np.testing.assert_allclose(found, expected[rows, lengths - 1 + count], atol=1e-5, err_msg=f"token {count}")
        assert np.array_equal(cache.lengths, lengths + count)
        assert np.array_equal(cache.positions, prompts["routing_position"] + count)
        if count < NEW:
            found, cache = step(params(arch), full["text_tokens"][rows, lengths + count], cache)
    assert found.dtype == np.float32


@pytest.mark.parametrize("arch", [VISOR, OTHER], ids=["visor", "other"])
def test_the_prefix_scores_the_route_and_is_the_same_without_the_routing_token(arch: Architecture) -> None:
    prompts, _ = streams(arch)
    routed, scores = prefix_program(arch, True)(params(arch), prompts)
    plain, none = prefix_program(arch, False)(params(arch), prompts)
    assert none is None
    expected = testing.quick_jit(lambda p, b: route(p, encode(p, b, arch), b, 5, arch))(params(arch), prompts)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    real = prompts["text_segments"] > 0
    np.testing.assert_allclose(routed.text[real], plain.text[real], atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), routed.recorded["cross"], plain.recorded["cross"])
    shapes = jax.tree.map(np.shape, routed.recorded)
    assert shapes == jax.tree.map(np.shape, plain.recorded), "the routing token is not kept"


@pytest.mark.parametrize(("arch", "bits"), EVERY_BUDGET)
def test_the_cache_keeps_visual_keys_only_where_they_are_read_again(arch: Architecture, bits: tuple[bool, ...]) -> None:
    """Its bytes are those of the formula in `visor_jax.budget`."""
    prompts, _ = streams(arch)
    prefix = jax.eval_shape(prefix_program(arch, False), params(arch), prompts)[0]
    rest = partial(prefill_rest, bits=bits, capacity=CAPACITY, arch=arch)
    _, cache = jax.eval_shape(rest, params(arch), prefix, prompts)
    num_rows, num_visual = prompts["visual_segments"].shape
    joint = [kind is LayerKind.SELF for kind in Plan.of(arch).under(bits)]
    assert sum(joint) == (sum(bits) if arch.plan == "visor" else arch.text.num_layers)
    for layer, (both, (keys, values)) in enumerate(zip(joint, cache.layers, strict=True)):
        drops = arch.dropping.drops_before(layer)
        room = arch.dropping.room(drops - 1, num_visual) if drops else DropCounts(num_visual, 0, 0)
        slots = CAPACITY + (room.kept + room.clusters if both else 0)
        assert keys.shape[:2] == values.shape[:2] == (num_rows, slots)
    assert [keys.shape[:2] for keys, _ in cache.cross] == [(num_rows, num_visual)] * len(cache.cross)
    assert len(cache.cross) == (arch.num_blocks if arch.plan == "visor" else 0)
    assert capacity(cache, bits, arch) == CAPACITY
    assert held_bytes(cache) == num_rows * cache_bytes(arch, bits, num_visual, CAPACITY, 4)


def test_a_step_adds_one_entry_to_the_text_cache_and_touches_nothing_else() -> None:
    bits = (False, True)
    prompts, _ = streams(VISOR)
    _, before = prefilled(VISOR, bits)
    token = np.full(len(ROWS), 7)
    _, after = testing.quick_jit(partial(decode_step, bits=bits, arch=VISOR))(params(VISOR), token, before)
    jax.tree.map(np.testing.assert_array_equal, before.cross, after.cross)
    held = np.arange(CAPACITY)[None, :] == np.sum(prompts["text_segments"] > 0, axis=1)[:, None]
    for old, new in zip(before.layers, after.layers, strict=True):
        for old_array, new_array in zip(old, new, strict=True):
            changed = np.any(np.asarray(old_array) != np.asarray(new_array), axis=(2, 3))  # [B, (Nv +) C]
            expected = np.pad(held, ((0, 0), (changed.shape[1] - CAPACITY, 0)))
            np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize(("arch", "bits"), [(VISOR, (False, True)), (DENSE, ())])
def test_a_doubled_cache_holds_the_same_and_says_the_same(arch: Architecture, bits: tuple[bool, ...]) -> None:
    _, cache = prefilled(arch, bits)
    larger = grow_cache(cache, bits, arch)
    assert capacity(larger, bits, arch) == 2 * CAPACITY
    token, step = np.full(len(ROWS), 7), testing.quick_jit(partial(decode_step, bits=bits, arch=arch))
    expected, _ = step(params(arch), token, cache)
    found, _ = step(params(arch), token, larger)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_step_adds_its_token_in_place() -> None:
    """If the old cache is donated, the compiled program writes into it and holds no second copy."""
    bits = (False, True)
    _, cache = prefilled(VISOR, bits)
    step = jax.jit(partial(decode_step, bits=bits, arch=VISOR), donate_argnums=2)
    compiled = step.lower(params(VISOR), np.full(len(ROWS), 7), cache).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held_bytes(cache)


@pytest.mark.parametrize("arch", [VISOR, DENSE], ids=["visor", "dense"])
def test_layers_held_apart_are_the_same_model(arch):
    stacked, held = params(arch), unstack_layers(params(arch))
    assert jax.tree.structure(stack_layers(held)) == jax.tree.structure(stacked)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(held), stacked)
    assert stack_layers(stacked) == stacked and unstack_layers(held) == held
    bits, (batch, _) = (True,) * arch.num_slots, streams(arch)

    def prefill(params, batch):
        prefix, _ = prefill_prefix(params, encode(params, batch, arch), batch, 5, arch, routed=False)
        scores, cache = prefill_rest(params, prefix, batch, bits, CAPACITY, arch)
        return scores, decode_step(params, batch["text_tokens"][:, 0], cache, bits, arch)[0]

    program = testing.quick_jit(prefill)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), program(held, batch), program(stacked, batch)
    )
