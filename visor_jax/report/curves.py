"""Draws the training curves of the report: loss, accuracy and the losses of sources against step.

In: the rows of a stage's metrics. Out: SVG bytes of one figure each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from visor_jax.report.facts import Stage, slots_on
from visor_jax.report.figures import DASHES, FAINT, INK, LEVELS, SHADES, budget_colors, figure, plain, styled, svg
from visor_jax.report.results import Row

BINS = 50  # points of a curve


class Curve(NamedTuple):
    """A curve of at most `BINS` points: mean, minimum and maximum over each interval of steps."""

    steps: np.ndarray
    mean: np.ndarray
    least: np.ndarray
    largest: np.ndarray


def curve(rows: Sequence[Row], name: str) -> Curve:
    """Returns the curve of a field over intervals of equally many steps; ignores null and non-finite values."""
    values = np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None], float).reshape(-1, 2)
    values = values[np.isfinite(values[:, 1])]
    parts = np.array_split(values, min(BINS, len(values))) if len(values) else []
    points = [(p[:, 0].mean(), p[:, 1].mean(), p[:, 1].min(), p[:, 1].max()) for p in parts]
    return Curve(*np.array(points, float).reshape(-1, 4).T)


@styled
def loss_curve(stage: Stage) -> bytes:
    """Draws loss against step: one line with its range, or a line per budget if the budget varies."""
    drawing, [axes] = figure(2.5)
    curves = {name: curve(rows, "loss") for name, rows in by_budget(stage.rows).items()}
    colors = budget_colors(list(curves)) if len(curves) > 1 else dict.fromkeys(curves, INK)
    for name, line in curves.items():
        if len(curves) == 1:
            axes.fill_between(line.steps, line.least, line.largest, color=FAINT, alpha=0.2, lw=0)
        axes.plot(line.steps, line.mean, color=colors[name], label=name)
    values = np.concatenate([line.mean for line in curves.values()]) if curves else np.zeros(0)
    if len(values) and 0 < values.min() < values.max() / 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    finish_curve(axes, "loss, nats", legend=len(curves) > 1)
    return svg(drawing)


def by_budget(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups steps by budget, fewest slots first; more than eight budgets are grouped by number of slots."""
    names = sorted({row.get("budget", "") for row in rows}, key=lambda name: (slots_on(name), name))
    groups: dict[str, list[Row]] = {}
    for name in names:
        count = slots_on(name)
        group = name if len(names) <= 8 or np.isinf(count) else f"{count:.0f} slots on"
        groups.setdefault(group, []).extend(row for row in rows if row.get("budget", "") == name)
    return {group: sorted(members, key=lambda row: row["step"]) for group, members in groups.items()}


ACCURACY = "accuracy/"


def accuracies_of(stage: Stage) -> list[str]:
    """Returns the accuracy fields of the stage's rows."""
    return list(dict.fromkeys(name for row in stage.rows for name in row if name.startswith(ACCURACY)))


MAX_TASKS = 12  # curves with names of their own; of more, the means of levels have names


@styled
def accuracy_curve(stage: Stage, tasks: Sequence[tuple[str, str]]) -> bytes:
    """Draws the training accuracy against step: of each task, or with many tasks thin lines and the means of levels."""
    fields = accuracies_of(stage)
    named = {field.removeprefix(ACCURACY) for field in fields}
    levels = dict(tasks) if named <= dict(tasks).keys() else {}  # otherwise they are not tasks
    order = {task: place for place, (task, _) in enumerate(tasks)}
    fields.sort(key=lambda field: order.get(field.removeprefix(ACCURACY), len(order)))
    by_level: dict[str, list[str]] = {}
    for field in fields:
        by_level.setdefault(levels.get(field.removeprefix(ACCURACY), ""), []).append(field)
    means = len(fields) > MAX_TASKS and "" not in by_level
    lines = len(by_level) if means else len(fields)
    drawing, [axes] = figure(2.5 + 0.19 * max(0, -(-lines // 4) - 1))
    for level, members in by_level.items():
        if means:
            draw_level(axes, stage, level, members)
            continue
        for place, field in enumerate(members):
            line = curve(stage.rows, field)
            color = SHADES[level](place / (len(members) - 1) if len(members) > 1 else 1.0)
            name = field.removeprefix(ACCURACY).replace("_", " ")
            axes.plot(line.steps, 100 * line.mean, color=color, label=plain(name), lw=1.3)
    axes.set_ylim(-2, 102)
    finish_curve(axes, "right, %", legend=True)
    return svg(drawing)


def draw_level(axes: Axes, stage: Stage, level: str, fields: Sequence[str]) -> None:
    """Draws a thin line for each of a level's tasks, and the mean over those that each batch has."""
    for field in fields:
        line = curve(stage.rows, field)
        axes.plot(line.steps, 100 * line.mean, color=LEVELS[level], lw=0.6, alpha=0.3)
    present = [(row["step"], [row[field] for field in fields if row.get(field) is not None]) for row in stage.rows]
    line = curve([{"step": step, "mean": float(np.mean(values))} for step, values in present if values], "mean")
    label = f"{level} tasks, mean of {len(fields)}"
    axes.plot(line.steps, 100 * line.mean, color=LEVELS[level], lw=2.2, ls=DASHES[level], label=label)


SOURCE, MAX_SOURCES = "loss/source=", 8


def sources_of(stage: Stage) -> list[str]:
    """Returns the source fields of the stage's rows: those in most steps, at most `MAX_SOURCES`."""
    counts = Counter(name for row in stage.rows for name in row if name.startswith(SOURCE))
    return [name for name, _ in counts.most_common(MAX_SOURCES)]


@styled
def source_curve(stage: Stage) -> bytes:
    """Draws the loss of each source of a mixture against step."""
    drawing, [axes] = figure(2.5)
    for field in sources_of(stage):
        line = curve(stage.rows, field)
        axes.plot(line.steps, line.mean, label=plain(field.removeprefix(SOURCE)), lw=1.3)
    axes.set_ylim(bottom=0)
    finish_curve(axes, "loss by source, nats", legend=True)
    return svg(drawing)


def finish_curve(axes: Axes, label: str, *, legend: bool) -> None:
    """Adds labels and the legend to a training curve."""
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.01)
    if legend:
        names = axes.get_legend_handles_labels()[1]
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=min(4, max(len(names), 1)),
            fontsize=8.5, handlelength=1.2, columnspacing=1.0, labelspacing=0.25, borderaxespad=0.2,
        )  # fmt: skip
