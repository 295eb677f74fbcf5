"""What stages feed the loop: budgets and batches as pure functions of (seed, stage, step)."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visor_jax import testing
from visor_jax.budget import all_subsets
from visor_jax.config import architecture
from visor_jax.data.collate import encode_example
from visor_jax.data.from_config import glyphs_source, make_tokenizer
from visor_jax.data.glyphs import render as glyphs_render
from visor_jax.data.glyphs.source import TASKS
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective
from visor_jax.train.objectives.answers import by_task
from visor_jax.train.objectives.glyphs_base import WORDS_AFTER, name_tables, reading_arrays
from visor_jax.train.objectives.policy import RARE, balance
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
    of = budget_drawer(tiny_config(), "universal", Workdir(tiny_run))
    assert {of(step) for step in range(200)} == set(read_viable(Workdir(tiny_run)))


def test_universal_without_a_search_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="run the search first"):
        make_objective(tiny_config(), "universal", Workdir(tmp_path))


def test_full_and_base_budgets(tmp_path: Path) -> None:
    config = tiny_config()
    full, base = (budget_drawer(config, stage, Workdir(tmp_path)) for stage in ("full", "base"))
    assert {full(step) for step in range(9)} == {(True, True)}
    assert {base(step) for step in range(200)} == {(True, True), (True, False), (False, True)}


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


def test_accuracy_by_task_counts_turns() -> None:
    correct = np.array([[True, False], [True, True]])
    assert by_task(correct, [["bg", "card"], ["bg"]]) == {"bg": 1.0, "card": 0.0}
    assert by_task(correct, [["", ""], [""]]) == {"all": pytest.approx(2 / 3)}


def test_conversations_may_have_more_turns_than_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    talk = [{"from": who, "value": text} for _ in range(5) for who, text in (("human", "Colour?"), ("gpt", "red"))]
    talk[0]["value"] = "<image>\nColour?"
    records = [{"id": str(i), "image": "a.png", "conversations": talk} for i in range(8)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    changes = {"data.source": "llava", "data.root": str(tmp_path), "data.path": "set.json", "stages": ("full",)}
    config = tiny_config({**changes, "data.text_length": 128, "data.test_fraction": 0.0})
    objective = make_objective(config, "full", Workdir(tmp_path / "run"))
    step = next(iter(objective.steps(0, 1)))
    assert len(step.tasks[0]) == 5 and step.arrays["turn_index"].max() == 4, "all turns are trained on"
    row = objective.summarise(step, {"turn_correct": np.ones((4, 2), bool), "target_tokens": 40})
    assert row["accuracy/all"] == 1.0


@pytest.mark.parametrize("pictures", [(0, 2), ()], ids=["mixed", "none"])
def test_batches_with_conversations_about_no_picture_are_trained_on(tmp_path: Path, pictures: tuple[int, ...]) -> None:
    """One step's loss is that of its rows, gradients are finite, and those of the pictures' side come from pictures."""
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "Color?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(i), "conversations": talk, **({"image": "a.png"} if i in pictures else {})} for i in range(4)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    changes = {"data.source": "llava", "data.root": str(tmp_path), "data.path": "set.json", "stages": ("full",)}
    config = tiny_config({**changes, "data.test_fraction": 0.0})
    objective = make_objective(config, "full", Workdir(tmp_path / "run"))
    step = next(iter(objective.steps(0, 1)))
    params = testing.random_params(architecture(config))
    value = testing.quick_jit(jax.value_and_grad(lambda p, b: objective.loss(p, b, jnp.array(step.budget))[0]))
    loss, gradients = value(params, step.arrays)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, gradients)))
    seen = any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["vision"]))
    assert seen == bool(pictures)
    blank = {**step.arrays, "tiles": 255 - step.arrays["tiles"]}
    assert (float(value(params, blank)[0]) != float(loss)) == bool(pictures)


def test_base_refuses_data_and_patches_it_has_no_labels_for(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="patch_size=4: stage base needs 8"):
        make_objective(
            tiny_config({"model.vision.patch_size": 4, "data.visual_length": 145}), "base", Workdir(tmp_path)
        )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=200), st.floats(0, 1))
def test_balance_lifts_what_is_rarer_and_never_by_more_than_rarity_allows(labels: list[int], strength: float) -> None:
    found = np.array(labels)
    weights, counts = balance(found, 4, strength), np.bincount(found, minlength=4)
    assert weights.mean() == pytest.approx(1.0, rel=1e-4)
    by_label = {label: weights[found == label][0] for label in set(labels)}
    for one, other in itertools.product(by_label, repeat=2):
        if counts[one] <= counts[other]:
            assert by_label[one] >= by_label[other] * (1 - 1e-5)
    assert max(by_label.values()) <= min(by_label.values()) * (1 + 1 / RARE) ** strength * (1 + 1e-5)


def test_budgets_of_more_than_an_even_share_weigh_alike() -> None:
    weights = balance(np.repeat([0, 1, 3], [60, 50, 10]), 4, 2.4)
    assert weights[0] == weights[60] and weights[-1] > 5 * weights[0]


def test_caution_lifts_whatever_looks_more_than_the_cheapest_budget() -> None:
    labels = np.repeat([0, 1, 3], [60, 50, 10])
    plain, cautious = (balance(labels, 4, 1.0, caution) for caution in (1.0, 1.5))
    lifted = cautious / plain
    assert lifted[labels > 0] == pytest.approx(1.5 * lifted[0], rel=1e-5)


def test_words_stand_around_the_picture_of_a_base_grid(tmp_path: Path) -> None:
    step = next(iter(make_objective(tiny_config(), "base", Workdir(tmp_path)).steps(0, 1)))
    arrays = step.arrays
    order = np.sort(np.concatenate([arrays["visual_positions"], arrays["text_positions"]], axis=1), axis=1)
    assert (order == np.arange(order.shape[1])).all(), "every place in the sequence is taken once"
    after = arrays["text_tokens"][:, -WORDS_AFTER:]
    assert len(np.unique(after)) > WORDS_AFTER, "words differ from row to row"
    assert (arrays["text_positions"][:, -WORDS_AFTER:] > arrays["visual_positions"].max()).all()


def test_what_a_question_asks_about_stands_where_its_answer_begins(tmp_path: Path) -> None:
    """Each question's last name, however it is worded; nothing at other tokens or of questions without a name."""
    config, tokenizer = tiny_config(), make_tokenizer(tiny_config())
    names = name_tables(tokenizer)["asked"]
    words = [*glyphs_render.LETTERS, *glyphs_render.COLOURS]
    sources = {task: glyphs_source(config, "train", tasks=(task,), turns_per_picture=2) for task in TASKS}
    for task, source in sources.items():
        example = encode_example(source[3], tokenizer, architecture(config))
        arrays = reading_arrays(example, names, len(example.text_tokens) + 3)
        assert all(len(array) == len(example.text_tokens) + 3 for array in arrays.values())
        starts = [place for place in np.flatnonzero(example.turn_index >= 0) if example.turn_index[place - 1] < 0]
        for place, turn in zip(starts, source[3].turns, strict=True):
            said = [word for word in re.findall(r"[A-Za-z]+", turn.question) if word in words]
            expected = 1 + words.index(said[-1]) if said else 0
            assert arrays["asked"][place - 1] == expected, (task, turn.question)
            assert bool(said) == (task not in ("bg", "digit", "shape")), turn.question
        others = np.setdiff1d(np.arange(len(arrays["asked"])), np.array(starts) - 1)
        assert not arrays["asked"][others].any()
        cut = reading_arrays(example, names, 5)
        assert all((cut[name] == arrays[name][:5]).all() and len(cut[name]) == 5 for name in arrays)


def test_labels_weigh_as_label_balance_says(tiny_run: Path) -> None:
    for strength in (0.0, 1.0):
        config = tiny_config({"stage_overrides.policy.label_balance": strength})
        steps = list(make_objective(config, "policy", Workdir(tiny_run)).steps(0, 4))
        labels = np.concatenate([step.arrays["label"] for step in steps])
        weights = np.concatenate([step.arrays["label_weight"] for step in steps])
        assert all(len(set(weights[labels == label].tolist())) == 1 for label in set(labels.tolist()))
        if strength == 0.0:
            assert (weights == 1).all()


@pytest.mark.parametrize("stage", ["base", "full", "policy"])
def test_a_stage_may_have_rows_of_its_own(tiny_run: Path, stage: str) -> None:
    for rows in (3, 6):
        config = tiny_config({f"stage_overrides.{stage}.batch_size": rows})
        (step,) = make_objective(config, stage, Workdir(tiny_run)).steps(0, 1)
        assert {len(array) for array in step.arrays.values()} == {rows}
