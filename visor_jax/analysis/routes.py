"""Which budget the policy picks for the questions of each task (VISOR paper, figure 7)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from visor_jax.analysis import drawing
from visor_jax.analysis.base import Row, Run, RunAnalysis
from visor_jax.report import figures
from visor_jax.report.facts import fixed_budgets, tasks_by_level


def rows(run: Run) -> list[Row]:
    """Returns one row per task and budget; none for a run without a policy."""
    routes = run.evaluation.get("routes") or {}
    return [
        {"task": task, "level": level, "budget": name, "share": float(routes[task].get(name, 0.0))}
        for task, level in tasks_by_level(dict(run.evaluation))
        if task in routes
        for name in fixed_budgets(dict(run.evaluation))
    ]


@figures.styled
def draw(run: Run, table: Sequence[Row]) -> Figure:
    """Draws the shares as stacked bars."""
    tasks = list(dict.fromkeys((row["task"], row["level"]) for row in table))
    figure, [axes] = figures.figure(1.5 + 0.27 * len(tasks))
    routes = {task: run.evaluation["routes"][task] for task, _ in tasks}
    figures.draw_shares(axes, routes, fixed_budgets(dict(run.evaluation)), tasks)
    axes.margins(y=0.01)
    axes.set_title("The budget that the policy picks")
    drawing.mark_levels(figure, axes, [level for _, level in tasks])
    return figure


ANALYSIS = RunAnalysis("routes", rows, draw)
