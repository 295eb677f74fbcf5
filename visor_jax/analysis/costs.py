"""Accuracy against decoder FLOPs: every budget, the policy, and its dial (VISOR paper, figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from visor_jax.analysis.base import Row, Run, RunAnalysis
from visor_jax.data.source_kind import LEVELS
from visor_jax.report import figures
from visor_jax.report.facts import mixed_accuracy

COSTS = ("decoder_gflops", "end_to_end_gflops")


def rows(run: Run) -> list[Row]:
    """Returns a row for every budget, for "auto" at every position of the dial, and those of a dense decoder."""
    evaluation, levels = run.evaluation, run.evaluation.get("levels") or {}
    table = [_row(name, "", row, mixed_accuracy(row, levels)) for name, row in evaluation.get("budgets", {}).items()]
    table += [_row("auto", point["dial"], point, point["accuracy"]) for point in evaluation.get("dial") or ()]
    if table:
        dense = evaluation["dense"]
        table.append(_row("dense", "", dense, mixed_accuracy(dense, levels)))
    return table


def _row(budget: str, dial: float | str, values: Mapping[str, Any], accuracy: float | None) -> Row:
    marks = {"accuracy": accuracy, **{level: values.get(level) for level in LEVELS}}
    numbers = {**marks, **{cost: values.get(cost) for cost in COSTS}}
    return {"budget": budget, "dial": dial, **{name: "" if x is None else x for name, x in numbers.items()}}


@figures.styled
def draw(run: Run, table: Sequence[Row]) -> Figure:
    """Draws the curve of the report, with the levels written beside the cheapest budget."""
    del table
    figure, [axes] = figures.figure(3.9)
    evaluation = dict(run.evaluation)
    figures.draw_cost_curve(axes, evaluation)
    axes.set_title("Right answers against the cost of the decoder")
    factor, _ = figures.flops_unit(evaluation["dense"]["decoder_gflops"])
    for level, series in figures.accuracy_series(evaluation).items():
        fixed = [name for name in series if name != "auto"]
        first = min(fixed, key=lambda name: evaluation["budgets"][name]["decoder_gflops"])
        place = evaluation["budgets"][first]["decoder_gflops"] * factor, series[first]
        axes.annotate(
            level, place, (-7, 0), textcoords="offset points", ha="right", va="center",
            color=figures.LEVELS[level], fontsize=8.5,
        )  # fmt: skip
    return figure


ANALYSIS = RunAnalysis("costs", rows, draw)
