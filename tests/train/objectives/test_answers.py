"""Objective "answer": what counts in a batch of conversations, and that every kind of conversation is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from visor_jax import testing
from visor_jax.config import architecture
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective
from visor_jax.train.objectives.answers import by_task, turn_correct
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


def test_a_turn_is_right_where_all_its_targets_are() -> None:
    correct = jnp.array([[True, False, True, True]])
    turns = jnp.array([[-1, 0, 0, 1, -1]])  # of the tokens; each is predicted from the one before
    assert turn_correct(correct, turns, 3).tolist() == [[False, True, True]], (
        "turns that a row does not have count as correct"
    )
