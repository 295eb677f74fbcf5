"""Budgets that begin alike share layers: the same scores as one budget after the other, with fewer blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax import testing
from visor_jax.budget import Bits, Plan, all_subsets
from visor_jax.cost import beginnings, decoder_flops, tree_flops
from visor_jax.evaluate import prefixes
from visor_jax.evaluate.prefixes import score_tree
from visor_jax.evaluate.scoring import score_batch
from visor_jax.model.visor import encode, shared_text

pytestmark = pytest.mark.usefixtures("quick")
PLANS = {
    "the paper's": testing.tiny_architecture(10),  # three blocks of three layers, one more layer
    "another pattern": testing.other_plan(),
    "two slots in a block": testing.tiny_architecture(9, pattern=("text", "self", "cross", "self")),
}


@pytest.fixture(params=PLANS)
def case(request: pytest.FixtureRequest) -> tuple[Any, Any, Any, Any]:
    arch = PLANS[request.param]
    params = jax.tree.map(jnp.asarray, testing.random_params(arch))
    batch = testing.random_batch(arch, (((3, 4),), ((2, 2, 3),), ((7,),)))
    arrays = jax.tree.map(jnp.asarray, dict(batch.arrays))
    return params, arrays, encode(params, arrays, arch), arch


def test_scores_are_those_of_one_budget_at_a_time(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, arrays, visual, arch = case
    budgets = all_subsets(arch.num_slots)[::-1]
    run: list[int] = []
    of = prefixes.programs(arch)

    def counted(program: Any) -> Any:
        return lambda *args: (run.append(1), program(*args))[1]

    monkeypatch.setattr(
        prefixes, "programs", lambda _: of._replace(first_block=counted(of.first_block), block=counted(of.block))
    )
    found = score_tree(params, visual, arrays, budgets, arch)
    assert len(run) == len(beginnings(budgets, arch.slots_per_block))
    one = jax.jit(score_batch, static_argnames="arch")
    for bits, (correct, likelihood) in zip(budgets, found, strict=True):
        expected = one(params, visual, arrays, jnp.asarray(bits), arch=arch)
        assert correct.tolist() == expected[0].tolist()
        np.testing.assert_allclose(likelihood, expected[1], rtol=1e-5)
    assert len({float(likelihood[0]) for _, likelihood in found}) == len(budgets), "every budget answers differently"


def test_known_text_and_repeated_budgets(case: Any) -> None:
    params, arrays, visual, arch = case
    full, empty = (True,) * arch.num_slots, (False,) * arch.num_slots
    shared = shared_text(params, visual, arrays, arch)
    found = score_tree(params, visual, arrays, [full, empty, full], arch, shared=shared)
    expected = score_tree(params, visual, arrays, [empty, full], arch)
    for one, other in zip(found, [expected[1], expected[0], expected[1]], strict=True):
        np.testing.assert_allclose(one[1], other[1], rtol=1e-6)


@pytest.mark.parametrize("name", PLANS)
def test_one_budget_costs_what_it_costs_alone(name: str) -> None:
    arch = PLANS[name]
    for bits in all_subsets(arch.num_slots):
        assert tree_flops(arch, [bits, bits], 100, 30) == pytest.approx(decoder_flops(arch, bits, 100, 30))


@pytest.mark.parametrize("name", PLANS)
def test_two_budgets_cost_what_they_do_not_share_twice(name: str) -> None:
    arch = PLANS[name]
    full = (True,) * arch.num_slots
    other = (*full[:-1], False)  # all blocks but the last are shared
    begin = arch.text.num_layers - arch.num_tail_layers - len(arch.pattern)
    shared = range(max(begin, arch.shared_layers.stop)) if arch.num_blocks == 1 else range(begin)
    kinds = tuple(Plan.of(arch).kinds[i] for i in shared)
    once = decoder_flops(arch, (), 100, 30, Plan(kinds), num_logits=0)
    alone = sum(decoder_flops(arch, bits, 100, 30) for bits in (full, other))
    assert tree_flops(arch, [full, other], 100, 30) == pytest.approx(alone - once)


@given(st.integers(1, 6))
def test_all_subsets_need_a_tree_of_blocks(num_slots: int) -> None:
    assert len(beginnings(all_subsets(num_slots), 1)) == 2 ** (num_slots + 1) - 2


@given(st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=10))
def test_never_more_blocks_than_one_by_one(budgets: list[Bits]) -> None:
    distinct = set(budgets)
    assert len(distinct) <= len(beginnings(budgets, 1)) <= 4 * len(distinct)
    assert len(beginnings(budgets, 2)) <= 2 * len(distinct)
