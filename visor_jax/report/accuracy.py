"""Builds the tables of accuracies and costs from an evaluation: by task, level, control, kind and position of the dial.

In: the object of `eval/test.json`, or of a benchmark. Out: texts and shades that the templates write.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from visor_jax.data.source_kind import LEVELS
from visor_jax.evaluate.intervals import shown_interval
from visor_jax.report import figures
from visor_jax.report.facts import fixed_budgets, mixed_accuracy
from visor_jax.report.numbers import DASH, MINUS, TIMES, counted, flops, percent, points, shade, times
from visor_jax.report.results import Row


def headline(evaluation: Row) -> Row:
    """Summarizes "auto" against "full" if both were evaluated, otherwise the most expensive budget."""
    budgets, dense, levels = evaluation["budgets"], evaluation["dense"], evaluation.get("levels", {})
    name = "auto" if "auto" in budgets else fixed_budgets(evaluation)[-1]
    row, full = budgets[name], budgets.get("full") if name == "auto" else None
    accuracy, reference = mixed_accuracy(row, levels), full and mixed_accuracy(full, levels)
    by_level = [
        {
            "level": level,
            "own": percent(row[level]),
            "full": full and percent(full.get(level)),
            "dense": percent(dense[level]) if dense.get(level) is not None else None,
        }
        for level in LEVELS
        if row.get(level) is not None
    ]
    return {
        "budget": name,
        "accuracy": percent(accuracy),
        "full_accuracy": reference and percent(reference),
        "difference": points(accuracy - reference) if accuracy is not None and reference is not None else None,
        "levels": by_level,
        "share": full and f"{100 * row['decoder_gflops'] / full['decoder_gflops']:.0f}",
        "decoder_saving": times(dense["decoder_gflops"] / row["decoder_gflops"]),
        "end_to_end_saving": times(dense["end_to_end_gflops"] / row["end_to_end_gflops"]),
        "samples": row.get("samples"),
    }


def is_dense(evaluation: Row) -> bool:
    """Returns whether the evaluated model is dense, perhaps on fewer visual tokens.

    Results of earlier versions do not say so: there, whether its only budget has the cost of a dense decoder.
    """
    if "plan" in evaluation:
        return evaluation["plan"] == "dense"
    costs = [row["decoder_gflops"] for row in evaluation["budgets"].values()]
    return len(costs) == 1 and math.isclose(costs[0], evaluation["dense"]["decoder_gflops"], rel_tol=1e-9)


def accuracy_table(evaluation: Row, tasks: Sequence[tuple[str, str]]) -> Row:
    """Builds a row per task and a column per budget, then the levels' means, costs and savings.

    The cell of the dense model is None where it was not asked.
    """
    dense, of_dense = evaluation["dense"], evaluation.get("intervals", {}).get("dense") or {}
    names = [*fixed_budgets(evaluation), *(["auto"] if "auto" in evaluation["budgets"] else [])]
    rows = [evaluation["budgets"][name] for name in names]
    limits = [evaluation.get("intervals", {}).get("budgets", {}).get(name) or {} for name in names]

    def cells(values: Sequence[float | None], intervals: Sequence[Sequence[float] | None]) -> list[Row]:
        return [accuracy_cell(value, own) for value, own in zip(values, intervals, strict=True)]

    by_task = [
        {
            "name": task or "all",
            "level": level,
            "cells": cells(
                [row["tasks"].get(task) for row in rows], [own.get("tasks", {}).get(task) for own in limits]
            ),
            "dense": accuracy_cell(dense["tasks"].get(task), of_dense.get("tasks", {}).get(task))
            if "tasks" in dense
            else None,
        }
        for task, level in tasks
    ]
    means = [
        {
            "name": f"mean of {level} tasks",
            "level": level,
            "cells": cells([row.get(level) for row in rows], [own.get(level) for own in limits]),
            "dense": accuracy_cell(dense[level], of_dense.get(level)) if level in dense else None,
        }
        for level in LEVELS
        if any(row.get(level) is not None for row in rows)
    ]
    return {"budgets": names, "tasks": by_task, "means": means, "costs": cost_rows(evaluation, names)}


def cost_rows(result: Row, names: Sequence[str]) -> list[Row]:
    """Builds a row per cost and a cell per budget: FLOPs, savings, and cache bytes, times and shares if it has them."""
    dense, budgets = result["dense"], result["budgets"]
    rows = []
    for field, label in (("decoder_gflops", "decoder"), ("end_to_end_gflops", "end to end")):
        unit = figures.flops_unit(dense[field])[1]
        values = [flops(budgets[name][field], dense[field]) for name in names]
        rows.append({"name": f"{label}, {unit}", "cells": values, "dense": flops(dense[field], dense[field])})
        savings = [times(dense[field] / budgets[name][field]) for name in names]
        rows.append({"name": f"saving, {label}", "cells": savings, "dense": "1" + TIMES})
    every = [*(budgets[name].get("cache_bytes") for name in names), dense.get("cache_bytes")]
    if None not in every:
        unit, factor = ("MB", 1e-6) if max(every) >= 1e6 else ("kB", 1e-3)
        *values, of_dense = [f"{size * factor:,.2f}" for size in every]
        rows.append({"name": f"cache after the prompt, {unit}", "cells": values, "dense": of_dense})
    if timing := result.get("timing"):
        for field, label, factor in (
            ("seconds_to_first_token", "time to the first token, ms", 1e3),
            ("tokens_per_second", "new tokens per second", 1.0),
        ):
            quartiles = [timing["budgets"].get(name, {}).get(field) for name in names]
            rows.append({"name": label, "cells": [median(of_one, factor) for of_one in quartiles], "dense": DASH})
    if shares := result.get("shares"):
        values = [DASH if name == "auto" else percent(shares.get(name, 0.0)) for name in names]
        rows.append({"name": "chosen by auto, % of questions", "cells": values, "dense": DASH})
    return rows


def median(quartiles: Sequence[float] | None, factor: float) -> str:
    """[0.0104, 0.0111, 0.0125] seconds, 1e3 -> "11.1", and the quartiles in parentheses; a dash without values."""
    if not quartiles:
        return DASH
    low, middle, high = (f"{factor * value:,.1f}" for value in quartiles)
    return f"{middle} ({low}{DASH}{high})"


def timing_note(result: Row) -> str:
    """Returns what the times of a result were measured on; "" without times."""
    timing = result.get("timing")
    if not timing:
        return ""
    question = timing["question"]
    size = (
        f"{counted(question['tiles'], 'tile')}, {question['visual_tokens']} visual and {question['text_tokens']} text"
    )
    return (
        f"Times are those of one question of median length ({size} tokens) on one device ({timing['device']},"
        f" {timing['dtype']}): medians and quartiles of {timing['rounds']} rounds after a warm-up,"
        f" {timing['new_tokens']} new tokens."
    )


def accuracy_cell(value: float | None, limits: Sequence[float] | None = None) -> Row:
    """Builds a table cell of an accuracy, with its interval if it has one."""
    shown = shown_interval(value, limits) if value is not None and limits is not None else ""
    return {"text": percent(value), "limits": shown, "shade": shade(value)}


def controls_table(evaluation: Row, tasks: Sequence[tuple[str, str]]) -> Row | None:
    """Builds the table of the controls: accuracies at one budget with the right, a gray and another question's picture.

    Returns:
      None if the evaluation has no controls.
    """
    groups = {"budgets": "its own", "blind": "a gray one", "shuffled": "another question's"}
    groups = {group: title for group, title in groups.items() if evaluation.get(group)}
    if len(groups) < 2:
        return None
    name = "auto" if "auto" in evaluation["budgets"] else fixed_budgets(evaluation)[-1]
    measured = {group: evaluation[group][name] for group in groups}
    limits = {group: evaluation.get("intervals", {}).get(group, {}).get(name) or {} for group in groups}
    rows = [
        {
            "name": f"mean of {level} tasks",
            "level": level,
            "mean": True,
            "cells": [accuracy_cell(measured[group].get(level), limits[group].get(level)) for group in groups],
        }
        for level in LEVELS
        if measured["budgets"].get(level) is not None
    ]
    for task, level in tasks:
        values = [(measured[g]["tasks"].get(task), limits[g].get("tasks", {}).get(task)) for g in groups]
        rows.append(
            {"name": task or "all", "level": level, "mean": False, "cells": [accuracy_cell(*value) for value in values]}
        )
    samples = max(measured[group].get("samples") or 0 for group in groups if group != "budgets")
    return {"budget": name, "pictures": list(groups.values()), "rows": rows, "samples": samples}


def kinds_table(evaluation: Row) -> Row | None:
    """Builds the table of accuracies by kind of picture, at every fixed budget; None without kinds."""
    kinds, names = evaluation.get("kinds"), fixed_budgets(evaluation)
    if not kinds:
        return None
    levels = [
        level for level in LEVELS if any(row["budgets"][names[-1]].get(level) is not None for row in kinds.values())
    ]
    rows = [
        {
            "name": kind or "other",
            "samples": row["samples"],
            "cells": [accuracy_cell(row["budgets"][name].get(level)) for level in levels for name in names],
        }
        for kind, row in kinds.items()
    ]
    return {"budgets": names, "levels": levels, "rows": rows}


def dial_rows(evaluation: Row) -> Row | None:
    """Builds the table of the dial's positions."""
    dial = evaluation.get("dial")
    if not dial:
        return None
    largest = evaluation["dense"]["decoder_gflops"]
    columns = [level for level in LEVELS if all(point.get(level) is not None for point in dial)]
    return {
        "levels": columns,
        "unit": figures.flops_unit(largest)[1],
        "rows": [
            {
                "dial": f"{point['dial']:+g}".replace("-", MINUS) if point["dial"] else "0 (auto)",
                "accuracy": percent(point["accuracy"]),
                "levels": [percent(point[level]) for level in columns],
                "flops": flops(point["decoder_gflops"], largest),
                "saving": times(largest / point["decoder_gflops"]),
                "end_to_end": times(evaluation["dense"]["end_to_end_gflops"] / point["end_to_end_gflops"]),
            }
            for point in dial
        ],
    }
