"""Draws the report's figures with matplotlib, without a display; contains all their styling.

In: numbers from the workdir. Out: SVG bytes of one figure each (and one PNG, for the README), deterministic. Task names
come from data sets and are drawn as plain text, never parsed as formulas.

Figures have about the width of a phone and are scaled up on larger screens, so that their text is legible on both.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from visor_jax.report.facts import fixed_budgets, mixed_accuracy
from visor_jax.report.results import Row

# --- style ------------------------------------------------------------------------------------------------------------

INK, FAINT, RULE, PAPER = "#22252b", "#6b7280", "#e3e6ea", "#ffffff"
# As in the contact sheet of `visor data preview`.
LEVELS = {"easy": "#2463b4", "middle": "#7a4fa3", "hard": "#b4471b", "": INK}
DASHES = {"easy": "--", "middle": "-.", "hard": "-", "": "-"}  # lines differ without their colors, too
BUDGETS = LinearSegmentedColormap.from_list("budgets", ["#c6e2d8", "#7fbfab", "#32896f", "#0d4439"])  # light: few slots
SHADES = {
    "easy": LinearSegmentedColormap.from_list("easy", ["#9cc3ee", "#17427a"]),
    "middle": LinearSegmentedColormap.from_list("middle", ["#cbb2e2", "#4a2a70"]),
    "hard": LinearSegmentedColormap.from_list("hard", ["#f0b48f", "#d8622c", "#5f2410"]),
    "": LinearSegmentedColormap.from_list("other", ["#a3abb8", "#d1a13a", "#3f8f8b", "#b04a7a", "#6d5aa8", "#2e2450"]),
}

WIDTH = 5.2  # inches

STYLE: dict[Any, Any] = {
    "figure.dpi": 72,
    "figure.constrained_layout.h_pad": 0.07,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "visor_jax",
}

styled = matplotlib.rc_context(STYLE)  # decorator of every function that draws


def budget_colors(names: Sequence[str]) -> dict[str, str]:
    """Returns a color for each budget; `names` are ordered by number of slots."""
    return {name: to_hex(BUDGETS(i / max(len(names) - 1, 1))) for i, name in enumerate(names)}


def plain(name: str, longest: int = 18) -> str:
    """Returns data set text for drawing: printable, one line, at most `longest` characters."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return text if len(text) <= longest else text[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def figure(height: float, width: float = WIDTH, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Creates a figure of `width` x `height` inches with axes side by side."""
    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(1, columns, squeeze=False)
    return drawing, list(axes[0])


def svg(drawing: Figure) -> bytes:
    """Returns a figure as SVG without metadata."""
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    return _saved(drawing, format="svg", metadata=nothing)


def png(drawing: Figure) -> bytes:
    """Returns a figure as PNG without metadata."""
    return _saved(drawing, format="png", dpi=170, metadata={"Software": None})


def _saved(drawing: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* missing from font")  # the browser has more fonts
        drawing.savefig(buffer, **options)
    return buffer.getvalue()


def flops_unit(gflops: float) -> tuple[float, str]:
    """Returns (factor, unit) to show a number of GFLOP as MFLOP, GFLOP or TFLOP."""
    return (1e3, "MFLOP") if gflops < 1 else (1e-3, "TFLOP") if gflops >= 1000 else (1.0, "GFLOP")


DIAL_GAP = 0.06  # of the axis; positions of the dial that are nearer share a mark

# --- accuracy against cost --------------------------------------------------------------------------------------------


@styled
def cost_curve(evaluation: Row) -> bytes:
    """Draws accuracy against decoder FLOPs: the fixed budgets, the dial, and the cost of a dense decoder."""
    drawing, [axes] = figure(3.7)
    draw_cost_curve(axes, evaluation)
    return svg(drawing)


@styled
def readme_picture(evaluation: Row, budgets: Sequence[str], tasks: Sequence[tuple[str, str]]) -> bytes:
    """Draws the cost curve and, if there are any, the routes next to it, as PNG."""
    routes = evaluation.get("routes")
    drawing, axes = figure(4.0, width=10.6 if routes else 5.6, columns=2 if routes else 1)
    draw_cost_curve(axes[0], evaluation)
    axes[0].set_title("What an answer costs, and how often it is right")
    if routes:
        draw_shares(axes[1], routes, budgets, tasks)
        axes[1].set_title("The budget that the policy picks for a question")
    return png(drawing)


def draw_cost_curve(axes: Axes, evaluation: Row) -> None:
    """Draws accuracy against decoder FLOPs into `axes`."""
    factor, unit = flops_unit(evaluation["dense"]["decoder_gflops"])
    names = fixed_budgets(evaluation)
    costs = [evaluation["budgets"][name]["decoder_gflops"] * factor for name in names]
    dense = evaluation["dense"]["decoder_gflops"] * factor
    lowest = 100.0
    for level, series in accuracy_series(evaluation).items():
        color = LEVELS[level]
        ys = [series[name] for name in names]
        axes.plot(costs, ys, "o", mfc=PAPER, mec=color, mew=1.5, ms=6, zorder=3)
        points = [(p["decoder_gflops"] * factor, p.get(level or "accuracy")) for p in evaluation.get("dial", ())]
        dial = [(cost, 100 * accuracy) for cost, accuracy in points if accuracy is not None]
        if dial:
            axes.plot(*zip(*dial, strict=True), "-", color=color, marker=".", ms=4, lw=1.4, alpha=0.75, zorder=2)
        if "auto" in series:
            auto = evaluation["budgets"]["auto"]["decoder_gflops"] * factor
            axes.plot([auto], [series["auto"]], "D", color=color, mec=PAPER, mew=0.8, ms=8, zorder=4)
        if (of_dense := evaluation["dense"].get(level)) is not None:
            axes.plot([dense], [100 * of_dense], "s", color=color, mec=PAPER, mew=0.8, ms=7, zorder=4)
        lowest = min([lowest, *ys, *(y for _, y in dial)])
    name_points(axes, evaluation, names, costs)
    axes.axvline(dense, color=FAINT, lw=1.2, ls=(0, (1, 2)))
    axes.annotate(
        f"a dense decoder:\n{dense:.3g} {unit}", (dense, 0.03), xycoords=("data", "axes fraction"), color=FAINT,
        xytext=(-5, 0), textcoords="offset points", ha="right", va="bottom", fontsize=8.5,
    )  # fmt: skip
    axes.set_ylim(max(min(lowest - 12, 85), -6), 102.5)
    axes.set_xscale("log")
    every = [*costs, dense, *(row["decoder_gflops"] * factor for row in evaluation.get("dial", ()))]
    axes.set_xlim(min(every) / 1.25, max(every) * 1.12)
    set_cost_ticks(axes)
    mark_dial(axes, evaluation, factor)
    axes.set_xlabel(f"decoder {unit} per question (log scale)")
    axes.set_ylabel("score, %" if "benchmarks" in evaluation else "right answers, %")
    curve_legend(axes, evaluation)


def accuracy_series(evaluation: Row) -> dict[str, dict[str, float]]:
    """Returns level -> budget -> accuracy in %; one series "" of all tasks if there are no levels."""
    budgets = evaluation["budgets"]
    by_level = {}
    for level in [level for level in LEVELS if level]:
        values = {name: row.get(level) for name, row in budgets.items()}
        if all(value is not None for value in values.values()):
            by_level[level] = {name: 100 * value for name, value in values.items()}
    if by_level:
        return by_level
    mixed = {name: mixed_accuracy(row, evaluation.get("levels", {})) for name, row in budgets.items()}
    return {"": {name: np.nan if value is None else 100 * value for name, value in mixed.items()}}


def name_points(axes: Axes, evaluation: Row, names: Sequence[str], costs: Sequence[float]) -> None:
    """Writes the fixed budgets' names below their lowest points; of more than eight, only the first and last."""
    series = accuracy_series(evaluation)
    shown = names if len(names) <= 8 else [names[0], names[-1]]
    same_cost: dict[float, list[str]] = {}
    for name, cost in zip(names, costs, strict=True):
        if name in shown:
            same_cost.setdefault(round(cost, 6), []).append(name)
    for cost, group in same_cost.items():
        group.sort(key=lambda name: -sum(values[name] for values in series.values()))
        low = min(values[name] for values in series.values() for name in group)
        axes.annotate(
            "\n".join(group), (cost, low), (0, -8), textcoords="offset points", ha="center", va="top", fontsize=8.5
        )


def set_cost_ticks(axes: Axes) -> None:
    """Sets ticks at 1, 1.5, 2, 3, 5, 7, 10, ... on the logarithmic axis, as plain numbers."""
    low, high = axes.get_xlim()
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = [d * m for d in decades for m in (1, 1.5, 2, 3, 5, 7) if low <= d * m <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def mark_dial(axes: Axes, evaluation: Row, factor: float) -> None:
    """Writes the dial's positions above its points; neighbors of about the same cost share a mark."""
    points = sorted((row["decoder_gflops"] * factor, row["dial"]) for row in evaluation.get("dial", ()))
    if not points:
        return
    low, high = np.log(axes.get_xlim())
    groups: list[list[tuple[float, float]]] = []
    for point in points:
        if groups and np.log(point[0] / groups[-1][0][0]) < DIAL_GAP * (high - low):
            groups[-1].append(point)
        else:
            groups.append([point])
    costs = [float(np.exp(np.mean([np.log(cost) for cost, _ in group]))) for group in groups]
    texts = [dial_text(sorted(position for _, position in group)) for group in groups]
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(FixedLocator(costs))
    top.xaxis.set_major_formatter(FixedFormatter(texts))
    top.xaxis.set_minor_locator(NullLocator())
    top.tick_params(labelsize=8.5, length=3, pad=2)
    top.set_xlabel("position of the dial", fontsize=8.5, loc="left")


def dial_text(positions: Sequence[float]) -> str:
    """Returns positions of the dial as text, one below the other."""
    return "\n".join(f"{position:+g}".replace("-", "\N{MINUS SIGN}") if position else "0" for position in positions)


def curve_legend(axes: Axes, evaluation: Row) -> None:
    """Draws the legend: colors for levels, markers for budgets."""
    handles, labels = [], []
    for level in accuracy_series(evaluation):
        handles += axes.plot([], [], "-", color=LEVELS[level], lw=4)
        labels.append(f"{level} tasks" if level else "all tasks")
    handles += axes.plot([], [], "o", mfc=PAPER, mec=FAINT, mew=1.5, ms=6)
    labels.append("a fixed budget")
    if "auto" in evaluation["budgets"]:
        handles += axes.plot([], [], "D", color=FAINT, mec=PAPER, ms=8)
        labels.append("auto")
    if "tasks" in evaluation["dense"]:
        handles += axes.plot([], [], "s", color=FAINT, mec=PAPER, ms=7)
        labels.append("dense, the start")
    if evaluation.get("dial"):
        handles += axes.plot([], [], "-", color=FAINT, marker=".", ms=4, lw=1.4)
        labels.append("auto, dial turned")
    dense = evaluation["dense"]["decoder_gflops"]
    factor, _ = flops_unit(dense)
    axes.legend(
        handles, labels, loc="center right", handlelength=1.4, labelspacing=0.4, borderaxespad=0.3, borderpad=0.2,
        bbox_to_anchor=(dense * factor, 0.42), bbox_transform=axes.get_xaxis_transform(),
    )  # fmt: skip


# --- shares by task ---------------------------------------------------------------------------------------------------

Shares = Mapping[str, Mapping[str, float]]  # task -> budget -> share or count


@styled
def shares(by_task: Shares, budgets: Sequence[str], tasks: Sequence[tuple[str, str]]) -> bytes:
    """Draws stacked bars: the share of each budget, by task.

    Args:
      by_task: shares or counts.
      budgets: all budgets, fewest slots first; determines the colors.
      tasks: (task, level) in display order; other tasks follow.
    """
    drawing, [axes] = figure(1.0 + 0.27 * len(by_task))
    draw_shares(axes, by_task, budgets, tasks)
    return svg(drawing)


def draw_shares(axes: Axes, by_task: Shares, budgets: Sequence[str], tasks: Sequence[tuple[str, str]]) -> None:
    """Draws the stacked bars into `axes`."""
    levels = dict(tasks)
    order = [task for task, _ in tasks if task in by_task] + [task for task in by_task if task not in levels]
    colors, ends = budget_colors(budgets), np.zeros(len(order))
    for name in [b for b in budgets if any(shares_.get(b) for shares_ in by_task.values())]:
        widths = np.array([100 * by_task[t].get(name, 0) / max(sum(by_task[t].values()), 1e-12) for t in order])
        axes.barh(range(len(order)), widths, left=ends, color=colors[name], height=0.74, label=name)
        for row in np.flatnonzero(widths >= 12).tolist():
            on_dark = is_dark(colors[name])
            text = PAPER if on_dark else INK
            center = (ends[row] + widths[row] / 2, row)
            axes.text(*center, f"{widths[row]:.0f}", color=text, ha="center", va="center", fontsize=8.5)
        ends += widths
    axes.set_yticks(range(len(order)), [plain(task or "all") for task in order])
    for tick, task in zip(axes.get_yticklabels(), order, strict=True):
        tick.set_color(LEVELS[levels.get(task, "")])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the task's questions")
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    below = axes.transAxes + ScaledTranslation(0, -0.5, axes.figure.dpi_scale_trans)  # below the axis' label
    axes.legend(
        handles, names, loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=min(5, max(len(names), 1)),
        handlelength=1, handleheight=1, columnspacing=1.2, borderaxespad=0, borderpad=0,
    )  # fmt: skip


def is_dark(color: str) -> bool:
    """Returns whether text on a "#rrggbb" background must be light."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140
