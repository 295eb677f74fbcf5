"""Writes the report: one self-contained HTML page, and the picture of accuracy against cost for a README.

In: an evaluated workdir. Out: `report/index.html` and `report/accuracy_cost.png`. Every number on the page comes from a
file of the workdir; parts that were not run are marked. The template escapes text from data sets, pictures and figures
are data URIs, and the page's security policy forbids scripts and network access.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

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
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import flat_fields
from visor_jax.workdir.supervision import beat

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

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


# --- numbers as text --------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """0.987 -> "98.7"; the caller adds the unit."""
    return DASH if value is None else f"{100 * value:.1f}"


def points(difference: float | None) -> str:
    """0.003 -> "+0.3 points"."""
    if difference is None:
        return DASH
    text = f"{abs(100 * difference):.1f}"
    sign = "±" if text == "0.0" else "+" if difference > 0 else MINUS
    return f"{sign}{text} points"


def times(ratio: float) -> str:
    """3.987 -> "3.99", 11.23 -> "11.2", with a multiplication sign."""
    return (f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}") + TIMES


def flops(gflops: float, largest: float) -> str:
    """Formats a number of GFLOP in the unit that suits the largest number of its table."""
    factor, _ = figures.flops_unit(largest)
    return f"{gflops * factor:,.2f}" if gflops * factor < 100 else f"{gflops * factor:,.0f}"


def duration(seconds: float) -> str:
    """4000.0 -> "1 h 06 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def brief(value: Any, longest: int = 200) -> str:
    """Returns a value's text, shortened to `longest` characters."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def data_uri(data: bytes, kind: str) -> str:
    """Returns an image of a media type such as "png" as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def shade(accuracy: float | None) -> str:
    """Returns the background of an accuracy: amber for low values, white at 90 %, green near 100 %."""
    if accuracy is None:
        return figures.PAPER
    stops, colors = [0.0, 0.5, 0.9, 1.0], [(239, 178, 130), (250, 220, 196), (255, 255, 255), (203, 230, 220)]
    red, green, blue = (round(float(np.interp(accuracy, stops, [c[i] for c in colors]))) for i in range(3))
    return f"#{red:02x}{green:02x}{blue:02x}"


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

    def cells(values: Sequence[float | None]) -> list[Row]:
        return [{"text": percent(value), "shade": shade(value)} for value in values]

    by_task = [
        {"name": task or "all", "level": level, "cells": cells([row["tasks"].get(task) for row in rows])}
        for task, level in tasks
    ]
    means = [
        {"name": f"mean of {level} tasks", "level": level, "cells": cells([row.get(level) for row in rows])}
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
                "pixelated": picture is not None and max(picture.shape[:2]) <= PICTURE // 2,
                "flops": f"{flops(example['decoder_gflops'], largest)} {figures.flops_unit(largest)[1]}",
            }
        )
    return cards


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
    columns = [level for level in LEVELS if all(s.get(level) is not None for s in subsets)]
    return {
        "unit": figures.flops_unit(largest)[1],
        "levels": columns,
        "evaluated": len(subsets),
        "kept": len(viable),
        "hidden": len(subsets) - len(shown),
        "rows": [
            {
                "budget": s["budget"],
                "slots": f"{slots_on(s['budget']):.0f}",
                "kept": s["budget"] in viable,
                "levels": [{"text": percent(s[level]), "shade": shade(s[level])} for level in columns],
                "accuracy": {"text": percent(s.get("accuracy")), "shade": shade(s.get("accuracy"))},
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
