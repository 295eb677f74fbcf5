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
from visor_jax.evaluate.intervals import shown_interval

SHOWN = ("visor-jax", "jax", "jaxlib", "python")  # packages whose versions are printed
MOST_ROWS = 60  # of the comparison by task; more are in the result only
WIDTH = 120  # characters of a line in a file or pipe
ALPHA = 0.05  # differences with a smaller p have a star


def print_budgets(result: Mapping[str, Any]) -> None:
    """Prints a table of accuracy and saving of every budget, after those of tasks, kinds, controls, costs and others.

    Accuracies of levels carry their 95 % interval.
    """
    print_harness(result)
    print_tasks(result)
    print_kinds(result)
    print_controls(result)
    print_costs(result)
    print_against(result)
    dense, rows = result["dense"], []
    unit, factor = flops_unit(row["decoder_gflops"] for row in result["budgets"].values())
    for name, row in result["budgets"].items():
        saving = dense["decoder_gflops"] / row["decoder_gflops"], dense["end_to_end_gflops"] / row["end_to_end_gflops"]
        costs = [f"{row['decoder_gflops'] * factor:.2f}", f"{saving[0]:.2f}x", f"{saving[1]:.2f}x"]
        rows.append([name, *accuracies(result, "budgets", name), *costs])
    if "tasks" in dense:  # the model that the run started from
        costs = [f"{dense['decoder_gflops'] * factor:.2f}", "1.00x", "1.00x"]
        rows.append(["dense", *accuracies(result, "dense"), *costs])
    title = f"{result['benchmark']}, {result['split']} split: {row['samples']} questions"
    columns = ["budget", *accuracy_columns(result), f"decoder {unit}", "saving, decoder", "saving, end to end"]
    print_table(title, columns, rows)


def print_benchmarks(result: Mapping[str, Any]) -> None:
    """Prints the reported numbers of each benchmark by budget, then accuracy and cost of every budget."""
    for name, of_one in result["benchmarks"].items():
        budgets, limits = of_one["budgets"], of_one["intervals"]["budgets"]
        metrics = next(iter(budgets.values()))["metrics"]
        rows = [[metric, *(reported(row["metrics"][metric]) for row in budgets.values())] for metric in metrics]
        ends = [limits[budget]["tasks"][name] for budget in budgets]
        rows.append(["95 % of headline, %", *(f"{100 * low:.1f} to {100 * high:.1f}" for low, high in ends)])
        columns, costs = cost_columns(of_one), [costs_of(of_one, budget) for budget in budgets]
        rows += [list(row) for row in zip(columns, *costs, strict=True)]
        asked, problems = of_one["questions"], sum(of_one["problems"].values())
        wrong = f", of which {problems} could not be asked and count as wrong" if problems else ""
        title = f"{name}, {of_one['split']}: {asked['asked']} of {asked['of']} questions{wrong}"
        print_table(title, ["metric", *budgets], rows)
        print_timing(of_one)
        print_prompt(name, of_one["harness"])
    print_budgets(result)


# --- costs ------------------------------------------------------------------------------------------------------------


def print_costs(result: Mapping[str, Any]) -> None:
    """Prints the costs of every budget, and of a dense decoder of the same shape."""
    rows = [[name, *costs_of(result, name)] for name in (*result["budgets"], "dense")]
    print_table("costs per question, up to the first new token", ["budget", *cost_columns(result)], rows)
    print_timing(result)


def cost_columns(result: Mapping[str, Any]) -> list[str]:
    """Returns the headings of `costs_of`."""
    columns = [heading for _, heading, _ in cost_fields(result)]
    columns += ["first token, ms", "tokens/s"] if "timing" in result else []
    return columns + (["chosen by auto, %"] if "shares" in result else [])


def cost_fields(result: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Returns (field, heading with unit, factor) of the costs that all rows of a result have."""
    rows = result["budgets"].values()
    fields = []
    for field, name in (("decoder_gflops", "decoder"), ("end_to_end_gflops", "end to end")):
        unit, factor = flops_unit(row[field] for row in rows)
        fields.append((field, f"{name} {unit}", factor))
    if all("cache_bytes" in row for row in rows):  # an earlier version did not count them
        large = min(row["cache_bytes"] for row in rows) >= 1e6
        fields.append(("cache_bytes", "cache MB" if large else "cache kB", 1e-6 if large else 1e-3))
    return fields


def costs_of(result: Mapping[str, Any], name: str) -> list[str]:
    """Returns the costs of one budget, or of "dense", as text; times are medians."""
    row = result["budgets"].get(name) or result["dense"]
    costs = [f"{row[field] * factor:.2f}" for field, _, factor in cost_fields(result)]
    if "timing" in result:
        times = result["timing"]["budgets"].get(name, {})
        first, speed = times.get("seconds_to_first_token"), times.get("tokens_per_second")
        costs += [f"{1e3 * first[1]:.1f}" if first else "-", f"{speed[1]:.1f}" if speed else "-"]
    if "shares" in result:
        costs.append(percent(None if name in ("auto", "dense") else result["shares"].get(name, 0.0)))
    return costs


def print_timing(result: Mapping[str, Any]) -> None:
    """Prints what the times of a result were measured on."""
    if timing := result.get("timing"):
        question = timing["question"]
        size = (
            f"{question['tiles']} tiles, {question['visual_tokens']} visual and {question['text_tokens']} text tokens"
        )
        print(
            f"times: one question of median length ({size}) on {timing['device']}, {timing['dtype']}, medians of"
            f" {timing['rounds']} rounds after a warm-up, {timing['new_tokens']} new tokens"
        )


# --- harness and comparison -------------------------------------------------------------------------------------------


def print_harness(result: Mapping[str, Any]) -> None:
    """Prints name and versions of the harness, and of own data the prompt of the first question."""
    harness = result.get("harness")
    if not harness:  # of an evaluation by an earlier version
        return
    versions = ", ".join(f"{name} {harness['versions'][name]}" for name in SHOWN if name in harness["versions"])
    revision = f", git {harness['git_revision']}" if harness["git_revision"] else ""
    print(f"harness: {harness['name']}{revision}; {versions}; {harness['decoding']}")
    if "benchmarks" not in result:
        print_prompt(result["benchmark"], harness)


def print_prompt(name: str, harness: Mapping[str, Any]) -> None:
    """Prints the prompt of the first question in one line, with its line ends as in Python."""
    limit = f"; at most {harness['max_new_tokens']} new tokens" if "max_new_tokens" in harness else ""
    print(f"{printable(name)}, first prompt{limit}: {harness['first_prompt']!a}")


def print_against(result: Mapping[str, Any]) -> None:
    """Prints how the accuracies differ from those of another run on the same questions, by level and by task."""
    against, rows = result.get("against"), []
    if against is None:
        return
    for name, of_budget in against["budgets"].items():
        tasks = of_budget["tasks"]
        parts = {level: of_budget[level] for level in LEVELS if level in of_budget and len(tasks) > 1}
        parts |= tasks if len(against["budgets"]) * len(tasks) <= MOST_ROWS else {}
        rows += [[name, of_budget["budget"], part, *differences(figures)] for part, figures in parts.items()]
    print(f"against {', '.join(against['files'])}:")
    columns = ["budget", "its budget", "of", "%", "its %", "difference (95 %)", "p"]
    print_table("paired differences on the same questions, percentage points", columns, rows)


def differences(figures: Mapping[str, float]) -> list[str]:
    """Returns the figures of a paired difference as text; a small p has a star."""
    difference, low, high = (f"{100 * figures[name]:+.1f}" for name in ("difference", "low", "high"))
    p = f"{figures['p']:.4f}" + ("*" if figures["p"] < ALPHA else "")
    return [percent(figures["accuracy"]), percent(figures["other"]), f"{difference} ({low} to {high})", p]


# --- tables of accuracies ---------------------------------------------------------------------------------------------


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


def accuracies(result: Mapping[str, Any], group: str, name: str = "") -> list[str]:
    """Returns the accuracies of one budget as text: by level, or the mean over tasks if there are no levels.

    Args:
      group: "budgets", "blind" or "shuffled"; "dense" is one row itself.
      name: of the budget.
    """
    row, intervals = result[group], result.get("intervals", {}).get(group, {})
    if name:
        row, intervals = row[name], intervals.get(name, {})
    levels = shown_levels(result)
    return [percent(row.get(level), intervals.get(level)) for level in levels] or [percent(mean(row["tasks"].values()))]


def percent(value: float | None, limits: Sequence[float] | None = None) -> str:
    """0.987 -> "98.7"; with the limits of an interval, "98.7 ±0.6" (`shown_interval`)."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" {shown_interval(value, limits)}" if limits else "")


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
    Console(width=None if Console().is_terminal else WIDTH).print(table)
