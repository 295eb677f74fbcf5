"""Objective "answer": what counts in a batch of conversations, and that every kind of conversation is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from visor_jax import testing
from visor_jax.config import architecture, as_config
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective
from visor_jax.train.objectives.answers import abstract_answers, by_task, turn_correct
from visor_jax.workdir.folder import Workdir


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
    row = objective.summarize(
        step, {"turn_correct": np.ones((4, 2), bool), "target_tokens": 40, "samples": 4, "loss": 2.0}
    )
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


def test_independent_turns_are_trained_on_as_questions_asked_alone(tmp_path: Path) -> None:
    """A step's loss, accuracies and counts, packed or not, are those of a step on the turns as conversations."""
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    turns = [("Colour?", "red"), ("Digit?", "7"), ("Colour?", "blue")]

    def record(number: int, turns: list[tuple[str, str]]) -> dict[str, Any]:
        texts = [(who, text) for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
        talk = [{"from": who, "value": text} for who, text in texts]
        return {"id": str(number), "image": "a.png", "conversations": talk}

    (tmp_path / "together.json").write_text(json.dumps([record(i, turns) for i in range(4)]))
    (tmp_path / "alone.json").write_text(json.dumps([record(i, [turns[i % 3]]) for i in range(12)]))
    packing = {"data.pack_window": 4, "data.pool_rows": 2, "data.pool_tiles": 4, "data.visual_length": 80}
    losses, rows = [], []
    for path, independent, rows_per_step, more in (
        ("alone", False, 12, {}),
        ("together", True, 4, {}),
        ("together", True, 2, {**packing, "data.text_length": 128}),
    ):
        source = {"data.source": "llava", "data.root": str(tmp_path), "data.path": f"{path}.json", "stages": ("full",)}
        changes = {"data.independent_turns": independent, "data.turns_per_picture": 3, "data.test_fraction": 0.0}
        config = tiny_config({**source, **changes, "data.batch_size": rows_per_step, **more})
        objective = make_objective(config, "full", Workdir(tmp_path / "run"))
        step = next(iter(objective.steps(0, 1)))
        assert ("text_turns" in step.arrays) == independent
        params = testing.random_params(architecture(config))
        loss, metrics = testing.quick_jit(objective.loss)(params, step.arrays, jnp.array(step.budget))
        losses.append(float(loss))
        rows.append(objective.summarize(step, {**jax.tree.map(np.asarray, metrics), "loss": float(loss)}))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)
    assert [row["target_tokens"] for row in rows] == [rows[0]["target_tokens"]] * 3
    assert [row["samples"] for row in rows] == [12, 4, 4]
    assert all(row["accuracy/all"] == rows[0]["accuracy/all"] for row in rows)


def test_shapes_for_a_plan_are_those_of_a_step() -> None:
    config = as_config(tiny_config({"data.independent_turns": True, "data.text_length": 96}))
    step = next(iter(make_objective(config, "full", Workdir("unused")).steps(0, 1)))
    _, shapes = abstract_answers(config, "full")
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
        name: (x.shape, x.dtype) for name, x in step.arrays.items()
    }


def test_a_turn_is_right_where_all_its_targets_are() -> None:
    correct = jnp.array([[True, False, True, True]])
    turns = jnp.array([[-1, 0, 0, 1, -1]])  # of the tokens; each is predicted from the one before
    assert turn_correct(correct, turns, 3).tolist() == [[False, True, True]], (
        "turns that a row does not have count as correct"
    )
