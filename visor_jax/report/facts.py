"""Reads and validates the results of a workdir for the report.

In: a workdir with the results of the stages and of `visor evaluate`, possibly from another user. Out: `Facts`, in which
a part that was not run is None or empty. Numbers are copied; only means over levels and benchmarks are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from visor_jax.config.schema import TRAINED_STAGES
from visor_jax.data.source_kind import LEVELS
from visor_jax.errors import RequestError
from visor_jax.files.json_shape import AMOUNT, COST, COUNT, FLAG, FRACTION, NUMBER, TEXT, Shape, each, list_of, optional
from visor_jax.report.results import (
    ACCURACIES,
    BenchmarkResult,
    OtherResult,
    Pictures,
    Row,
    answers_doubt,
    evaluation_file,
    mean_of_benchmarks,
    read_evaluation,
    read_object,
    read_others,
    read_pictures,
)
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.metrics_log import read_rows

# --- shapes of the files ----------------------------------------------------------------------------------------------

_SUBSET: Shape = {
    "budget": TEXT,
    "accuracy": optional(FRACTION),
    "loss": optional(NUMBER),
    **ACCURACIES,
    "decoder_gflops": COST,
    "questions": optional(COUNT),
    "better": optional(TEXT),
}
SEARCH: Shape = {"viable": list_of(TEXT), "subsets": list_of(_SUBSET)}
LABELS: Shape = {
    "counts": each(COUNT),
    "by_task": each(each(COUNT)),
    "samples": COUNT,
    "tolerance": optional(FRACTION),
}
RECORD: Shape = {
    "config": {"name": optional(TEXT), "stages": optional(list_of(TEXT))},
    "versions": optional(each(TEXT)),
    "git_revision": optional(TEXT),
}
PARITY: Shape = {
    "bound": AMOUNT,
    "max_logit_difference": AMOUNT,
    "greedy_tokens_equal": FLAG,
    "budgets": optional(list_of(TEXT)),
    "comparisons": optional(list_of({})),
    "new_tokens": optional(COUNT),
    "computed_in": optional(TEXT),
}


@dataclass(frozen=True)
class Stage:
    """One trained stage: the rows of its `metrics.jsonl`, and whether it is complete."""

    name: str
    rows: list[Row]
    complete: bool


@dataclass(frozen=True)
class Facts:
    """The content of the report.

    Attributes:
      evaluation: `eval/test.json`; without one the means of the benchmarks, or else the first of `questions`.
      on_own_data: whether its tasks are not benchmarks.
      pictures: of the evaluation's examples.
      benchmarks: results of benchmarks.
      questions: results on other questions than the run's own.
      unread: why results are not on the page.
      doubts: what is wrong with the answers of results that are.
      stages: the trained stages of the configuration, and others with metrics, in the method's order.
      search: `search/viable.json`.
      labels: `labels/labels.json`.
      goodput: seconds by kind.
      record: `config.json`: configuration, versions, git revision.
      parity: `export/parity.json`.
    """

    evaluation: Row
    on_own_data: bool
    pictures: Pictures
    benchmarks: list[BenchmarkResult]
    questions: list[OtherResult]
    unread: list[str]
    doubts: list[str]
    stages: list[Stage]
    search: Row | None
    labels: Row | None
    goodput: dict[str, float] | None
    record: Row | None
    parity: Row | None


def read_facts(workdir: Workdir) -> Facts:
    """Reads a workdir.

    Raises:
      RequestError: it has not been evaluated, or one of its files is damaged.
    """
    record = read_object(workdir.path / "config.json", RECORD)
    others = read_others(workdir, record)
    benchmarks, questions = others.benchmarks, others.questions
    own = evaluation_file(workdir)
    if own.exists() or not (benchmarks or questions or others.unread):
        evaluation = read_evaluation(workdir)
        doubt = answers_doubt(evaluation, own, "eval/test.json")
        pictures = read_pictures(own.parent, evaluation)
    elif benchmarks:
        evaluation, pictures, doubt = mean_of_benchmarks(benchmarks), {}, ""
    elif questions:
        first, *questions = sorted(questions, key=lambda one: one.partial)
        evaluation, pictures, doubt = first.result, first.pictures, first.doubt
    else:
        raise RequestError(f"{workdir.path}: no result of an evaluation can be used: {'; '.join(others.unread)}")
    return Facts(
        evaluation=evaluation,
        on_own_data=own.exists() or not benchmarks,
        pictures=pictures,
        benchmarks=benchmarks,
        questions=questions,
        unread=others.unread,
        doubts=[sentence for sentence in (doubt, *(one.doubt for one in (*benchmarks, *questions))) if sentence],
        stages=read_stages(workdir, record),
        search=read_object(workdir.path / "search" / "viable.json", SEARCH),
        labels=read_object(workdir.path / "labels" / "labels.json", LABELS),
        goodput=read_object(workdir.path / "goodput.json", each(AMOUNT)),
        record=record,
        parity=read_object(workdir.path / "export" / "parity.json", PARITY),
    )


def read_stages(workdir: Workdir, record: Row | None) -> list[Stage]:
    """Reads the stages that the configuration trains, and others that have metrics."""
    configured = (record["config"].get("stages") or ()) if record else ()
    stages = []
    for name in TRAINED_STAGES:
        folder = workdir.stage(name)
        metrics = folder.path / "metrics.jsonl"
        if name in configured or metrics.exists():
            stages.append(Stage(name, read_rows(metrics) if metrics.exists() else [], folder.is_complete()))
    return stages


# --- shared by several parts of the report ----------------------------------------------------------------------------


def slots_on(name: str) -> float:
    """Returns the number of slots that a budget has on; infinity for "full"."""
    return {"empty": 0, "full": np.inf}.get(name, name.count("1"))


def fixed_budgets(evaluation: Row) -> list[str]:
    """Returns the budgets of an evaluation except "auto", cheapest first."""
    names = [name for name in evaluation["budgets"] if name != "auto"]
    return sorted(names, key=lambda name: (evaluation["budgets"][name]["decoder_gflops"], name))


def all_budgets(facts: Facts) -> list[str]:
    """Returns every budget in evaluation, routes or labels, fewest slots first."""
    results = [facts.evaluation, *(one.result for one in (*facts.benchmarks, *facts.questions))]
    shares = [share for result in results for share in result.get("routes", {}).values()]
    shares += (facts.labels or {}).get("by_task", {}).values()
    names = {name for result in results for name in fixed_budgets(result)} | {
        name for share in shares for name in share
    }
    return sorted(names, key=lambda name: (slots_on(name), name))


def tasks_by_level(evaluation: Row) -> list[tuple[str, str]]:
    """Returns (task, level) of every task in the order of levels, those without a level last."""
    order = {level: place for place, level in enumerate((*LEVELS, ""))}
    levels = evaluation.get("levels", {})
    tasks = dict.fromkeys(task for row in evaluation["budgets"].values() for task in row["tasks"])
    return sorted(((task, levels.get(task, "")) for task in tasks), key=lambda pair: order.get(pair[1], len(order)))


def mixed_accuracy(row: Mapping[str, Any], levels: Mapping[str, str]) -> float | None:
    """Returns the accuracy with equal weights for levels, and for the tasks of a level; None if none was asked."""
    by_level: dict[str, list[float]] = {}
    for task, accuracy in row.get("tasks", {}).items():
        if accuracy is not None:
            by_level.setdefault(levels.get(task, ""), []).append(accuracy)
    return float(np.mean([np.mean(values) for values in by_level.values()])) if by_level else None
