"""Writes the tables of an analysis as CSV: one row per task and layer, or per task and budget.

In: a `LayerTable`, the evaluation of a run, or an architecture. Out: rows as dicts, and files with a header whose names
end with the unit where there is one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visor_jax.analysis.dense import MEASURES, LayerTable
from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, budget_name
from visor_jax.cost import decoder_flops, dense_decoder_flops
from visor_jax.files.read_write import write_text
from visor_jax.report.facts import fixed_budgets, tasks_by_level

Row = dict[str, Any]
LENGTHS = (64, 128, 256, 729, 1458, 2916, 5832, 7290, 11664, 23328)  # visual tokens; a tile of SigLIP has 729
DIGITS = 6


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with equal fields."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: round(x, DIGITS) if isinstance(x, float) else x for name, x in row.items()})
    write_text(path, text.getvalue())


def layer_rows(table: LayerTable) -> Iterator[Row]:
    """Yields one row per task and layer."""
    for task, samples in table.samples.items():
        for layer in range(table.num_layers):
            yield {
                "task": task,
                "level": table.levels[task],
                "cluster": table.clusters.get(task, ""),
                "samples": samples,
                "layer": layer,
                "accuracy": table.accuracy[task],
                **{measure: float(table.measures[measure][task][layer]) for measure in MEASURES},
            }


def budget_rows(evaluation: Mapping[str, Any]) -> Iterator[Row]:
    """Yields accuracy, cost and share of routes of every budget and task."""
    routes = evaluation.get("routes", {})
    for task, level in tasks_by_level(dict(evaluation)):
        for name in [*fixed_budgets(dict(evaluation)), *(["auto"] if "auto" in evaluation["budgets"] else [])]:
            accuracy = evaluation["budgets"][name]["tasks"].get(task)
            if accuracy is None:
                continue
            route = "" if name == "auto" or task not in routes else routes[task].get(name, 0.0)
            yield {"task": task, "level": level, "budget": name, "accuracy": accuracy, "route_share": route}


def cost_rows(evaluation: Mapping[str, Any]) -> Iterator[Row]:
    """Yields accuracy by level and cost of every budget, of the policy and of the dial's positions."""
    levels = ("easy", "middle", "hard")
    for name, row in evaluation["budgets"].items():
        yield {"budget": name, "dial": "", **{level: row.get(level, "") for level in levels}, **_costs(row)}
    for point in evaluation.get("dial", ()):
        marks = {level: point.get(level, "") for level in levels}
        yield {"budget": "auto", "dial": point["dial"], **marks, **_costs(point)}


def _costs(row: Mapping[str, Any]) -> Row:
    return {name: row.get(name, "") for name in ("decoder_gflops", "end_to_end_gflops")}


def length_rows(arch: Architecture, budgets: Sequence[Bits], num_text: int) -> Iterator[Row]:
    """Yields decoder FLOPs of the dense plan and of every budget, by number of visual tokens (paper, figure 10)."""
    for num_visual in LENGTHS:
        yield _length_row(num_visual, num_text, "dense", dense_decoder_flops(arch, num_visual, num_text))
        for bits in budgets if arch.plan == "visor" else ():
            yield _length_row(num_visual, num_text, budget_name(bits), decoder_flops(arch, bits, num_visual, num_text))


def _length_row(num_visual: int, num_text: int, budget: str, flops: float) -> Row:
    return {"visual_tokens": num_visual, "text_tokens": num_text, "budget": budget, "decoder_gflops": flops / 1e9}
