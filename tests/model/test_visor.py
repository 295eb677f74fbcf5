"""The whole model on batches: packing and padding change nothing, and the routing token changes no answer."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.data.collate import Batch, Example, RowShape, make_batch
from visor_jax.model.decoder import forward
from visor_jax.model.likelihood import answer_tokens, answers, prompt_end, prompt_ends
from visor_jax.model.visor import (
    embed,
    encode,
    hidden_states,
    logits,
    route,
    routing_hidden,
    stream_of,
    with_routing_tokens,
)

ARCH = testing.tiny_architecture(7)
PROGRAM = testing.quick_jit(logits, static_argnames="arch")


@cache
def params() -> Any:
    return testing.random_params(ARCH)


@cache
def examples() -> list[Example]:
    """One picture, another, two pictures in one conversation, none."""
    every_texts = ((3, 4), (2, 3), (2, 2, 3), (7,))
    return [testing.random_example(ARCH, texts, seed=seed) for seed, texts in enumerate(every_texts)]


def logits_by_example(batch: Batch, budget: Any) -> list[np.ndarray]:
    """Logits [Nt, vocab] of each example, row by row and segment by segment."""
    found = np.asarray(PROGRAM(params(), batch.arrays, np.array(budget), arch=ARCH))
    segments = batch.arrays["text_segments"]
    return [found[row][segments[row] == s] for row in range(len(found)) for s in range(1, segments[row].max() + 1)]


SEPARATE = RowShape(tiles=4, visual=16, text=9)
BUDGETS = [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_packed_rows_equal_separate_rows(budget) -> None:
    one, other, two, none = examples()
    packed = make_batch([[one, none], [two, other]], RowShape(tiles=7, visual=30, text=16), ARCH)
    alone = logits_by_example(make_batch([[e] for e in (one, none, two, other)], SEPARATE, ARCH), budget)
    for found, expected in zip(logits_by_example(packed, budget), alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_that_share_a_pool_of_tiles_equal_rows_with_their_own(budget) -> None:
    one, other, two, none = examples()
    pooled = make_batch([[one, none], [two], [other], []], RowShape(tiles=9, visual=30, text=16), ARCH, 2)
    assert pooled.arrays["tiles"].shape[0] == 2
    alone = logits_by_example(make_batch([[e] for e in (one, none, two, other)], SEPARATE, ARCH), budget)
    for found, expected in zip(logits_by_example(pooled, budget), alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def scores_and_routes(batch: Batch, budget: Any, samples: int) -> tuple[np.ndarray, ...]:
    """Correctness and log-likelihood [B, R] of each sample's answer, and the policy's scores [B, R, M]."""

    def run(params, arrays, bits):
        visual = encode(params, arrays, ARCH)
        scores = answers(*answer_tokens(params, visual, arrays, bits, ARCH), arrays, samples)
        return *scores, route(params, visual, {**arrays, "routing_position": prompt_ends(arrays, samples)}, 3, ARCH)

    return tuple(map(np.asarray, testing.quick_jit(run)(params(), batch.arrays, np.array(budget))))


@pytest.mark.parametrize("budget", BUDGETS)
def test_labels_and_routes_of_packed_samples_equal_those_alone(budget) -> None:
    one, other, two, none = examples()
    packed = make_batch([[one, none], [two, other], [], [other]], RowShape(tiles=9, visual=30, text=16), ARCH, 2)
    found = scores_and_routes(packed, budget, samples=3)
    alone = scores_and_routes(make_batch([[e] for e in (one, none, two, other)], SEPARATE, ARCH), budget, samples=1)
    places = [((0, 0), 0), ((0, 1), 1), ((1, 0), 2), ((1, 1), 3), ((3, 0), 3)]
    for (row, sample), index in places:
        for of_packed, of_alone in zip(found, alone, strict=True):
            np.testing.assert_allclose(of_packed[row, sample], of_alone[index, 0], atol=1e-5)
    assert np.isfinite(alone[2][..., :3]).all() and len(np.unique(alone[1])) == 4


def test_budgets_of_a_mixed_batch_are_honored_sample_by_sample() -> None:
    """Rows of different pictures and texts, each under its own budget: the logits that each has alone under it."""
    batch = make_batch([[e] for e in examples()], SEPARATE, ARCH)
    alone = {budget: logits_by_example(batch, [budget] * 4) for budget in itertools.product((False, True), repeat=2)}
    for budget, found in alone.items():
        for all_rows, own in zip(logits_by_example(batch, budget), found, strict=True):
            np.testing.assert_allclose(own, all_rows, atol=1e-5)
    *with_pictures, _ = zip(*alone.values(), strict=True)
    assert all(np.abs(a - b).max() > 1e-3 for row in with_pictures for a, b in itertools.combinations(row, 2))
    for mixed in itertools.permutations(alone):
        for row, found in enumerate(logits_by_example(batch, mixed)):
            np.testing.assert_allclose(found, alone[mixed[row]][row], atol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_whatever_lies_in_the_padding_changes_nothing(budget) -> None:
    batch = make_batch([[e] for e in examples()], SEPARATE, ARCH)
    rng = np.random.default_rng(3)
    dirty = dict(batch.arrays)
    for stream in ("visual", "text"):
        padding = dirty[f"{stream}_segments"] == 0
        assert padding.any(axis=1).all()
        for name in [name for name in dirty if name.startswith(stream) and not name.endswith("segments")]:
            rubbish = rng.integers(1, 5, dirty[name].shape).astype(dirty[name].dtype)
            dirty[name] = np.where(padding.reshape(*padding.shape, *[1] * (rubbish.ndim - 2)), rubbish, dirty[name])
    clean = logits_by_example(batch, budget)
    for found, expected in zip(logits_by_example(batch._replace(arrays=dirty), budget), clean, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pictures_matter_and_only_to_their_own_sample() -> None:
    batch = make_batch([[e] for e in examples()], SEPARATE, ARCH)
    other = dict(batch.arrays)
    other["tiles"] = other["tiles"].copy()
    other["tiles"][0] = 255 - other["tiles"][0]
    for budget in BUDGETS[:2]:
        before, after = (logits_by_example(batch._replace(arrays=x), budget) for x in (batch.arrays, other))
        assert np.abs(after[0] - before[0]).max() > 1e-3
        for found, expected in zip(after[1:], before[1:], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_text_only_rows_need_no_visual_slots_at_all() -> None:
    """A text-only batch may have no room for pictures; its answers are those of the same rows beside pictures."""
    *_, none = examples()
    alone = make_batch([[none]], RowShape(tiles=1, visual=1, text=7), ARCH)
    beside = make_batch([[e] for e in examples()], SEPARATE, ARCH)
    for budget in BUDGETS[:2]:
        (found,) = logits_by_example(alone, budget)
        np.testing.assert_allclose(found, logits_by_example(beside, budget)[-1], atol=1e-5)


# --- routing ----------------------------------------------------------------------------------------------------------


def test_the_routing_token_changes_no_answer() -> None:
    batch = testing.random_prompts(ARCH).arrays

    def both_ways(params, batch, on):
        visual, text, stream = encode(params, batch, ARCH), embed(params, batch["text_tokens"]), stream_of(batch)
        routed_text, routed_stream = with_routing_tokens(params, text, stream, batch["routing_position"][:, None])
        plain = forward(params, visual, text, stream, on, ARCH)
        routed = forward(params, visual, routed_text, routed_stream, on, ARCH)
        return plain, (routed[0], routed[1][:, :-1])

    program = testing.quick_jit(both_ways)
    for budget in BUDGETS:
        plain, routed = program(params(), batch, np.array(budget))
        real = batch["text_segments"] > 0
        np.testing.assert_allclose(routed[1][real], plain[1][real], atol=1e-5)
        np.testing.assert_allclose(routed[0], plain[0], atol=1e-5)


ROUTE = testing.quick_jit(lambda params, batch: route(params, encode(params, batch, ARCH), batch, 5, ARCH))


def test_a_route_depends_on_prompt_and_picture_and_on_nothing_else() -> None:
    batch = testing.random_batch(ARCH, (((3, 5),), ((2, 1, 4),), ((6,),)))
    arrays = {**batch.arrays, "routing_position": np.asarray(prompt_end(batch.arrays))}
    scores = np.asarray(ROUTE(params(), arrays))
    assert np.isneginf(scores[:, 5:]).all() and np.isfinite(scores[:, :5]).all()

    def moved(name: str, row: int, index: Any, value: Any) -> np.ndarray:
        changed = arrays[name].copy()
        changed[(row, *index)] = value
        return np.abs(np.asarray(ROUTE(params(), {**arrays, name: changed}))[:, :5] - scores[:, :5]).max(axis=1)

    for row in range(3):
        answer = np.flatnonzero(arrays["loss_mask"][row])
        assert moved("text_tokens", row, (answer,), 9).max() == 0, "the route does not depend on the answer"
        for token in range(answer[0]):
            change = moved("text_tokens", row, (token,), (arrays["text_tokens"][row, token] + 1) % 64)
            assert change[row] > 1e-6 and np.delete(change, row).max() == 0
    assert moved("tiles", 0, (0,), 0)[0] > 1e-6
    # Without the answer in the row, and beside other padding, it is the same route.
    prompt_only = {**arrays, "text_segments": np.where(arrays["loss_mask"], 0, arrays["text_segments"])}
    np.testing.assert_allclose(np.asarray(ROUTE(params(), prompt_only)), scores, atol=1e-5)


def test_the_routing_hidden_state_is_taken_before_the_first_slot() -> None:
    """It does not depend on later layers, so it can be computed before the budget is known."""
    batch = testing.random_prompts(ARCH).arrays
    blocks = params()["blocks"]
    spoilt = {**params(), "tail": None, "norm": None, "lm_head": None, "blocks": {**blocks, "self": None}}
    hidden = testing.quick_jit(lambda p, b: routing_hidden(p, encode(p, b, ARCH), b, ARCH))
    found = np.asarray(hidden(spoilt, batch))
    assert found.shape == (3, ARCH.text.hidden_size)
    np.testing.assert_allclose(found, np.asarray(hidden(params(), batch)), atol=1e-6)
    first = jax.tree.map(lambda x: np.concatenate([x[:1], np.full_like(x[1:], np.nan)]), blocks)
    np.testing.assert_allclose(np.asarray(hidden({**params(), "blocks": first}, batch)), found, atol=1e-6)


def test_hidden_states_feed_the_logits_and_a_tied_head() -> None:
    import dataclasses

    arch = dataclasses.replace(ARCH, text=dataclasses.replace(ARCH.text, tie_word_embeddings=True, num_layers=3))
    tied = testing.random_params(arch)
    assert "lm_head" not in tied
    batch = testing.random_prompts(arch).arrays
    on = np.array([True])
    hidden = testing.quick_jit(lambda p, b: hidden_states(p, encode(p, b, arch), b, on, arch))(tied, batch)
    found = np.asarray(testing.quick_jit(logits, static_argnames="arch")(tied, batch, on, arch=arch))
    np.testing.assert_allclose(found, np.asarray(hidden) @ tied["embed_tokens"]["embedding"].T, atol=1e-4)
    assert found.dtype == np.float32
