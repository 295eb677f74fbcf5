"""Reads and validates the results of a workdir for the report.

In: a workdir with the results of the stages and of `visor evaluate`, possibly from another user. Out: `Facts`, in which
a part that was not run is None or empty. Numbers are copied; only means over levels and benchmarks are computed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visor_jax.config.data_fields import DEFAULT_MAX_PIXELS
from visor_jax.config.schema import TRAINED_STAGES
from visor_jax.data.controls import CONTROLS
from visor_jax.data.images import decode_image, open_under
from visor_jax.data.sample import SkipSample
from visor_jax.data.source_kind import LEVELS
from visor_jax.errors import RequestError
from visor_jax.evaluate.benchmarks import MODULES, named_benchmark
from visor_jax.evaluate.benchmarks.run import combined
from visor_jax.files.json_shape import (
    AMOUNT,
    COST,
    COUNT,
    FLAG,
    FRACTION,
    NUMBER,
    TEXT,
    Shape,
    check_shape,
    each,
    list_of,
    optional,
)
from visor_jax.files.read_write import read_json
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.metrics_log import read_rows
from visor_jax.workdir.provenance import flat_fields
from visor_jax.workdir.results import check_made_of

Row = dict[str, Any]

# --- shapes of the files ----------------------------------------------------------------------------------------------

_ACCURACY = optional(FRACTION)
_LEVELS: dict[str, Shape] = dict.fromkeys(LEVELS, _ACCURACY)
_COSTS: dict[str, Shape] = {"decoder_gflops": COST, "end_to_end_gflops": COST, "cache_bytes": optional(AMOUNT)}
_BUDGETS: Shape = each({"tasks": each(_ACCURACY), **_LEVELS, **_COSTS, "samples": optional(COUNT)})
_LIMITS = optional(list_of(NUMBER))
_INTERVALS: Shape = optional(each({"tasks": each(list_of(NUMBER)), **dict.fromkeys(LEVELS, _LIMITS)}))
_MAP = optional(list_of(list_of(COUNT)))
_EXAMPLES: Shape = optional(
    list_of(
        {
            **dict.fromkeys(("image", "question", "answer", "prediction", "budget", "task"), TEXT),
            "decoder_gflops": COST,
            "right": optional(FLAG),  # an earlier version did not write it
            "score": optional(FRACTION),
            "relevance": _MAP,
            "attention": optional(list_of({"layer": COUNT, "on_tile": FRACTION, "patches": list_of(list_of(COUNT))})),
        }
    )
)
_TIMES: Shape = {"seconds_to_first_token": list_of(AMOUNT), "tokens_per_second": optional(list_of(AMOUNT))}
_TIMING: Shape = optional(
    {
        **dict.fromkeys(("device", "dtype"), TEXT),
        **dict.fromkeys(("rounds", "new_tokens"), COUNT),
        "question": dict.fromkeys(("tiles", "visual_tokens", "text_tokens"), COUNT),
        "budgets": each(_TIMES),
    }
)
_HARNESS: Shape = optional(
    {
        **dict.fromkeys(("name", "decoding", "first_prompt"), TEXT),
        **dict.fromkeys(("git_revision", "system", "dtype", "right"), optional(TEXT)),
        "versions": each(TEXT),
        "max_new_tokens": optional(COUNT),
    }
)
_DIFFERENCE: Shape = dict.fromkeys(("accuracy", "other", "difference", "low", "high", "p"), NUMBER)
_AGAINST: Shape = optional(
    {
        "files": list_of(TEXT),
        "budgets": each({"budget": TEXT, "tasks": each(_DIFFERENCE), **dict.fromkeys(LEVELS, optional(_DIFFERENCE))}),
    }
)
_RESULT: dict[str, Shape] = {  # of own data and of benchmarks
    **dict.fromkeys(("benchmark", "split"), TEXT),
    "stage": optional(TEXT),
    "budgets": _BUDGETS,
    "dense": _COSTS,
    "levels": optional(each(TEXT)),
    "routes": optional(each(each(FRACTION))),
    "shares": optional(each(FRACTION)),
    "examples": _EXAMPLES,
    "timing": _TIMING,
    "harness": _HARNESS,
    "against": _AGAINST,
}
EVALUATION: Shape = {
    **_RESULT,
    **dict.fromkeys(CONTROLS, optional(_BUDGETS)),
    "intervals": optional(dict.fromkeys(("budgets", *CONTROLS), _INTERVALS)),
    "kinds": optional(each({"samples": COUNT, "budgets": each(_LEVELS)})),
    "dial": optional(list_of({"dial": NUMBER, "accuracy": FRACTION, **_LEVELS, **_COSTS})),
    "skipped": optional(each(COUNT)),
}
BENCHMARK: Shape = {
    **_RESULT,
    "levels": each(TEXT),
    "budgets": each(
        {"tasks": each(FRACTION), **_LEVELS, "metrics": each(NUMBER), **_COSTS, "cache_bytes": AMOUNT, "samples": COUNT}
    ),
    "dense": {**_COSTS, "cache_bytes": AMOUNT},
    "intervals": {"budgets": _INTERVALS},
    "questions": {"asked": COUNT, "of": COUNT},
    "problems": each(COUNT),
    "harness": _HARNESS,
    "identity": {"config": {}},
}
_SUBSET: Shape = {
    "budget": TEXT,
    "accuracy": _ACCURACY,
    "loss": optional(NUMBER),
    **_LEVELS,
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


Pictures = dict[str, np.ndarray]
"""Name of an example's picture -> uint8 [H, W, 3]; unreadable ones are missing."""


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of one public benchmark.

    Attributes:
      name: as `--benchmark` takes it.
      result: `eval/of_<name>/<split>.json`, or that in `partial/` if there is no complete one.
      pictures: of its examples.
      partial: whether it comes from `partial/`.
      differing: fields of the run's configuration that it was measured with other values of.
    """

    name: str
    result: Row
    pictures: Pictures
    partial: bool
    differing: list[str]


@dataclass(frozen=True)
class Facts:
    """The content of the report.

    Attributes:
      evaluation: `eval/test.json`; of a run that was evaluated on benchmarks only, their means.
      on_own_data: whether it is the former.
      pictures: of the evaluation's examples.
      benchmarks: results of public benchmarks.
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
    benchmarks = read_benchmarks(workdir, record)
    evaluation = read_evaluation(workdir) if evaluation_file(workdir).exists() or not benchmarks else None
    return Facts(
        evaluation=mean_of_benchmarks(benchmarks) if evaluation is None else evaluation,
        on_own_data=evaluation is not None,
        pictures=read_pictures(workdir.path / "eval", evaluation or {}),
        benchmarks=benchmarks,
        stages=read_stages(workdir, record),
        search=read_object(workdir.path / "search" / "viable.json", SEARCH),
        labels=read_object(workdir.path / "labels" / "labels.json", LABELS),
        goodput=read_object(workdir.path / "goodput.json", each(AMOUNT)),
        record=record,
        parity=read_object(workdir.path / "export" / "parity.json", PARITY),
    )


def evaluation_file(workdir: Workdir) -> Path:
    """Returns where `visor evaluate` writes the results of the run's own test questions."""
    return workdir.path / "eval" / "test.json"


def read_evaluation(workdir: Workdir) -> Row:
    """Reads `eval/test.json`; it must have a budget and match this run's model, data and settings.

    Raises:
      RequestError: there is none, or it is damaged.
    """
    path = evaluation_file(workdir)
    evaluation = read_object(path, EVALUATION)
    if evaluation is None:
        raise RequestError(f"{path}: no such file; evaluate the run first: visor evaluate --workdir={workdir.path}")
    if not evaluation["budgets"]:
        raise RequestError(f"{path}: field budgets is empty; expected an object per budget")
    if (workdir.path / "config.json").exists():
        check_made_of(workdir, "evaluate", evaluation.get("identity"), path, model=evaluation.get("stage") or "")
    return evaluation


def read_benchmarks(workdir: Workdir, record: Row | None) -> list[BenchmarkResult]:
    """Reads the results of public benchmarks in the order of their table; partial ones only if none is complete."""
    results = []
    for name in MODULES:
        folder, file = workdir.path / "eval" / f"of_{name}", f"{named_benchmark(name).split}.json"
        for place in (folder, folder / "partial"):
            result = read_object(place / file, BENCHMARK)
            if result is None:
                continue
            if not result["budgets"]:
                raise RequestError(f"{place / file}: field budgets is empty; expected an object per budget")
            differing = differing_fields(result["identity"]["config"], record)
            pictures = read_pictures(place, result)
            results.append(BenchmarkResult(name, result, pictures, place != folder, differing))
            break
    return results


def differing_fields(measured_with: Row, record: Row | None) -> list[str]:
    """Returns the fields whose values differ from the run's configuration; [] without one."""
    fields = dict(flat_fields(record["config"])) if record else {}
    return [name for name, value in measured_with.items() if name in fields and fields[name] != value]


def mean_of_benchmarks(benchmarks: Sequence[BenchmarkResult]) -> Row:
    """Returns the means over benchmarks as an evaluation whose tasks they are, under the budgets that all have.

    Complete results count, unless there are none; those without a budget of the first one do not.
    """
    complete = [one for one in benchmarks if not one.partial] or list(benchmarks)
    first = complete[0].result["budgets"]
    complete = [one for one in complete if first.keys() & one.result["budgets"].keys()]
    common = [name for name in first if all(name in one.result["budgets"] for one in complete)]
    if not common:
        complete, common = complete[:1], list(first)
    results = {
        one.name: {**one.result, "budgets": {name: one.result["budgets"][name] for name in common}} for one in complete
    }
    return combined(results)


def read_object(path: Path, shape: Shape) -> Row | None:
    """Reads a JSON object of this shape; None if the file does not exist.

    Raises:
      RequestError: the file is damaged or has another shape; the message names the field.
    """
    if not path.exists():
        return None
    value = read_json(path)
    check_shape(value, shape, path)
    return {name: field for name, field in value.items() if field is not None}  # null counts as missing


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


def read_pictures(folder: Path, evaluation: Row) -> Pictures:
    """Reads the examples' pictures; skips names that lead out of `folder` or to no picture."""
    pictures = {}
    for example in evaluation.get("examples", ()):
        name = example["image"]
        try:
            if "://" in str(folder):
                pictures[name] = decode_image(io.BytesIO((folder / name).read_bytes()), DEFAULT_MAX_PIXELS)
            else:
                pictures[name] = open_under(folder, name, DEFAULT_MAX_PIXELS)
        except (SkipSample, OSError):
            continue
    return pictures


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
    results = [facts.evaluation, *(one.result for one in facts.benchmarks)]
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
    """Returns the accuracy with equal weights for levels, and for the tasks of a level."""
    by_level: dict[str, list[float]] = {}
    for task, accuracy in row["tasks"].items():
        if accuracy is not None:
            by_level.setdefault(levels.get(task, ""), []).append(accuracy)
    return float(np.mean([np.mean(values) for values in by_level.values()])) if by_level else None
