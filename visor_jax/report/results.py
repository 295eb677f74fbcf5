"""Reads what `visor evaluate` has written into a workdir: the run's own questions, benchmarks, other questions.

In: a workdir, possibly from another user. Out: `eval/test.json`, and `OtherResults` with what lies in `eval/of_*/`. A
result there that is damaged or of another model is not shown, and `OtherResults.unread` says so.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from visor_jax.evaluate.benchmarks.run import ANSWERS_DEPEND_ON, combined
from visor_jax.files.json_shape import (
    AMOUNT,
    COST,
    COUNT,
    FLAG,
    FRACTION,
    NUMBER,
    TEXT,
    Kind,
    Shape,
    check_shape,
    each,
    list_of,
    optional,
)
from visor_jax.files.read_write import read_json
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import file_sha256, flat_fields
from visor_jax.workdir.results import check_made_of

Row = dict[str, Any]

# --- shapes of the files ----------------------------------------------------------------------------------------------

_ACCURACY = optional(FRACTION)
ACCURACIES: dict[str, Shape] = dict.fromkeys(LEVELS, _ACCURACY)  # of the levels
_COSTS: dict[str, Shape] = {"decoder_gflops": COST, "end_to_end_gflops": COST, "cache_bytes": optional(AMOUNT)}
_BUDGETS: Shape = each({"tasks": each(_ACCURACY), **ACCURACIES, **_COSTS, "samples": optional(COUNT)})
_LIMITS = Kind(lambda value: isinstance(value, list) and list(map(NUMBER.holds, value)) == [True, True], "two numbers")
_OF_ONE: Shape = {"tasks": each(_LIMITS), **dict.fromkeys(LEVELS, optional(_LIMITS))}
_INTERVALS: Shape = optional(each(_OF_ONE))
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
_HARNESS: Shape = {
    **dict.fromkeys(("name", "decoding", "first_prompt"), TEXT),
    **dict.fromkeys(("git_revision", "system", "dtype", "right"), optional(TEXT)),
    "versions": each(TEXT),
    "max_new_tokens": optional(COUNT),
}
_DIFFERENCE: Shape = dict.fromkeys(("accuracy", "other", "difference", "low", "high", "p"), NUMBER)
_AGAINST: Shape = optional(
    {
        "files": list_of(TEXT),
        "budgets": each({"budget": TEXT, "tasks": each(_DIFFERENCE), **dict.fromkeys(LEVELS, optional(_DIFFERENCE))}),
    }
)
_RESULT: dict[str, Shape] = {  # of own data and of benchmarks
    **dict.fromkeys(("benchmark", "split"), TEXT),
    **dict.fromkeys(("stage", "plan"), optional(TEXT)),
    "budgets": _BUDGETS,
    "dense": {**_COSTS, "tasks": optional(each(_ACCURACY)), **ACCURACIES},
    "levels": optional(each(TEXT)),
    "routes": optional(each(each(FRACTION))),
    "shares": optional(each(FRACTION)),
    "examples": _EXAMPLES,
    "timing": _TIMING,
    "harness": optional(_HARNESS),
    "against": _AGAINST,
    "file": optional(TEXT),
    "answers": optional({"file": TEXT, "sha256": TEXT}),
}
_IDENTITY: Shape = {"config": {}, "inputs": optional({})}
EVALUATION: Shape = {
    **_RESULT,
    **dict.fromkeys(CONTROLS, optional(_BUDGETS)),
    "intervals": optional({**dict.fromkeys(("budgets", *CONTROLS), _INTERVALS), "dense": optional(_OF_ONE)}),
    "kinds": optional(each({"samples": COUNT, "budgets": each(ACCURACIES)})),
    "dial": optional(list_of({"dial": NUMBER, "accuracy": FRACTION, **ACCURACIES, **_COSTS})),
    "skipped": optional(each(COUNT)),
    "identity": optional(_IDENTITY),
}
BENCHMARK: Shape = {
    **_RESULT,
    "levels": each(TEXT),
    "budgets": each(
        {
            "tasks": each(FRACTION),
            **ACCURACIES,
            "metrics": each(NUMBER),
            **_COSTS,
            "cache_bytes": AMOUNT,
            "samples": COUNT,
        }
    ),
    "dense": {**_COSTS, "cache_bytes": AMOUNT},
    "intervals": {"budgets": _INTERVALS},
    "questions": {"asked": COUNT, "of": COUNT},
    "problems": each(COUNT),
    "harness": _HARNESS,
    "stage": TEXT,
    "model": optional(TEXT),
    "repository": optional(TEXT),
    "headline": optional({"name": TEXT, "maximum": COST}),
    "identity": _IDENTITY,
}

# --- what was read ----------------------------------------------------------------------------------------------------

Pictures = dict[str, np.ndarray]
"""Name of an example's picture -> uint8 [H, W, 3]; unreadable ones are missing."""


@dataclass(frozen=True)
class OtherResult:
    """A result on other questions than the run's own.

    Attributes:
      name: of a benchmark, as `--benchmark` takes it; of other questions their file, or what generates them.
      result: `eval/of_<name>/<split>.json`, or that in `partial/` if there is no usable one.
      pictures: of its examples.
      partial: whether it comes from `partial/`.
      differing: fields of the run's configuration that it was measured with other values of.
      doubt: what is wrong with the file of its answers; "" if nothing is known to be.
    """

    name: str
    result: Row
    pictures: Pictures
    partial: bool
    differing: list[str]
    doubt: str


@dataclass(frozen=True)
class BenchmarkResult(OtherResult):
    """The result of a benchmark.

    Attributes:
      level: in whose mean it counts.
      repository: where its tables come from.
      file: the user's file that defines it; "" if the package does.
      headline: the reported number that stands for it.
      headline_max: what a perfect model reaches there.
    """

    level: str
    repository: str
    file: str
    headline: str
    headline_max: float


@dataclass(frozen=True)
class OtherResults:
    """All results in `eval/of_*/`.

    Attributes:
      benchmarks: public ones in the order of their table, then those of the user's files.
      questions: other files of questions, and generated ones.
      unread: why results are not among them; each names its file.
    """

    benchmarks: list[BenchmarkResult] = field(default_factory=list)
    questions: list[OtherResult] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


# --- the run's own questions ------------------------------------------------------------------------------------------


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
    check_budgets(evaluation, path)
    if (workdir.path / "config.json").exists():
        check_made_of(workdir, "evaluate", evaluation.get("identity"), path, model=evaluation.get("stage") or "")
    return evaluation


# --- other results ----------------------------------------------------------------------------------------------------


def read_others(workdir: Workdir, record: Row | None) -> OtherResults:
    """Reads the results in `eval/of_*/`, those in `partial/` only where there is no usable whole one.

    Args:
      record: `config.json`; None if there is none.
    """
    others = OtherResults()
    for folder in folders(workdir.path / "eval"):
        for file in result_files(folder):
            for path in (folder / file, folder / "partial" / file):
                if not path.exists():
                    continue
                try:
                    one = read_other(workdir, record, path)
                except RequestError as error:
                    others.unread.append(str(error).replace(f"{workdir.path}/", ""))
                    continue
                if isinstance(one, BenchmarkResult):
                    others.benchmarks.append(one)
                else:
                    others.questions.append(one)
                break
    table = list(MODULES)
    others.benchmarks.sort(key=lambda one: table.index(one.name) if one.name in MODULES else len(table))
    return others


def folders(parent: Path) -> list[Path]:
    """Returns the folders of other results, by name."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.name.startswith("of_") and path.is_dir())


def result_files(folder: Path) -> list[str]:
    """Returns the names of the results in a folder or its `partial/`."""
    places = [place for place in (folder, folder / "partial") if place.is_dir()]
    names = {path.name for place in places for path in place.iterdir()}
    return sorted(name for name in names if name.endswith(".json") and not name.endswith(".questions.json"))


def read_other(workdir: Workdir, record: Row | None, path: Path) -> OtherResult:
    """Reads one result.

    Raises:
      RequestError: it is damaged, or of another model.
    """
    value = read_json(path)
    is_benchmark = isinstance(value, dict) and "problems" in value  # which `evaluate_benchmarks` writes, always
    result = checked_object(value, BENCHMARK if is_benchmark else EVALUATION, path)
    check_budgets(result, path)
    check_model(workdir, result, path)
    place, partial = path.parent, path.parent.name == "partial"
    name = (place.parent if partial else place).name.removeprefix("of_")
    fields = result.get("identity", {}).get("config", {})
    common = {
        "result": result,
        "pictures": read_pictures(place, result),
        "partial": partial,
        "differing": differing_fields({k: v for k, v in fields.items() if k.startswith(ANSWERS_DEPEND_ON)}, record),
        "doubt": answers_doubt(result, path, str(path.relative_to(workdir.path))),
    }
    if not is_benchmark:
        return OtherResult(result.get("file") or name, **common)
    return BenchmarkResult(name, **common, **definition(name, result, path))


def check_budgets(result: Row, path: Path) -> None:
    """Checks that a result has a budget.

    Raises:
      RequestError: it has none.
    """
    if not result["budgets"]:
        raise RequestError(f"{path}: field budgets is empty; expected an object per budget")


def check_model(workdir: Workdir, result: Row, path: Path) -> None:
    """Checks that a result is of the model that its stage has now, as far as both are known.

    Raises:
      RequestError: it is of another one.
    """
    stage = result.get("stage", "")
    theirs = result.get("model") or (result.get("identity", {}).get("inputs") or {}).get("start")
    mine = workdir.stage(stage).fingerprint() if stage in TRAINED_STAGES else ""
    if theirs and mine and theirs != mine:
        raise RequestError(
            f"{path}: is of another model than the one that stage {stage} has now; expected a result of this one:"
            " evaluate again"
        )


def definition(name: str, result: Row, path: Path) -> Row:
    """Returns the fields that a `BenchmarkResult` has of its benchmark.

    Raises:
      RequestError: the result is of another benchmark, has no accuracy of it, or does not say what its headline is.
    """
    if result["benchmark"] != name:
        raise RequestError(f"{path}: is of {result['benchmark']!r}; expected {name!r}, as its folder is named")
    intervals = result["intervals"].get("budgets") or {}
    for budget, row in result["budgets"].items():
        if name not in row["tasks"] or name not in intervals.get(budget, {}).get("tasks", {}):
            raise RequestError(f"{path}: field budgets.{budget}: expected an accuracy of {name} and its interval")
    if name in MODULES:
        known = named_benchmark(name)
        shown = {"level": known.level, "repository": known.repo, "file": ""}
        return {**shown, "headline": known.headline, "headline_max": known.headline_max}
    level, headline = result["levels"].get(name), result.get("headline")
    if level not in LEVELS or headline is None:
        raise RequestError(
            f"{path}: has no level or headline of {name}, which is no benchmark of the package; expected those of the"
            " file that defines it (an earlier version wrote none): evaluate again"
        )
    shown = {"level": level, "repository": result.get("repository", ""), "file": result.get("file", "")}
    return {**shown, "headline": headline["name"], "headline_max": headline["maximum"]}


def answers_doubt(result: Row, path: Path, shown: str) -> str:
    """Says what is wrong with the file of a result's answers; "" if it is whole, or if the result does not name it."""
    answers = result.get("answers")
    if not answers:
        return ""
    file = path.parent / Path(answers["file"]).name
    try:
        digest = file_sha256(file)
    except RequestError as error:
        return f"{shown}: its answers cannot be checked: {error}"
    if not digest:
        return f"{shown}: its answers, {file.name}, are missing, so its numbers cannot be checked."
    if digest != answers["sha256"]:
        return (
            f"{shown}: {file.name} beside it was changed or is of another evaluation; the numbers have other answers."
        )
    return ""


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


# --- files ------------------------------------------------------------------------------------------------------------


def read_object(path: Path, shape: Shape) -> Row | None:
    """Reads a JSON object of this shape; None if the file does not exist.

    Raises:
      RequestError: the file is damaged or has another shape; the message names the field.
    """
    if not path.exists():
        return None
    return checked_object(read_json(path), shape, path)


def checked_object(value: Any, shape: Shape, path: Path) -> Row:
    """Returns a JSON object of this shape, without its empty fields.

    Raises:
      RequestError: it has another shape; the message names the field.
    """
    check_shape(value, shape, path)
    return {name: part for name, part in value.items() if part is not None}  # null counts as missing


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
