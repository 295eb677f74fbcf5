"""Builds what the page says of stages and passes: curves, the search, labels, where the time went.

In: metrics, `search/viable.json`, `labels/labels.json`, `goodput.json`. Out: texts, and figures as data URIs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from visor_jax.data.source_kind import LEVELS
from visor_jax.report import curves, figures
from visor_jax.report.accuracy import accuracy_cell
from visor_jax.report.facts import Stage, slots_on
from visor_jax.report.numbers import DASH, data_uri, duration, flops, percent
from visor_jax.report.results import Row

MAX_SUBSETS = 32  # maximum rows of the search table; with more, only viable ones are shown

COUNTED = {
    "step": "optimizer steps",
    "compile": "compiling (the first step of each start)",
    "data_wait": "waiting for data",
    "save": "saving checkpoints",
    "restore": "restoring checkpoints",
    "init": "initializing",
    "prepare": "storing visual tokens of labeled questions (policy)",
    "validate": "answering held-out questions",
    "search": "searching viable budgets",
    "label": "labeling questions",
    "eval": "evaluating",
    "export": "exporting and verifying",
    "lost": "steps lost by a kill",
}


def training(stage: Stage, tasks: Sequence[tuple[str, str]]) -> Row:
    """Builds a stage's curves, if it has steps."""
    if not stage.rows:
        return {"name": stage.name, "run": False}
    drawn = curves.accuracies_of(stage)
    return {
        "name": stage.name,
        "run": True,
        "complete": stage.complete,
        "steps": stage.rows[-1]["step"],
        "stretch": max(1, round(len(stage.rows) / curves.BINS)),
        "not_finite": sum(row.get("loss") is None for row in stage.rows),
        "budgets": len({row.get("budget") for row in stage.rows}),
        "loss": data_uri(curves.loss_curve(stage), "svg+xml"),
        "accuracy": data_uri(curves.accuracy_curve(stage, tasks), "svg+xml") if drawn else None,
        "sources": data_uri(curves.source_curve(stage), "svg+xml") if len(curves.sources_of(stage)) > 1 else None,
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
    return {
        "unit": figures.flops_unit(largest)[1],
        "levels": columns,
        "evaluated": len(subsets),
        "kept": len(viable),
        "hidden": len(subsets) - len(shown),
        "stopped": len(subsets) - len(whole),
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
