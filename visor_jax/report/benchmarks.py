"""Builds what the page says of benchmarks and of further questions, of comparisons, and of how questions were asked.

In: results of `visor evaluate`. Out: texts that the templates write. Reported numbers keep their benchmark's units.
"""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.data.source_kind import LEVELS
from visor_jax.evaluate.intervals import shown_interval
from visor_jax.evaluate.tables import differences, reported
from visor_jax.report.accuracy import accuracy_cell, accuracy_table, cost_rows, timing_note
from visor_jax.report.examples import cards
from visor_jax.report.facts import Facts, fixed_budgets, mixed_accuracy, tasks_by_level
from visor_jax.report.numbers import MINUS
from visor_jax.report.results import BenchmarkResult, OtherResult, Row, mean_of_benchmarks

FEW = 4  # reported numbers that are shown without a fold


def benchmark_overview(facts: Facts) -> Row | None:
    """Builds the table of all benchmarks' headlines; None if the table of accuracies has them, or if there are none."""
    if not facts.on_own_data or not facts.benchmarks:
        return None
    means = mean_of_benchmarks(facts.benchmarks)
    return {**accuracy_table(means, tasks_by_level(means)), "confidence": means["intervals"]["confidence"]}


def benchmark_part(one: BenchmarkResult, colors: dict[str, str]) -> Row:
    """Builds the part of one benchmark: reported numbers, costs, problems, comparison, harness, examples."""
    result = one.result
    names = [*fixed_budgets(result), *(["auto"] if "auto" in result["budgets"] else [])]
    rows = metric_rows(one, names)
    return {
        **common_part(one),
        "level": one.level,
        "repository": one.repository,
        "file": one.file,
        **result["questions"],
        "budgets": names,
        "metrics": rows if len(rows) <= FEW else rows[:1],
        "more_metrics": [] if len(rows) <= FEW else rows[1:],
        "costs": cost_rows(result, names),
        "problems": sorted(result["problems"].items()),
        "examples": cards(result, one.pictures, [(one.name, one.level)], colors),
    }


def questions_part(one: OtherResult, colors: dict[str, str]) -> Row:
    """Builds the part of further questions, with the table that the run's own questions have."""
    result, tasks = one.result, tasks_by_level(one.result)
    table = accuracy_table(result, tasks)
    if not table["means"] and len(tasks) > 1:  # no task has a level
        means = [mixed_accuracy(result["budgets"][name], {}) for name in table["budgets"]]
        dense = accuracy_cell(mixed_accuracy(result["dense"], {})) if "tasks" in result["dense"] else None
        cells = [accuracy_cell(mean) for mean in means]
        table["means"] = [{"name": "mean of tasks", "level": "", "cells": cells, "dense": dense}]
    return {
        **common_part(one),
        "is_file": bool(result.get("file")),
        "source": result["benchmark"],
        "asked": next(iter(result["budgets"].values())).get("samples"),
        "skipped": sorted((reason, count) for reason, count in result.get("skipped", {}).items() if count),
        "table": table,
        "examples": cards(result, one.pictures, tasks, colors),
    }


def common_part(one: OtherResult) -> Row:
    """Builds what benchmarks and further questions have."""
    result = one.result
    return {
        "name": one.name,
        "split": result["split"],
        "stage": result.get("stage") or "",
        "partial": one.partial,
        "differing": one.differing,
        "timing": timing_note(result),
        "against": against_table(result),
        "harness": harness_rows(result),
    }


def metric_rows(one: BenchmarkResult, names: Sequence[str]) -> list[Row]:
    """Builds a row per reported number, the headline first, with its interval in the number's own unit."""
    budgets = one.result["budgets"]
    intervals = one.result["intervals"].get("budgets") or {}
    every = dict.fromkeys(metric for name in names for metric in budgets[name]["metrics"])
    rows = []
    for metric in sorted(every, key=lambda metric: metric != one.headline):
        cells = []
        for name in names:
            value, limits = budgets[name]["metrics"].get(metric), None
            if metric == one.headline:
                limits = intervals.get(name, {}).get("tasks", {}).get(one.name)
            shown = ""
            if value is not None and limits is not None:
                scale, decimals = one.headline_max, 3 if value <= 1 else 1  # as many as `reported` gives the value
                shown = shown_interval(value / scale, limits, decimals, scale)
            cells.append({"text": "" if value is None else reported(value), "limits": shown})
        rows.append({"name": metric, "headline": metric == one.headline, "cells": cells})
    return rows


def against_table(result: Row) -> Row | None:
    """Builds the table of paired differences from another run; None if there was no comparison.

    Returns:
      {"files", "rows", "more"}: of the means of levels, and of tasks if there are several.
    """
    against = result.get("against")
    if against is None:
        return None
    rows, more = [], []
    for name, of_budget in against["budgets"].items():
        tasks = of_budget["tasks"]
        levels = {f"{level} tasks": of_budget[level] for level in LEVELS if of_budget.get(level) and len(tasks) > 1}
        for part, figures, into in [
            *((part, figures, rows) for part, figures in levels.items()),
            *((part, figures, more if levels else rows) for part, figures in tasks.items()),
        ]:
            own, other, difference, p = differences(figures)
            texts = [own, other, difference.replace("-", MINUS), p]
            into.append({"budget": name, "other": of_budget["budget"], "of": part, "cells": texts})
    return {"files": against["files"], "rows": rows, "more": more}


def harness_rows(result: Row) -> list[tuple[str, str]]:
    """Returns (what, value) of how the questions were asked; [] for an evaluation by an earlier version."""
    harness = result.get("harness")
    if not harness:
        return []
    rows = [
        ("harness", harness["name"]),
        ("commit", harness.get("git_revision") or ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in harness["versions"].items())),
        ("decoding", harness["decoding"]),
        ("counts as right", harness.get("right") or ""),
        ("new tokens at most", str(harness.get("max_new_tokens") or "")),
        ("dtype", harness.get("dtype") or ""),
        ("system text", harness.get("system") or "(none)"),
        ("first prompt", harness["first_prompt"]),
    ]
    return [(what, value) for what, value in rows if value]
