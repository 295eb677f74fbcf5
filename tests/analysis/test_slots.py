"""The order of slots that a search should try."""

from __future__ import annotations

from collections.abc import Callable

from visor_jax import testing
from visor_jax.analysis.base import LayerTable
from visor_jax.analysis.slots import slot_rows
from visor_jax.budget import Plan

ARCH = testing.tiny_architecture(10)
LAYERS = Plan.of(ARCH).slots  # 2, 5, 8


def test_slots_are_ordered_by_contribution_of_their_layers(table: Callable[..., LayerTable]) -> None:
    """Each task counts equally; layers that are no slots do not count."""
    contribution = {"a": [9, 9, 1, 9, 9, 4, 9, 9, 2, 9], "b": [9, 9, 1, 9, 9, 0, 9, 9, 4, 9]}
    loss = {task: list(range(10)) for task in "ab"}
    measured = table({"a": 1.0, "b": 1.0}, loss_increase=loss, contribution=contribution)
    assert slot_rows(measured, ARCH) == [
        {"rank": 0, "slot": 2, "layer": 8, "contribution": 3.0, "loss_increase": 8.0},
        {"rank": 1, "slot": 1, "layer": 5, "contribution": 2.0, "loss_increase": 5.0},
        {"rank": 2, "slot": 0, "layer": 2, "contribution": 1.0, "loss_increase": 2.0},
    ]


def test_vision_drop_orders_them_where_contribution_was_not_measured(table: Callable[..., LayerTable]) -> None:
    loss = table({"a": 1.0}, loss_increase={"a": [5, 5, 2, 5, 5, 2, 5, 5, 3, 5]})
    assert [row["slot"] for row in slot_rows(loss, ARCH)] == [2, 0, 1], "equal ones keep their order"
    assert slot_rows(table({"a": 1.0}, cka_first={"a": [0.0] * 10}), ARCH) == []
    dense = testing.tiny_architecture(10, plan="dense")
    assert slot_rows(loss, dense) == []
