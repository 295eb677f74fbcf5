"""Vision drop: columns against single passes, the shares that tasks lose, and their clusters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.analysis.conftest import ARCH, Case
from visor_jax.analysis.base import LayerTable
from visor_jax.analysis.vision_drop import ANALYSIS, clusters, lost_shares, measure


def test_columns_are_those_of_the_passes(case: Case) -> None:
    layers, whole, found = ARCH.text.num_layers, case.probe.effect(), measure(case.probe)
    assert found.keys() == ANALYSIS.columns.keys()
    for layer in range(layers):
        alone = case.probe.effect(dropped=[layer])
        from_on = case.probe.effect(dropped=range(layer, layers))
        assert found["accuracy_without"][layer].tolist() == alone.right.tolist()
        assert found["accuracy_without_from"][layer].tolist() == from_on.right.tolist()
        increase = whole.log_likelihood - alone.log_likelihood
        np.testing.assert_allclose(found["loss_increase"][layer], increase, rtol=1e-6)


def test_tasks_are_divided_by_the_share_that_they_lose(table: Callable[..., LayerTable]) -> None:
    """A task with few right answers that loses them all is sensitive, though it loses few points."""
    accuracy = {"color": 1.0, "kind": 0.9, "cell": 0.9, "two_step": 0.2}
    without = {"color": [0.9, 1.0], "kind": [0.9, 0.9], "cell": [0.0, 0.2], "two_step": [0.0, 0.02]}
    drop = table(accuracy, accuracy_without_from=without)
    assert lost_shares(drop)["two_step"] == pytest.approx([1.0, 0.9])
    assert clusters(drop) == {"color": "robust", "kind": "robust", "cell": "sensitive", "two_step": "sensitive"}
    assert ANALYSIS.task_facts(drop)["cell"] == {"cluster": "sensitive"}


def test_a_task_that_is_never_answered_is_in_no_cluster(table: Callable[..., LayerTable]) -> None:
    accuracy = {"a": 1.0, "b": 0.5, "c": 1.0, "never": 0.0}
    drop = table(accuracy, accuracy_without_from={"a": [0.0], "b": [0.5], "c": [1.0], "never": [0.0]})
    assert clusters(drop) == {"a": "sensitive", "b": "robust", "c": "robust"}
    assert ANALYSIS.task_facts(drop)["never"] == {"cluster": ""}


def test_few_or_equal_tasks_are_not_divided(table: Callable[..., LayerTable]) -> None:
    assert clusters(table({"a": 1.0, "b": 1.0}, accuracy_without_from={"a": [0.0], "b": [1.0]})) == {}
    same = table(dict.fromkeys("abc", 1.0), accuracy_without_from={task: [0.5, 0.5] for task in "abc"})
    assert set(clusters(same).values()) == {"robust"}


def test_a_model_that_answers_nothing_has_a_picture_that_says_so(table: Callable[..., LayerTable]) -> None:
    drawing = ANALYSIS.draw(table({"a": 0.0}, accuracy_without_from={"a": [0.0]}))
    assert "nothing to lose" in drawing.axes[0].texts[0].get_text()
