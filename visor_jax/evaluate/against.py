"""Compares a run's answers with those that another run has given to the same questions.

In: another run's workdir, or the file of its answers; this run's answers. Out: for each budget the paired differences
(`intervals.PairedDifference`) of every task and level, as JSON values under "against" of a result. `OtherAnswers` reads
the `<split>.questions.json` of an evaluation on own data, `OtherPredictions` the `<split>.predictions.jsonl` of a
benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visor_jax.errors import RequestError, nearest, short
from visor_jax.evaluate.benchmarks.base import Line, Unit
from visor_jax.evaluate.benchmarks.folder import Table
from visor_jax.evaluate.benchmarks.predictions import common_fields, unpack
from visor_jax.evaluate.intervals import CONFIDENCE, RESAMPLES, SWAPS, PairedDifference
from visor_jax.files.json_shape import COUNT, FRACTION, TEXT, check_shape, each, list_of
from visor_jax.files.read_write import as_path, read_json, read_regular

MAX_BYTES = 2**31  # of a file of predictions
ANSWERS = {**dict.fromkeys(("ids", "tasks", "digests"), list_of(TEXT)), "right": each(TEXT)}
PREDICTIONS = list_of({"row": COUNT, "id": TEXT, "budget": TEXT, "question": TEXT, "scores": each(FRACTION)})
Compared = Mapping[str, PairedDifference]  # by task, or by budget


def answers_file(against: str, folder: str, name: str, again: str) -> Path:
    """Returns the file with another run's answers.

    Args:
      against: the run's workdir, a folder of results, or the file itself.
      folder: of the results below `eval/` of a workdir.
      name: of the file.
      again: the command that writes the file.

    Raises:
      RequestError: it does not exist.
    """
    root = as_path(against)
    if root.is_file():
        return root
    places = [root / "eval" / folder / name, root / name]
    for place in places:
        if place.is_file():
            return place
    raise RequestError(
        f"--against={against}: has no {places[0].relative_to(root)}; expected a workdir in which `{again}` has ended,"
        f" or a file {name}"
    )


class Other:
    """Another run's answers.

    Attributes:
      path: their file.
      budgets: the names of its budgets.
    """

    def __init__(self, path: Path, budgets: Sequence[str], wanted: str) -> None:
        """
        Args:
          wanted: the budget to compare with; "": the only one, or the one of the same name.

        Raises:
          RequestError: the run was not asked under `wanted`.
        """
        self.path, self.budgets, self._wanted = path, list(budgets), wanted
        if wanted and wanted not in self.budgets:
            hint = nearest(wanted, self.budgets) or f"expected one of {', '.join(self.budgets)}"
            raise RequestError(f"--against-budget={wanted}: {path} has no answers under it; {hint}")

    def paired_with(self, budgets: Sequence[str]) -> dict[str, str]:
        """Returns for each of these budgets the other run's that it is compared with.

        Raises:
          RequestError: the run has several, and none of this name.
        """
        if self._wanted or len(self.budgets) == 1:
            return dict.fromkeys(budgets, self._wanted or self.budgets[0])
        if missing := [name for name in budgets if name not in self.budgets]:
            raise RequestError(
                f"--against: {self.path} has answers under {', '.join(self.budgets)}, not under {', '.join(missing)};"
                " expected --against-budget=NAME, which all are compared with"
            )
        return {name: name for name in budgets}


class OtherAnswers(Other):
    """Another run's answers to the questions of a split: which of them each budget answers."""

    def __init__(self, path: Path, wanted: str = "") -> None:
        """
        Raises:
          RequestError: the file is not one that `visor evaluate` writes, or lacks the budget `wanted`.
        """
        record = read_json(path)
        check_shape(record, {}, path)
        of_budgets = record.get("budgets")
        if isinstance(of_budgets, dict) and "digests" not in of_budgets:
            raise RequestError(
                f"{path}: does not say which questions it has (digests); expected a file of this version, so evaluate"
                " that run again"
            )
        check_shape(of_budgets, ANSWERS, path, "budgets")
        ids, self._right = of_budgets["ids"], of_budgets["right"]
        if any(len(row) != len(ids) for row in (of_budgets["digests"], *self._right.values())):
            raise RequestError(f"{path}: expected as many digests and right as ids, {len(ids)}")
        self._places = {key: place for place, key in enumerate(zip(ids, of_budgets["digests"], strict=True))}
        super().__init__(path, list(self._right), wanted)

    def check_questions(self, asked: Mapping[str, str]) -> None:
        """Checks before any question is answered that they are the other run's, as far as they were readable there.

        Args:
          asked: digest by id.

        Raises:
          RequestError: the other run was asked another question under one of the ids, or none of them.
        """
        theirs = dict(self._places.keys())  # digest by id
        known = [id for id in asked if id in theirs]
        if others := [id for id in known if asked[id] != theirs[id]] or ([] if known else list(asked)):
            raise RequestError(
                f"--against: {self.path} has no or another question in {len(others)} of {len(asked)} places, such as"
                f" {others[0]!r}; expected the same data and split"
            )

    def compared(self, answered: Mapping[str, Any], levels: Mapping[str, str]) -> dict[str, Any]:
        """Returns the comparison of this run's answers, as in `<split>.questions.json`, with these.

        Args:
          levels: task -> level.

        Raises:
          RequestError: the other run was not asked one of the questions.
        """
        keys = list(zip(answered["ids"], answered["digests"], strict=True))
        if missing := [id for id, digest in keys if (id, digest) not in self._places]:
            raise RequestError(
                f"--against: {self.path} has no answer to {len(missing)} of {len(keys)} questions, such as"
                f" {missing[0]!r}, or has another question there; expected the same data, split and evaluate.samples"
            )
        places, tasks = np.array([self._places[key] for key in keys]), np.array(answered["tasks"])
        differences: dict[str, dict[str, PairedDifference]] = {}
        for name, theirs in self.paired_with(list(answered["right"])).items():
            mine, other = is_right(answered["right"][name]), is_right(self._right[theirs])[places]
            for task in sorted(set(answered["tasks"])):
                of_task = PairedDifference.of(mine[tasks == task], other[tasks == task], task or "all")
                differences.setdefault(task or "all", {})[name] = of_task
        return comparison([self], list(answered["right"]), differences, levels)


def is_right(bits: str) -> np.ndarray:
    """Returns "0101..." as numbers."""
    return np.array([float(bit == "1") for bit in bits])


class OtherPredictions(Other):
    """Another run's predictions of one benchmark."""

    def __init__(self, path: Path, table: Table, count: int, wanted: str = "") -> None:
        """
        Args:
          table, count: the questions: the first `count` of the benchmark.

        Raises:
          RequestError: the file holds no predictions, those of other questions or not of all, or lacks `wanted`.
        """
        self._benchmark = table.benchmark
        try:
            lines = unpack(read_regular(path, MAX_BYTES))
        except ValueError as error:
            raise RequestError(f"--against: {path}: {error}; expected lines of JSON") from None
        check_shape(lines, PREDICTIONS, path)
        if not lines:
            raise RequestError(f"--against: {path}: has no prediction")
        self._lines: dict[str, list[Line]] = {}
        for line in lines:
            if line["row"] < count:
                self._lines.setdefault(line["budget"], []).append(line)
        super().__init__(path, list(dict.fromkeys(line["budget"] for line in lines)), wanted)
        for budget in self.budgets:
            self._check(table, count, budget)

    def _check(self, table: Table, count: int, budget: str) -> None:
        """Checks that the lines of a budget are the predictions of the questions, and sorts them."""
        lines = sorted(self._lines.get(budget, []), key=lambda line: line["row"])
        if [line["row"] for line in lines] != list(range(count)):
            raise RequestError(
                f"--against: {self.path}: has predictions of {len(lines)} of the first {count} questions under budget"
                f" {budget}; expected one of each, so evaluate that run without --limit, or with the same"
            )
        for line in lines:
            for field, mine in common_fields(table.items[line["row"]]).items():
                if line.get(field) != mine:
                    raise RequestError(
                        f"--against: {self.path}: row {line['row']}: {field} is {short(line.get(field))} there and"
                        f" {short(mine)} here; expected predictions of the same files and prompts"
                    )
        self._lines[budget] = lines

    def compared(self, lines: Sequence[Line]) -> Compared:
        """Returns the difference under each budget of this run's predictions.

        A limit may leave no question that counts in the headline; then there is none.
        """
        by_budget: dict[str, list[Line]] = {}
        for line in lines:
            by_budget.setdefault(line["budget"], []).append(line)
        benchmark, result = self._benchmark, {}
        for name, theirs in self.paired_with(list(by_budget)).items():
            mine, other = benchmark.units(by_budget[name]), benchmark.units(self._lines[theirs])
            if mine:
                result[name] = paired(benchmark.name, mine, other)
        return result


def open_answers(against: str, folder: str, split: str, wanted: str = "") -> OtherAnswers:
    """Opens another run's answers to the questions of a split.

    Args:
      against: its workdir, or the file of its answers.
      folder: of the results below `eval/`; "" for the run's own data.
      split: of the questions.
      wanted: see `Other`.

    Raises:
      RequestError: they do not exist, or are damaged.
    """
    again = f"visor evaluate --workdir={against}" + (" --data=..." if folder else "")
    return OtherAnswers(answers_file(against, folder, f"{split}.questions.json", again), wanted)


def open_predictions(
    against: str, tables: Sequence[Table], limit: int | None, wanted: str = ""
) -> dict[str, OtherPredictions]:
    """Opens another run's predictions of benchmarks, by name of the benchmark.

    Args:
      against: its workdir, or the file of its predictions if there is only one benchmark.
      limit: of the number of questions of each benchmark; None: all.
      wanted: see `Other`.

    Raises:
      RequestError: they do not exist, or do not fit the questions.
    """
    others = {}
    for table in tables:
        benchmark = table.benchmark
        again = f"visor evaluate --workdir={against} --benchmark={benchmark.name} --data=..."
        path = answers_file(against, f"of_{benchmark.name}", f"{benchmark.split}.predictions.jsonl", again)
        others[benchmark.name] = OtherPredictions(path, table, min(len(table), limit or len(table)), wanted)
    return others


def paired(name: str, mine: Sequence[Unit], theirs: Sequence[Unit]) -> PairedDifference:
    """Returns the difference of two runs' units of the benchmark `name`."""
    groups: dict[str, tuple[list[float], list[float]]] = {}
    for one, other in zip(mine, theirs, strict=True):
        assert (one.key, one.group) == (other.key, other.group), "the rows and facts of both are the same"
        first, second = groups.setdefault(one.group, ([], []))
        first.append(one.value)
        second.append(other.value)
    return PairedDifference.mean([PairedDifference.of(*values, f"{name}/{group}") for group, values in groups.items()])


def comparison(
    others: Sequence[Other], budgets: Sequence[str], differences: Mapping[str, Compared], levels: Mapping[str, str]
) -> dict[str, Any]:
    """Returns what a result has under "against": files, constants, and the figures of every budget.

    Args:
      others: the other run's answers, of one data set or of several benchmarks.
      budgets: of this run.
      differences: task -> budget -> difference; a task without any is left out.
      levels: task -> level.
    """
    pairs, rows = [other.paired_with(budgets) for other in others], {}
    for name in budgets:
        of_tasks = {task: by_budget[name] for task, by_budget in differences.items() if name in by_budget}
        theirs = ", ".join(dict.fromkeys(pair[name] for pair in pairs))
        rows[name] = {"budget": theirs, **figures(of_tasks, levels)}
    constants = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "swaps": SWAPS}
    return {"files": [str(other.path) for other in others], **constants, "budgets": rows}


def figures(of_tasks: Compared, levels: Mapping[str, str]) -> dict[str, Any]:
    """Returns {"tasks": {task: figures}, level: figures}; a level's difference is the mean over its tasks."""
    result: dict[str, Any] = {"tasks": {task: compared.figures() for task, compared in of_tasks.items()}}
    for level in dict.fromkeys(levels.values()):
        if members := [compared for task, compared in of_tasks.items() if levels.get(task) == level]:
            result[level] = PairedDifference.mean(members).figures()
    return result
