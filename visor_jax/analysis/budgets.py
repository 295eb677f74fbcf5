"""Accuracy of every task under every budget and the policy, as a heat map (VISOR paper, figure 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from visor_jax.analysis import drawing
from visor_jax.analysis.base import Evaluation, Row, Run, RunAnalysis
from visor_jax.report import figures
from visor_jax.report.facts import fixed_budgets, tasks_by_level


def names_of(evaluation: Evaluation) -> list[str]:
    """Returns the budgets, cheapest first, and "auto" if the run has a policy."""
    return fixed_budgets(dict(evaluation)) + ["auto"] * ("auto" in evaluation["budgets"])


def rows(run: Run) -> list[Row]:
    """Returns one row per task and budget."""
    evaluation = run.evaluation
    return [
        {"task": task, "level": level, "budget": name, "accuracy": accuracy}
        for task, level in tasks_by_level(dict(evaluation))
        for name in names_of(evaluation)
        if (accuracy := evaluation["budgets"][name]["tasks"].get(task)) is not None
    ]


@figures.styled
def draw(run: Run, table: Sequence[Row]) -> Figure:
    """Draws tasks by budgets."""
    names = names_of(run.evaluation)
    tasks = list(dict.fromkeys((row["task"], row["level"]) for row in table))
    values = np.full((len(tasks), len(names)), np.nan)
    for row in table:
        values[tasks.index((row["task"], row["level"])), names.index(row["budget"])] = 100 * row["accuracy"]
    figure, axes = drawing.heat_map(values, tasks, "right answers, %", most=100)
    axes.set_xticks(range(len(names)), names, rotation=0 if len(names) < 6 else 90)
    axes.set_xlabel("budget: the self-attention slots that are on")
    axes.set_title("Right answers by task and budget")
    return figure


ANALYSIS = RunAnalysis("budgets", rows, draw)
