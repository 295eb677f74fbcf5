"""Drawing that several analyses share: curves over layers, heat maps, marks of levels, files.

In: a `LayerTable` or arrays. Out: matplotlib figures in the style of the report. Every picture has a white background
of its own, so that it stands on dark pages. Lines differ in dashes and markers and levels in the style of letters, not
in color alone, so that pictures can be printed in gray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from visor_jax.analysis.base import LayerTable
from visor_jax.report import figures

MARKERS = {"easy": "o", "middle": "s", "hard": "D", "": "o"}
LETTERS = {"easy": {"style": "italic"}, "middle": {}, "hard": {"weight": "bold"}, "": {}}
NAMES = {"easy": "easy tasks in italics", "middle": "middle plain", "hard": "hard bold"}
MOST_NUMBERS = 12  # columns of a heat map with numbers in its cells


class Curve(NamedTuple):
    """A column of a layer table as a curve: title and axis label; values are multiplied by `factor`."""

    column: str
    title: str
    label: str
    factor: float = 1.0


@figures.styled
def layer_curves(table: LayerTable, curves: Sequence[Curve]) -> Figure:
    """Draws columns against layers side by side; thin lines are tasks, thick ones the means of levels."""
    drawing, axes = figures.figure(3.6, width=5.2 * len(curves), columns=len(curves))
    for place, curve in zip(axes, curves, strict=True):
        of_tasks, thin = table.measures[curve.column], "one task"
        for level in [level for level in figures.LEVELS if level in table.levels.values()]:
            members = [values for task, values in of_tasks.items() if table.levels[task] == level]
            values = curve.factor * np.stack(members)
            color, style = figures.LEVELS[level], (figures.DASHES[level], MARKERS[level])
            for row in values if len(values) > 1 else ():
                place.plot(row, color=color, lw=0.6, alpha=0.45, label=thin)
                thin = "_nolegend_"
            place.plot(
                np.nanmean(values, axis=0), color=color, lw=2.2, ls=style[0], marker=style[1], ms=4.5,
                mec=figures.PAPER, mew=0.6, label=f"{level} tasks, mean" if level else "mean",
            )  # fmt: skip
        place.set_title(curve.title)
        place.set_xlabel("decoder layer")
        place.set_ylabel(curve.label)
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.margins(x=0.03)
    handles, labels = axes[0].get_legend_handles_labels()
    in_a_line = len(labels) if len(curves) > 1 else 2
    drawing.legend(handles, labels, loc="outside lower center", ncols=in_a_line, handlelength=3)
    return drawing


def heat_map(
    values: Float[np.ndarray, "tasks columns"], tasks: Sequence[tuple[str, str]], label: str, *, most: float
) -> tuple[Figure, Axes]:
    """Draws values as shades of gray, with their numbers if there are few columns.

    Args:
      tasks: (task, level) of each row.
      label: of the shades, with the unit.
      most: the value that is black; 0 and less is white.
    """
    rows, columns = values.shape
    drawing, [axes] = figures.figure(1.5 + 0.27 * max(rows, 5), width=max(figures.WIDTH, 2.8 + 0.4 * columns))
    shown = axes.imshow(values, aspect="auto", cmap="Greys", vmin=0.0, vmax=most)
    for (row, column), value in np.ndenumerate(values) if columns <= MOST_NUMBERS else ():
        if np.isfinite(value):
            color = figures.PAPER if value > most / 2 else figures.INK
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_yticks(range(rows), [figures.plain(task or "all") for task, _ in tasks])
    mark_levels(drawing, axes, [level for _, level in tasks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)
    drawing.colorbar(shown, ax=axes, label=label)
    return drawing, axes


def mark_levels(drawing: Figure, axes: Axes, levels: Sequence[str]) -> None:
    """Gives the names of tasks on the vertical axis the color and the letters of their levels, and says so."""
    for tick, level in zip(axes.get_yticklabels(), levels, strict=True):
        tick.set(color=figures.LEVELS.get(level, figures.INK), **LETTERS.get(level, {}))
    present = [NAMES[level] for level in NAMES if level in levels]
    if len(present) > 1:
        note = ", ".join(present)
        drawing.supxlabel(note, x=0.01, ha="left", fontsize=8.5, color=figures.FAINT)


def plain_ticks(axes: Axes) -> None:
    """Writes the ticks of logarithmic axes as plain numbers."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())


def message(text: str) -> Figure:
    """Draws a sentence in place of a picture that would be empty."""
    drawing, [axes] = figures.figure(1.2)
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center")
    return drawing
