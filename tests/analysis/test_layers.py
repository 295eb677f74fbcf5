"""Averages by task, and the questions and models that are refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from visor_jax.analysis import layers
from visor_jax.analysis.layers import RIGHT, check_dense, check_inputs, layer_table
from visor_jax.architecture import Architecture, DroppingArchitecture
from visor_jax.config import architecture, as_config
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config

CONFIG = as_config(tiny_config())


def test_means_are_of_each_task_without_what_is_not_a_number() -> None:
    values = {RIGHT: np.array([[1.0, 0.0, 1.0]]), "cka_first": np.array([[1.0, np.nan, 0.0], [0.5, 0.5, 1.0]])}
    table = layer_table(["a", "a", "b"], values, {"a": "easy"})
    assert (table.num_layers, table.samples, table.levels) == (2, {"a": 2, "b": 1}, {"a": "easy", "b": ""})
    assert table.accuracy == {"a": 0.5, "b": 1.0}
    assert table.measures.keys() == {"cka_first"} and table.measures["cka_first"]["a"].tolist() == [1.0, 0.5]
    assert table.mean("cka_first").tolist() == [0.5, 0.75], "each task counts equally"


def model_of(arch: Architecture) -> Any:
    return SimpleNamespace(arch=arch, stage="policy", source="runs/one")


def test_an_adaptive_model_is_refused() -> None:
    check_dense(model_of(dataclasses.replace(architecture(CONFIG), plan="dense")))
    with pytest.raises(RequestError, match=r"runs/one: stage 'policy' has the plan 'visor'; .* with --model"):
        check_dense(model_of(architecture(CONFIG)))
    dropping = DroppingArchitecture("fastv", (1,), (0.5,))
    with pytest.raises(RequestError, match=r"has model\.dropping\.method='fastv'; .* without it"):
        check_dense(model_of(dataclasses.replace(architecture(CONFIG), plan="dense", dropping=dropping)))


def test_questions_for_another_model_are_refused() -> None:
    arch = architecture(CONFIG)
    check_inputs(CONFIG, arch, model_of(dataclasses.replace(arch, plan="dense")))
    for part, field, value in [("anyres", "packing", 4), ("vision", "patch_size", 5), ("text", "num_layers", 9)]:
        other = dataclasses.replace(arch, **{part: dataclasses.replace(getattr(arch, part), **{field: value})})
        with pytest.raises(RequestError, match=rf"--config: model\.{part}\.{field} of .* is {value}, and runs/one"):
            check_inputs(CONFIG, other, model_of(arch))


def test_scores_of_answers_weigh_accuracies_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark's score of the whole model's answer counts while the answer stays the same."""
    measures = {
        RIGHT: np.array([[1.0, 1.0]]),
        "accuracy_without": np.array([[1.0, 0.0]]),
        "cka": np.array([[0.5, 0.7]]),
    }
    monkeypatch.setattr(layers, "_batches", lambda *_: iter([(["a", "a"], ["0/0", "2/0"], measures)]))
    monkeypatch.setattr(layers, "check_dense", lambda _: None)
    monkeypatch.setattr(layers, "check_inputs", lambda *_: None)

    class Asked:
        arch = None

    table = layers.analyze_layers(CONFIG, None, Asked(), {}, [], scores=[0.4, 9.0, 1.0])  # type: ignore[arg-type]
    assert table.accuracy == {"a": pytest.approx(0.7)}
    assert table.measures["accuracy_without"]["a"] == pytest.approx([0.2])
    assert table.measures["cka"]["a"] == pytest.approx([0.6])
