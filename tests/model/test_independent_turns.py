"""Independent turns: one row gives what its turns give alone, and no turn changes another."""

from __future__ import annotations

import itertools
from functools import cache, partial
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from visor_jax import testing
from visor_jax.architecture import Architecture
from visor_jax.data.collate import Batch, Example, RowShape, encode_tokens, make_batch
from visor_jax.kernels.attention import api, xla_chunked
from visor_jax.model import stream as stream_module
from visor_jax.model.likelihood import answer_tokens
from visor_jax.model.visor import encode, logits, with_routing_tokens

VISOR = testing.tiny_architecture(7)
DENSE = testing.tiny_architecture(3, plan="dense")
SHALLOW = testing.tiny_architecture(3)
BOTH_WAYS = testing.tiny_architecture(3, bidirectional_vision=True)
BUDGETS = list(itertools.product((False, True), repeat=2))
Tokens = list[int]
Turn = tuple[Tokens, Tokens]  # question with header, answer


def one_row(shared: Tokens, turns: list[Turn], arch: Architecture) -> Example:
    """An example of independent turns; `shared` holds the places of its pictures."""
    tokens, targets, numbers = list(shared), [False] * len(shared), [0] * len(shared)
    for number, (question, answer) in enumerate(turns, start=1):
        tokens += [*question, *answer]
        targets += [False] * len(question) + [True] * len(answer)
        numbers += [number] * (len(question) + len(answer))
    return encode_tokens(
        tokens,
        pictures(shared),
        testing.IMAGE_TOKEN,
        arch,
        target_mask=targets,
        turn_index=np.array(numbers) - 1,
        turns=numbers,
    )


def alone(shared: Tokens, turn: Turn, arch: Architecture) -> Example:
    question, answer = turn
    targets = [False] * (len(shared) + len(question)) + [True] * len(answer)
    tokens = [*shared, *question, *answer]
    return encode_tokens(tokens, pictures(shared), testing.IMAGE_TOKEN, arch, target_mask=targets)


def pictures(tokens: Tokens) -> list[np.ndarray]:
    return [testing.random_picture(8, 16, seed=seed) for seed in range(tokens.count(testing.IMAGE_TOKEN))]


FIRST = ([3, 4, testing.IMAGE_TOKEN, 5], [([6, 7], [8, 9, 2]), ([6, 10, 11], [12, 2]), ([7], [13, 14, 15, 2])])
SECOND = ([3, 4, 16], [([7, 8, 9], [10, 2]), ([8], [11, 12, 2])])  # without a picture


def together_and_alone(arch: Architecture, packed: bool) -> tuple[Batch, Batch]:
    """Two samples of independent turns, in one row or in two, and each turn in a row."""
    examples = [one_row(*sample, arch) for sample in (FIRST, SECOND)]
    rows = [examples] if packed else [[example] for example in examples]
    shape = RowShape(tiles=3, visual=14, text=40)
    single = [[alone(shared, turn, arch)] for shared, turns in (FIRST, SECOND) for turn in turns]
    return make_batch(rows, shape, arch, independent_turns=True), make_batch(single, shape, arch)


def summed_loss(params: Any, arrays: Any, budget: Any, arch: Architecture, remat: Any = "none") -> jax.Array:
    visual = encode(params, arrays, arch)
    return jnp.sum(answer_tokens(params, visual, arrays, budget, arch, remat=remat)[0])


LOSS = testing.quick_jit(summed_loss, static_argnames="arch")
VALUE_AND_GRADIENTS = testing.quick_jit(jax.value_and_grad(summed_loss), static_argnames="arch")
WITH_REMAT = testing.quick_jit(jax.value_and_grad(partial(summed_loss, remat="full")), static_argnames="arch")


def agree(arch: Architecture, budget: Any, *, packed: bool = False) -> None:
    """Compares independent turns, with recomputation, with the turns alone, each in a row."""
    params, bits = testing.random_params(arch), np.array(budget)
    together, apart = together_and_alone(arch, packed)
    assert together.arrays["loss_mask"].sum() == apart.arrays["loss_mask"].sum() == 14
    found = WITH_REMAT(params, together.arrays, bits, arch=arch)
    expected = VALUE_AND_GRADIENTS(params, apart.arrays, bits, arch=arch)
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    for x, y in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(1.0, float(np.abs(y).max())))


@pytest.mark.parametrize("budget", BUDGETS)
def test_loss_and_gradients_of_a_packed_row_are_the_sums_over_turns_asked_alone(budget) -> None:
    agree(VISOR, budget, packed=True)


def test_loss_under_a_budget_per_sample() -> None:
    params, (together, apart) = testing.random_params(SHALLOW), together_and_alone(SHALLOW, packed=False)
    found = LOSS(params, together.arrays, np.array([(True,), (False,)]), arch=SHALLOW)
    expected = LOSS(params, apart.arrays, np.array([(True,)] * 3 + [(False,)] * 2), arch=SHALLOW)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("arch", [DENSE, BOTH_WAYS], ids=["dense", "both ways"])
def test_in_other_plans(arch) -> None:
    agree(arch, (True,))


def test_sorted_by_position_with_the_kernel_of_long_rows(monkeypatch) -> None:
    """Loops over chunks skip blocks by the bounds of segments and turns."""
    monkeypatch.setattr(stream_module, "PLAIN_LOGITS", 0)
    monkeypatch.setattr(api, "CHOICE", (api.Choice(api.ANY, np.inf, 0, "xla_chunked"),))
    monkeypatch.setattr(xla_chunked, "CHUNK", 8)
    monkeypatch.setattr(xla_chunked, "ROWS", 20)
    params, (together, apart) = testing.random_params(SHALLOW), together_and_alone(SHALLOW, packed=True)
    sorted_loss = testing.quick_jit(partial(summed_loss, arch=SHALLOW))(params, together.arrays, np.array([True]))
    monkeypatch.undo()
    np.testing.assert_allclose(sorted_loss, LOSS(params, apart.arrays, np.array([True]), arch=SHALLOW), rtol=2e-6)


# --- no turn changes another ------------------------------------------------------------------------------------------

LOGITS = testing.quick_jit(logits, static_argnames="arch")


@cache
def params_of(arch: Architecture) -> Any:
    return testing.random_params(arch)


ids = st.integers(2, 63)
turns_strategy = st.lists(
    st.tuples(st.lists(ids, min_size=1, max_size=3), st.lists(ids, min_size=1, max_size=3)), min_size=2, max_size=4
)


@settings(max_examples=20, deadline=None)
@given(st.data(), turns_strategy, st.sampled_from([SHALLOW, DENSE]), st.booleans())
def test_another_answer_changes_no_logit_of_other_turns(data, turns, arch, budget) -> None:
    shared = [3, testing.IMAGE_TOKEN, 5]
    example = one_row(shared, turns, arch)
    changed = data.draw(st.integers(1, len(turns)))
    own = example.text_turns == changed
    other = example._replace(text_tokens=np.where(own & example.loss_mask, data.draw(ids), example.text_tokens))
    found = []
    for x in (example, other):
        batch = make_batch([[x]], RowShape(tiles=3, visual=14, text=28), arch, independent_turns=True)
        found.append(np.asarray(LOGITS(params_of(arch), batch.arrays, np.array([budget]), arch=arch))[0, : len(own)])
    np.testing.assert_array_equal(found[0][~own], found[1][~own])
    if not np.array_equal(example.text_tokens, other.text_tokens):
        assert not np.array_equal(found[0][own], found[1][own])


def test_a_routing_token_reads_one_question() -> None:
    batch = make_batch([[one_row(*FIRST, SHALLOW)]], RowShape(3, 14, 40), SHALLOW, independent_turns=True)
    _, text, stream = testing.decoder_inputs(SHALLOW, batch)
    params = {"routing": {"token": jnp.zeros(text.shape[2])}}
    with pytest.raises(ValueError, match=r"stream\.text_turns: a routing token reads one question"):
        with_routing_tokens(params, text, stream, jnp.array([[9]]))
