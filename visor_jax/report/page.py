"""Writes the report: one self-contained HTML page, and the picture of accuracy against cost for a README.

In: an evaluated workdir. Out: `report/index.html` and `report/accuracy_cost.png`. Every number on the page comes from a
file of the workdir; parts that were not run are marked. The template escapes text from data sets, pictures and figures
are data URIs, and the page's security policy forbids scripts and network access.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from visor_jax.data.source_kind import LEVELS
from visor_jax.files.read_write import write_bytes, write_text
from visor_jax.report import figures
from visor_jax.report.facts import (
    Facts,
    Row,
    Stage,
    all_budgets,
    fixed_budgets,
    mixed_accuracy,
    read_facts,
    slots_on,
    tasks_by_level,
)
from visor_jax.report.numbers import (
    DASH,
    MINUS,
    TIMES,
    brief,
    data_uri,
    duration,
    flops,
    half_width,
    percent,
    points,
    shade,
    times,
)
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import flat_fields
from visor_jax.workdir.supervision import beat

PICTURE = 320  # longest side of an embedded picture in pixels
MAX_SUBSETS = 32  # maximum rows of the search table; with more, only viable ones are shown

COUNTED = {
    "step": "optimizer steps",
    "compile": "compiling (the first step of each start)",
    "data_wait": "waiting for data",
    "save": "saving checkpoints",
    "restore": "restoring checkpoints",
    "init": "initializing",
    "search": "searching viable budgets",
    "label": "labeling questions",
    "eval": "evaluating",
    "export": "exporting and verifying",
    "lost": "steps lost by a kill",
}


def write_report(workdir: Workdir) -> Path:
    """Writes the report of an evaluated workdir.

    Returns:
      The path of `report/index.html`.

    Raises:
      RequestError: `eval/test.json` is missing, or a file of the workdir is damaged.
    """
    facts = read_facts(workdir)
    beat()
    fault_point("report")
    page = workdir.path / "report" / "index.html"
    html = render(facts)
    picture = figures.readme_picture(facts.evaluation, all_budgets(facts), tasks_by_level(facts.evaluation))
    write_bytes(page.parent / "accuracy_cost.png", picture)
    # JSON can contain lone surrogates, which UTF-8 cannot encode.
    write_text(page, html.encode("utf-8", "replace").decode("utf-8"))
    return page


def render(facts: Facts) -> str:
    """Renders the page's HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("visor_jax.report").joinpath("page.html.j2").read_text(encoding="utf-8"))
    evaluation, tasks, budgets = facts.evaluation, tasks_by_level(facts.evaluation), all_budgets(facts)
    record = facts.record or {}
    return template.render(
        title=record.get("config", {}).get("name", "run"),
        evaluation=evaluation,
        headline=headline(evaluation),
        table=accuracy_table(evaluation, tasks),
        cost_curve=data_uri(figures.cost_curve(evaluation), "svg+xml"),
        dial=dial_rows(evaluation),
        controls=controls_table(evaluation, tasks),
        kinds=kinds_table(evaluation),
        routes=shares_figure(evaluation.get("routes"), budgets, tasks),
        examples=examples(facts, tasks, budgets),
        stages=[training(stage, tasks) for stage in facts.stages],
        search=search_table(facts.search, evaluation),
        labels=facts.labels,
        label_counts=label_counts(facts.labels, budgets),
        label_figure=shares_figure(facts.labels and facts.labels["by_task"], budgets, tasks),
        goodput=goodput_rows(facts.goodput),
        parity=facts.parity,
        dense_run=is_dense(evaluation),
        provenance={"revision": record.get("git_revision", ""), "versions": sorted(record.get("versions", {}).items())},
        fields=[(name, brief(value)) for name, value in flat_fields(record.get("config", {}))],
        levels=figures.LEVELS,
    )


# --- parts of the page ------------------------------------------------------------------------------------------------


def headline(evaluation: Row) -> Row:
    """Summarizes "auto" against "full" if both were evaluated, otherwise the most expensive budget."""
    budgets, dense, levels = evaluation["budgets"], evaluation["dense"], evaluation.get("levels", {})
    name = "auto" if "auto" in budgets else fixed_budgets(evaluation)[-1]
    row, full = budgets[name], budgets.get("full") if name == "auto" else None
    accuracy, reference = mixed_accuracy(row, levels), full and mixed_accuracy(full, levels)
    by_level = [
        {"level": level, "own": percent(row[level]), "full": full and percent(full.get(level))}
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
    """Returns whether the evaluated model is dense: its only budget has the cost of a dense decoder."""
    costs = [row["decoder_gflops"] for row in evaluation["budgets"].values()]
    return len(costs) == 1 and math.isclose(costs[0], evaluation["dense"]["decoder_gflops"], rel_tol=1e-9)


def accuracy_table(evaluation: Row, tasks: Sequence[tuple[str, str]]) -> Row:
    """Builds a row per task and a column per budget, then the levels' means, costs and savings."""
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
        }
        for task, level in tasks
    ]
    means = [
        {
            "name": f"mean of {level} tasks",
            "level": level,
            "cells": cells([row.get(level) for row in rows], [own.get(level) for own in limits]),
        }
        for level in LEVELS
        if any(row.get(level) is not None for row in rows)
    ]
    dense = evaluation["dense"]
    costs = []
    for field, label in (("decoder_gflops", "decoder"), ("end_to_end_gflops", "end to end")):
        unit = figures.flops_unit(dense[field])[1]
        values = [flops(row[field], dense[field]) for row in rows]
        costs.append({"name": f"{label}, {unit}", "cells": values, "dense": flops(dense[field], dense[field])})
        savings = [times(dense[field] / row[field]) for row in rows]
        costs.append({"name": f"saving, {label}", "cells": savings, "dense": "1" + TIMES})
    return {"budgets": names, "tasks": by_task, "means": means, "costs": costs}


def accuracy_cell(value: float | None, limits: Sequence[float] | None = None) -> Row:
    """Builds a table cell of an accuracy, with half the width of its interval if it has one."""
    return {"text": percent(value), "limits": half_width(limits), "shade": shade(value)}


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


def shares_figure(
    by_task: Mapping[str, Mapping[str, float]] | None, budgets: Sequence[str], tasks: Sequence[tuple[str, str]]
) -> str | None:
    return data_uri(figures.shares(by_task, budgets, tasks), "svg+xml") if by_task else None


def examples(facts: Facts, tasks: Sequence[tuple[str, str]], budgets: Sequence[str]) -> list[Row]:
    """Builds the cards of the example answers, easy tasks first."""
    colors, order = figures.budget_colors(budgets), {task: place for place, (task, _) in enumerate(tasks)}
    largest, levels = facts.evaluation["dense"]["decoder_gflops"], dict(tasks)
    ordered = sorted(facts.evaluation.get("examples", ()), key=lambda e: order.get(e["task"], len(order)))
    cards = []
    for example in ordered:
        picture, color = facts.pictures.get(example["image"]), colors.get(example["budget"], figures.FAINT)
        cards.append(
            {
                **{name: example[name] for name in ("question", "answer", "prediction", "budget", "task")},
                "right": example["prediction"].strip() == example["answer"].strip(),
                "level": levels.get(example["task"], ""),
                "color": color,
                "on_dark": figures.is_dark(color),
                "picture": picture if picture is None else data_uri(*embedded(picture)),
                "relevance": relevance_picture(picture, example.get("relevance")),
                "pixelated": picture is not None and max(picture.shape[:2]) <= PICTURE // 2,
                "flops": f"{flops(example['decoder_gflops'], largest)} {figures.flops_unit(largest)[1]}",
            }
        )
    return cards


def relevance_picture(picture: np.ndarray | None, relevance: Sequence[Sequence[int]] | None) -> str | None:
    """Returns a picture as a data URI, its patches as bright as the answer depends on them; None without either."""
    if picture is None or not relevance or len({len(row) for row in relevance}) != 1:
        return None
    size = picture.shape[1], picture.shape[0]
    percents = np.clip(np.array(relevance, np.float32), 0, 100).astype(np.uint8)
    mask = Image.fromarray(percents).resize(size, Image.Resampling.NEAREST)
    strength = np.asarray(mask, np.float32)[..., None] / 100
    return data_uri(*embedded((picture * (0.25 + 0.75 * strength)).astype(np.uint8)))


def embedded(picture: np.ndarray) -> tuple[bytes, str]:
    """Encodes a picture: small ones losslessly as PNG, large ones scaled down as JPEG; returns (bytes, type)."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    if max(image.size) <= PICTURE:
        image.save(buffer, "PNG", optimize=True)
        return buffer.getvalue(), "png"
    image.thumbnail((PICTURE, PICTURE))
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue(), "jpeg"


def training(stage: Stage, tasks: Sequence[tuple[str, str]]) -> Row:
    """Builds a stage's curves, if it has steps."""
    if not stage.rows:
        return {"name": stage.name, "run": False}
    drawn = figures.accuracies_of(stage)
    return {
        "name": stage.name,
        "run": True,
        "complete": stage.complete,
        "steps": stage.rows[-1]["step"],
        "stretch": max(1, round(len(stage.rows) / figures.BINS)),
        "not_finite": sum(row.get("loss") is None for row in stage.rows),
        "budgets": len({row.get("budget") for row in stage.rows}),
        "loss": data_uri(figures.loss_curve(stage), "svg+xml"),
        "accuracy": data_uri(figures.accuracy_curve(stage, tasks), "svg+xml") if drawn else None,
        "sources": data_uri(figures.source_curve(stage), "svg+xml") if len(figures.sources_of(stage)) > 1 else None,
    }


def search_table(search: Row | None, evaluation: Row) -> Row | None:
    """Builds the table of the subsets that the search evaluated; of too many, only the viable ones."""
    if search is None:
        return None
    viable, subsets = set(search["viable"]), search["subsets"]
    shown = subsets if len(subsets) <= MAX_SUBSETS else [s for s in subsets if s["budget"] in viable]
    largest = evaluation["dense"]["decoder_gflops"]
    whole = [s for s in subsets if not s.get("better")]  # the others may lack the tasks of a level
    columns = [level for level in LEVELS if all(s.get(level) is not None for s in whole)]
    stopped = len(subsets) - len(whole)
    return {
        "unit": figures.flops_unit(largest)[1],
        "levels": columns,
        "evaluated": len(subsets),
        "kept": len(viable),
        "hidden": len(subsets) - len(shown),
        "stopped": stopped,
        "rows": [
            {
                "budget": s["budget"],
                "slots": f"{slots_on(s['budget']):.0f}",
                "kept": s["budget"] in viable,
                "levels": [accuracy_cell(s.get(level)) for level in columns],
                "questions": s.get("questions"),
                "better": s.get("better"),
                "accuracy": accuracy_cell(s.get("accuracy")),
                "loss": DASH if s.get("loss") is None else f"{s['loss']:.3f}",
                "flops": flops(s["decoder_gflops"], largest),
            }
            for s in shown
        ],
    }


def label_counts(labels: Row | None, budgets: Sequence[str]) -> list[tuple[str, int, str]]:
    """Returns (budget, questions, share in %) of the labels, fewest slots first."""
    if labels is None:
        return []
    counts, total = labels["counts"], max(sum(labels["counts"].values()), 1)
    return [(name, counts[name], percent(counts[name] / total)) for name in budgets if name in counts]


def goodput_rows(goodput: Mapping[str, float] | None) -> Row | None:
    """Returns the kinds of time, longest first, with their shares of the total."""
    total = sum((goodput or {}).values())
    if not goodput or total <= 0:
        return None
    rows = [
        {"name": COUNTED.get(name, name), "time": duration(seconds), "share": 100 * seconds / total}
        for name, seconds in sorted(goodput.items(), key=lambda item: -item[1])
    ]
    return {"total": duration(total), "rows": rows}
