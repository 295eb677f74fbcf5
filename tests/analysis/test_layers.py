"""Layers by task: means, clusters, and the questions that count."""

from __future__ import annotations

import numpy as np
import pytest

from visor_jax.analysis.dense import MEASURES, cluster_tasks, layer_table


def test_tasks_that_lose_sight_at_a_cost_are_sensitive() -> None:
    accuracy = {"color": 1.0, "kind": 0.9, "cell": 0.9, "row": 0.8}
    without = {"color": [0.9, 1.0], "kind": [0.9, 0.9], "cell": [0.1, 0.2], "row": [0.0, 0.3]}
    found = cluster_tasks(accuracy, {task: np.array(values) for task, values in without.items()})
    assert found == {"color": "robust", "kind": "robust", "cell": "sensitive", "row": "sensitive"}
    assert cluster_tasks({"a": 1.0, "b": 0.0}, {"a": np.zeros(2), "b": np.zeros(2)}) == {}


def test_equal_tasks_are_one_cluster() -> None:
    same = dict.fromkeys("abc", np.array([0.5, 0.5]))
    assert set(cluster_tasks(dict.fromkeys("abc", 1.0), same).values()) == {"robust"}


def test_means_are_of_each_task_without_what_is_not_a_number() -> None:
    values = {name: np.array([[1.0, np.nan, 0.0], [0.5, 0.5, 1.0]]) for name in MEASURES}
    table = layer_table(["a", "a", "b"], np.array([True, False, True]), values, {"a": "easy"})
    assert (table.num_layers, table.samples, table.levels) == (2, {"a": 2, "b": 1}, {"a": "easy", "b": ""})
    assert table.accuracy == {"a": 0.5, "b": 1.0}
    assert table.measures["cka_first"]["a"].tolist() == [1.0, 0.5]
    assert table.measures["contribution"]["b"] == pytest.approx([0.0, 1.0])
