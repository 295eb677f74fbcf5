"""Draws an analysis with matplotlib, in the style of the report: PNG and SVG of each picture.

In: a `LayerTable`, rows of `tables.py`, or an evaluation. Out: figures. Colors are those of levels; every picture has
a white background of its own, so that it stands on dark pages, and differs in line style or lightness, so that it
can be printed in gray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from visor_jax.analysis.dense import CLUSTERS, LayerTable
from visor_jax.analysis.tables import Row
from visor_jax.files.read_write import write_bytes
from visor_jax.report import figures
from visor_jax.report.facts import fixed_budgets, tasks_by_level

DASHES = {"easy": "--", "middle": "-.", "hard": "-", "": "-"}


def save(folder: Path, name: str, drawing: Figure) -> None:
    """Writes a figure as PNG and SVG."""
    write_bytes(folder / f"{name}.png", figures.png(drawing))
    write_bytes(folder / f"{name}.svg", figures.svg(drawing))


@figures.styled
def layer_curves(table: LayerTable, curves: Sequence[tuple[str, str, str]]) -> Figure:
    """Draws measures against layers side by side; thin lines are tasks, thick ones the means of levels.

    Args:
      curves: (measure, title, label of the axis).
    """
    drawing, axes = figures.figure(3.4, width=5.0 * len(curves), columns=len(curves))
    for place, (measure, title, label) in zip(axes, curves, strict=True):
        of_tasks = table.measures[measure]
        for level in [level for level in figures.LEVELS if level in table.levels.values()]:
            rows = np.stack([values for task, values in of_tasks.items() if table.levels[task] == level])
            for row in rows:
                place.plot(row, color=figures.LEVELS[level], lw=0.6, alpha=0.35)
            place.plot(
                np.nanmean(rows, axis=0), color=figures.LEVELS[level], lw=2.4, ls=DASHES[level], marker="o", ms=4,
                label=f"{level} tasks" if level else "all tasks",
            )  # fmt: skip
        place.set_title(title)
        place.set_xlabel("decoder layer")
        place.set_ylabel(label)
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].legend()
    return drawing


@figures.styled
def vision_drop(table: LayerTable) -> Figure:
    """Draws the loss of accuracy if this and all later layers lose sight of the picture, tasks by layers."""
    mean = {task: np.mean(table.accuracy[task] - table.measures["accuracy_without_from"][task])
            for task in table.samples}  # fmt: skip
    order = sorted(mean, key=lambda task: (table.clusters.get(task, "") == CLUSTERS[1], mean[task]))
    losses = np.stack([100 * (table.accuracy[task] - table.measures["accuracy_without_from"][task]) for task in order])
    drawing, [axes] = figures.figure(1.3 + 0.25 * len(order), width=max(5.2, 2.6 + 0.4 * table.num_layers))
    heat_map(drawing, axes, losses, [(task, table.levels[task]) for task in order], "points of accuracy lost")
    axes.set_xlabel("first decoder layer without vision")
    first = sum(table.clusters.get(task, "") != CLUSTERS[1] for task in order)
    if 0 < first < len(order):
        axes.axhline(first - 0.5, color=figures.INK, lw=1.5)
        axes.set_title(f"{CLUSTERS[0]} above the line, {CLUSTERS[1]} below")
    return drawing


def heat_map(drawing: Figure, axes: Axes, values: np.ndarray, tasks: Sequence[tuple[str, str]], label: str) -> None:
    """Draws values [tasks, columns] with their numbers; names of tasks have the color of their level."""
    shown = axes.imshow(values, aspect="auto", cmap="Greys", vmin=min(0.0, np.nanmin(values)), vmax=np.nanmax(values))
    middle = (shown.norm.vmin + shown.norm.vmax) / 2
    if values.shape[1] <= 12:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = figures.PAPER if value > middle else figures.INK
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_yticks(range(len(tasks)), [figures.plain(task or "all") for task, _ in tasks])
    for tick, (_, level) in zip(axes.get_yticklabels(), tasks, strict=True):
        tick.set_color(figures.LEVELS.get(level, figures.INK))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)
    drawing.colorbar(shown, ax=axes, label=label)


@figures.styled
def budget_map(evaluation: Mapping[str, Any]) -> Figure:
    """Draws the accuracy of every task under every budget, as a heat map (paper, figure 6)."""
    names, tasks = fixed_budgets(dict(evaluation)), tasks_by_level(dict(evaluation))
    names += ["auto"] if "auto" in evaluation["budgets"] else []
    rows = [[evaluation["budgets"][name]["tasks"].get(task) for name in names] for task, _ in tasks]
    values = 100 * np.array([[np.nan if x is None else x for x in row] for row in rows], float)
    drawing, [axes] = figures.figure(1.3 + 0.25 * len(tasks), width=max(5.2, 2.6 + 0.5 * len(names)))
    heat_map(drawing, axes, values, tasks, "right answers, %")
    axes.set_xticks(range(len(names)), names, rotation=0 if len(names) < 6 else 90)
    axes.set_xlabel("budget")
    return drawing


@figures.styled
def route_shares(evaluation: Mapping[str, Any]) -> Figure:
    """Draws the share of each budget among the policy's choices, by task (paper, figure 7)."""
    routes = evaluation["routes"]
    drawing, [axes] = figures.figure(1.0 + 0.27 * len(routes))
    figures.draw_shares(axes, routes, fixed_budgets(dict(evaluation)), tasks_by_level(dict(evaluation)))
    return drawing


@figures.styled
def accuracy_against_cost(evaluation: Mapping[str, Any]) -> Figure:
    """Draws accuracy against decoder FLOPs (paper, figure 1)."""
    drawing, [axes] = figures.figure(3.7)
    figures.draw_cost_curve(axes, dict(evaluation))
    return drawing


@figures.styled
def cost_of_length(rows: Sequence[Row]) -> Figure:
    """Draws decoder FLOPs against the number of visual tokens, a line per budget (paper, figure 10)."""
    drawing, [axes] = figures.figure(3.6)
    names = list(dict.fromkeys(row["budget"] for row in rows))
    colors = {"dense": figures.FAINT, **figures.budget_colors([name for name in names if name != "dense"])}
    for name in names:
        points = [(row["visual_tokens"], row["decoder_gflops"]) for row in rows if row["budget"] == name]
        style = "--" if name == "dense" else "-"
        axes.plot(*zip(*points, strict=True), style, color=colors[name], marker="o", ms=3.5, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("visual tokens (log scale)")
    axes.set_ylabel("decoder GFLOP, log scale")
    axes.set_title(f"{rows[0]['text_tokens']} text tokens")
    axes.legend(ncols=1 + (len(names) > 5))
    return drawing
