"""Prints the result of an evaluation as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from visor_jax.data.controls import CONTROLS
from visor_jax.data.source_kind import LEVELS
from visor_jax.errors import printable


def print_budgets(result: Mapping[str, Any]) -> None:
    """Prints a table of accuracy and cost of every budget, after those of tasks, kinds and controls if there are any.

    Accuracies of levels carry half the width of their 95 % interval.
    """
    print_tasks(result)
    print_kinds(result)
    print_controls(result)
    dense, rows = result["dense"], []
    unit, factor = flops_unit(row["decoder_gflops"] for row in result["budgets"].values())
    for name, row in result["budgets"].items():
        saving = dense["decoder_gflops"] / row["decoder_gflops"], dense["end_to_end_gflops"] / row["end_to_end_gflops"]
        costs = [f"{row['decoder_gflops'] * factor:.2f}", f"{saving[0]:.2f}x", f"{saving[1]:.2f}x"]
        rows.append([name, *accuracies(result, "budgets", name), *costs])
    title = f"{result['benchmark']}, {result['split']} split: {row['samples']} questions"
    columns = ["budget", *accuracy_columns(result), f"decoder {unit}", "saving, decoder", "saving, end to end"]
    print_table(title, columns, rows)


def print_benchmarks(result: Mapping[str, Any]) -> None:
    """Prints the reported numbers of each benchmark by budget, then accuracy and cost of every budget."""
    for name, of_one in result["benchmarks"].items():
        budgets = of_one["budgets"]
        metrics = next(iter(budgets.values()))["metrics"]
        rows = [[metric, *(reported(row["metrics"][metric]) for row in budgets.values())] for metric in metrics]
        asked, problems = of_one["questions"], sum(of_one["problems"].values())
        wrong = f", of which {problems} could not be asked and count as wrong" if problems else ""
        title = f"{name}, {of_one['split']}: {asked['asked']} of {asked['of']} questions{wrong}"
        print_table(title, ["metric", *budgets], rows)
    print_budgets(result)


def reported(value: float) -> str:
    """0.5678 -> "0.568"; a sum, such as those of MME and OCRBench, 1238.46 -> "1238.5"."""
    return f"{value:.3f}" if value <= 1 else f"{value:.1f}"


def print_controls(result: Mapping[str, Any]) -> None:
    """Prints the accuracy of every budget about gray pictures and about those of other questions, if measured."""
    rows, samples = [], 0
    for control in CONTROLS:
        for name, row in result.get(control, {}).items():
            rows.append([control, name, *accuracies(result, control, name)])
            samples = max(samples, row["samples"])
    if rows:
        title = f"without the right picture: {samples} questions"
        print_table(title, ["picture", "budget", *accuracy_columns(result)], rows)


def print_tasks(result: Mapping[str, Any]) -> None:
    """Prints accuracy by task and budget, tasks in the order of their levels, if there are several."""
    levels, budgets = result["levels"], result["budgets"]
    order = {level: place for place, level in enumerate((*LEVELS, ""))}
    tasks = dict.fromkeys(task for row in budgets.values() for task in row["tasks"])
    if len(tasks) < 2:
        return
    intervals, rows = result.get("intervals", {}).get("budgets", {}), []
    for task in sorted(tasks, key=lambda task: order.get(levels.get(task, ""), len(order))):
        values = [
            percent(row["tasks"].get(task), intervals.get(name, {}).get("tasks", {}).get(task))
            for name, row in budgets.items()
        ]
        rows.append([task, levels.get(task, ""), *values])
    print_table("right answers by task, %", ["task", "level", *budgets], rows)


def print_kinds(result: Mapping[str, Any]) -> None:
    """Prints accuracy by kind of picture, at the budget with the most FLOPs, if the source has kinds."""
    costs = {name: row["decoder_gflops"] for name, row in result["budgets"].items() if name != "auto"}
    levels, budget = shown_levels(result), max(costs or result["budgets"], key=lambda name: costs.get(name, 0))
    rows = []
    for kind, row in result.get("kinds", {}).items():
        of_kind = row["budgets"][budget]
        values = [of_kind.get(level) for level in levels] or [mean(of_kind["tasks"].values())]
        rows.append([kind, str(row["samples"]), *map(percent, values)])
    if rows:
        print_table(f"by kind of picture, budget {budget}", ["kind", "questions", *accuracy_columns(result)], rows)


def shown_levels(result: Mapping[str, Any]) -> list[str]:
    """Returns the levels that a table has columns for: easy and hard, and middle if it was measured."""
    rows = result["budgets"].values()
    return [level for level in LEVELS if any(level in row for row in rows)] if result["levels"] else []


def accuracy_columns(result: Mapping[str, Any]) -> list[str]:
    """Returns the headings of `accuracies`."""
    return [f"{level} %" for level in shown_levels(result)] or ["right %"]


def accuracies(result: Mapping[str, Any], group: str, name: str) -> list[str]:
    """Returns the accuracies of one budget as text: by level, or the mean over tasks if there are no levels.

    Args:
      group: "budgets", "blind" or "shuffled".
      name: of the budget.
    """
    row, intervals = result[group][name], result.get("intervals", {}).get(group, {}).get(name, {})
    levels = shown_levels(result)
    return [percent(row.get(level), intervals.get(level)) for level in levels] or [percent(mean(row["tasks"].values()))]


def percent(value: float | None, limits: Sequence[float] | None = None) -> str:
    """0.987 -> "98.7"; with the limits of an interval, "98.7±0.6", which is half its width."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f"±{50 * (limits[1] - limits[0]):.1f}" if limits else "")


def flops_unit(gflops: Iterable[float]) -> tuple[str, float]:
    """Returns the largest unit in which every number of GFLOPs is at least 1, and the factor that converts to it."""
    smallest = min(gflops)
    units = [("TFLOP", 1e-3), ("GFLOP", 1.0), ("MFLOP", 1e3)]
    return next(((name, factor) for name, factor in units if smallest * factor >= 1), units[-1])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table whose first column is aligned left and the others right."""

    def cell(text: str) -> Text:
        return Text(printable(text))  # not parsed as markup, which names of tasks may contain

    table = Table(title=cell(title))
    for index, column in enumerate(columns):
        table.add_column(cell(column), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(cell, row))
    Console().print(table)
