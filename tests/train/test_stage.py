"""Inputs of the loop: budgets and batches are pure functions of (seed, stage, step)."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.budget import Bits, all_subsets
from visor_jax.config import architecture, as_config, stage_config
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective
from visor_jax.train.objectives.held_out import budgets_of
from visor_jax.train.stage import Step, budget_drawer, draw
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import read_viable


@given(st.integers(0, 2**32 - 1), st.sampled_from(["base", "universal"]), st.integers(1, 2**40))
def test_a_drawn_budget_is_a_pure_function(seed: int, stage: str, step: int) -> None:
    choices = all_subsets(3)
    assert draw(choices, seed, stage, step) == draw(choices, seed, stage, step)
    assert draw(choices, seed, stage, step) in choices


def test_draws_are_even_and_differ_by_seed_and_stage() -> None:
    choices = all_subsets(2)
    streams = {
        key: [draw(choices, *key, step) for step in range(2000)] for key in ((0, "base"), (1, "base"), (0, "full"))
    }
    for drawn in streams.values():
        assert all(400 < count < 600 for count in Counter(drawn).values())
    assert len({tuple(drawn) for drawn in streams.values()}) == 3


def test_universal_draws_viable_budgets_only(tiny_run: Path) -> None:
    of = budget_drawer(as_config(tiny_config()), "universal", Workdir(tiny_run))
    assert {of(step) for step in range(200)} == set(read_viable(Workdir(tiny_run)))


def test_universal_without_a_search_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="run the search first"):
        make_objective(tiny_config(), "universal", Workdir(tmp_path))


def test_budgets_of_full_subsets_and_base(tmp_path: Path) -> None:
    config = as_config(tiny_config({"stage_overrides.warmup.budgets": "subsets"}))
    full, some, base = (budget_drawer(config, stage, Workdir(tmp_path)) for stage in ("full", "warmup", "base"))
    assert {full(step) for step in range(9)} == {(True, True)}
    assert {some(step) for step in range(200)} == {(True, True), (True, False), (False, True)}
    assert {base(step) for step in range(9)} == {()}, "the base is dense"


@pytest.mark.parametrize(("budgets", "bits"), [("empty", (False, False)), ("0b10", (True, False))])
def test_a_fixed_budget_is_that_of_every_step(tmp_path: Path, budgets: str, bits: Bits) -> None:
    config = as_config(tiny_config({"stage_overrides.universal.budgets": budgets}))
    of = budget_drawer(config, "universal", Workdir(tmp_path))
    assert {of(step) for step in range(9)} == {bits}
    assert budgets_of(config, "universal", architecture(config, "universal"), Workdir(tmp_path)) == ((budgets, bits),)


@pytest.mark.parametrize(
    ("budgets", "message"), [("0b1", "has 1 bits, the model has 2 slots"), ("most", "expected 'full', 'empty' or bits")]
)
def test_a_budget_of_another_model_is_refused(budgets: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny_config({"stage_overrides.full.budgets": budgets})


def test_a_dense_stage_that_runs_has_all_layers_on() -> None:
    with pytest.raises(RequestError, match=r"train\.budgets='subsets': the stage 'base_words' trains a dense model"):
        tiny_config({"stages": ("base_words",), "train.budgets": "subsets"})
    with pytest.raises(RequestError, match=r"stage_overrides\.base\.budgets='0b10': the stage 'base' trains a dense"):
        tiny_config({"stage": "base", "stage_overrides.base.budgets": "0b10"})
    adaptive = tiny_config({"stages": ("full",), "train.budgets": "subsets"})
    assert stage_config(adaptive, "full").budgets == "subsets"


def same(left: Step, right: Step) -> bool:
    plain = (left.number, left.budget, left.ids, left.tasks) == (right.number, right.budget, right.ids, right.tasks)
    return plain and all(np.array_equal(left.arrays[k], right.arrays[k]) for k in left.arrays | right.arrays)


@pytest.mark.parametrize("stage", ["base", "full", "universal", "policy"])
def test_the_rest_of_the_steps_is_the_same_after_a_stop(tiny_run: Path, stage: str) -> None:
    objective = make_objective(tiny_config(), stage, Workdir(tiny_run))
    whole, rest = list(objective.steps(0, 5)), list(objective.steps(3, 5))
    assert [step.number for step in whole] == [1, 2, 3, 4, 5] and len(rest) == 2
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))
    assert not same(whole[0], whole[1])


def test_stages_share_no_picture_whatever_their_batch_sizes(tiny_run: Path) -> None:
    rows = {"base": 2, "warmup": 3, "full": 8, "universal": 4, "policy": 6}
    config = tiny_config({f"stage_overrides.{stage}.batch_size": count for stage, count in rows.items()})
    ids = {}
    for stage in rows:
        steps = list(make_objective(config, stage, Workdir(tiny_run)).steps(0, 3))
        assert all(len(step.ids) == rows[stage] for step in steps)
        ids[stage] = {id.split("/")[-1] for step in steps for id in step.ids}
    for one, other in itertools.combinations(ids.values(), 2):
        assert one and not one & other


@pytest.mark.parametrize("stage", ["base", "full", "policy"])
def test_a_stage_may_have_rows_of_its_own(tiny_run: Path, stage: str) -> None:
    for rows in (3, 6):
        config = tiny_config({f"stage_overrides.{stage}.batch_size": rows})
        (step,) = make_objective(config, stage, Workdir(tiny_run)).steps(0, 1)
        assert {len(array) for array in step.arrays.values()} == {rows}


def test_subsets_have_a_bit_for_every_slot_of_a_block(tmp_path: Path) -> None:
    pattern = {"model.pattern": ("text", "self", "cross", "self"), "model.text.num_layers": 8}
    config = tiny_config({**pattern, "stage_overrides.full.budgets": "subsets"})
    assert {len(budget_drawer(as_config(config), "full", Workdir(tmp_path))(step)) for step in range(4)} == {4}
