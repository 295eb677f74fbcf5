"""What a benchmark is: which rows it has, how a row becomes a question, how answers become the reported numbers.

In: rows of the tables that the hub has. Out: `Benchmark`, one object per benchmark, made by the files beside this one,
and helpers that several of them share. A benchmark neither opens files (`folder.py`) nor runs a model
(`predictions.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]
Kind = Literal["text", "texts", "number", "picture", "pictures"]  # of the values of a column
Reference = str | Sequence[str]
Line = Mapping[str, Any]  # a prediction, as `predictions.py` writes it

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
      id: the data set's own id; "" if it has none. `Benchmark.questions_per_id` says whether it is unique.
      prompt: what the model is asked, with the suffix that asks for a short answer.
      pictures: the columns that hold its pictures, in the order in which the model sees them; pictures come first.
      reference: the right answer, or several, of which at least one has more than white space.
      facts: what the metric or the report needs besides, as JSON values: the category, the options.
    """

    id: str
    prompt: str
    pictures: Sequence[str]
    reference: Reference
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """What counts as one observation in an interval: a question, or several that are scored together.

    Attributes:
      key: names it in the data set; the same for every model.
      group: units of one group are resampled among themselves.
      value: in [0, 1]. The mean over groups of the mean over a group's units is `Benchmark.accuracy`.
    """

    key: str
    group: str
    value: float


def each_question(lines: Sequence[Line]) -> list[Unit]:
    """Returns a unit for each question, all of one group, whose value is the only score that the question has."""
    return [Unit(str(line["row"]), "", only_score(line)) for line in lines]


def only_score(line: Line) -> float:
    """Returns the score of a prediction that has one score."""
    (value,) = line["scores"].values()
    return value


@dataclass(frozen=True)
class PictureTable:
    """Pictures that stand in a table of their own.

    Attributes:
      files: as `Benchmark.files`.
      key: its column of keys, unique texts.
      picture: its column of pictures. Questions name it like a column of their own.
      refers: the column of the questions that holds a key.
    """

    files: Sequence[str]
    key: str
    picture: str
    refers: str


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
      name: as `--benchmark` takes it.
      repo: where the hub has its tables. The last part is also the name of its folder below a folder of several.
      split: the hub's name of the split.
      files: patterns of its files below its folder; the first that matches counts. More than one table (a folder for
        each subject) is read in the order of their names.
      columns: the columns that are read, with the kind of their values; others are ignored.
      optional: those of them that may be null. A list of texts never holds a null.
      level: "easy" or "hard", as the VISOR paper groups benchmarks.
      max_new_tokens: of an answer.
      item: makes the question of a row, whose pictures are not read for it; raises ValueError for a malformed one.
      score: (answer, item) -> the scores of one answer by metric, each in [0, 1].
      report: lines of one budget -> the reported numbers by name.
      headline: the reported number that stands for the benchmark in averages.
      headline_max: what a perfect model reaches there.
      units: lines of one budget -> the observations that the headline is a mean of.
      questions_per_id: how many questions at most have the same id, where the published table guarantees it: 1 if ids
        are unique, more if questions with one id are scored together. None: any number.
      images: the table that holds the pictures, if they are not in the rows.
      source: sha256 of the user's file that defines it; "" if the package does.
      file: the name of that file.
    """

    name: str
    repo: str
    split: str
    files: Sequence[str]
    columns: Mapping[str, Kind]
    level: str
    max_new_tokens: int
    item: Callable[[Row], Item]
    score: Callable[[str, Item], dict[str, float]]
    report: Callable[[Sequence[Line]], dict[str, float]]
    headline: str
    headline_max: float = 1.0
    units: Callable[[Sequence[Line]], list[Unit]] = each_question
    optional: Collection[str] = ()
    questions_per_id: int | None = None
    images: PictureTable | None = None
    source: str = ""
    file: str = ""

    def accuracy(self, reported: Mapping[str, float]) -> float:
        """Returns the headline of the reported numbers as a fraction in [0, 1]."""
        return reported[self.headline] / self.headline_max


# --- helpers of the files beside this one -----------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    """Returns the mean; 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def scores_of(lines: Sequence[Line], metric: str) -> list[float]:
    """Returns one score of every prediction."""
    return [line["scores"][metric] for line in lines]


def means(*metrics: str) -> Callable[[Sequence[Line]], dict[str, float]]:
    """Returns the report of a benchmark that averages these scores over all questions."""
    return lambda lines: {metric: mean(scores_of(lines, metric)) for metric in metrics}


def grouped(lines: Sequence[Line], fact: str) -> dict[str, list[Line]]:
    """Returns the predictions by one of their facts, in the order of first appearance."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line["facts"][fact], []).append(line)
    return groups


def accuracies(overall: str, by: str, name: str) -> Callable[[Sequence[Line]], dict[str, float]]:
    """Returns the report of the score "accuracy": over all questions, and by one of their facts.

    Args:
      overall: name of the number over all questions.
      by: the fact.
      name: of each further number, with "{}" for the value of the fact.
    """

    def report(lines: Sequence[Line]) -> dict[str, float]:
        parts = {name.format(value): mean(scores_of(part, "accuracy")) for value, part in grouped(lines, by).items()}
        return {overall: mean(scores_of(lines, "accuracy")), **parts}

    return report


def letter_of(index: int | str, options: Sequence[str]) -> str:
    """Returns the letter of the right option.

    Raises:
      ValueError: there is no such option.
    """
    if not 0 <= int(index) < len(options):
        raise ValueError(f"answer {index!r} of {len(options)} options; expected the number of one, from 0")
    return LETTERS[int(index)]


def checked_letter(text: str, letters: Sequence[str], column: str = "answer") -> str:
    """Returns the letter of the right option, as a capital letter.

    Raises:
      ValueError: `text`, of this column, is none of the letters.
    """
    letter = text.strip().upper()
    if letter not in [*letters]:
        raise ValueError(f"{column} {text!r}; expected one of {', '.join(letters)}")
    return letter


def checked_parts(references: Sequence[str]) -> Sequence[str]:
    """Returns references of a metric that looks for one of them inside the answer.

    Raises:
      ValueError: one is empty, and would be found in any answer.
    """
    for index, reference in enumerate(references):
        if not reference.strip():
            raise ValueError(
                f"answer[{index}] is {reference!r}, which any answer holds; expected a text that is not empty"
            )
    return references


def options_text(options: Sequence[str]) -> str:
    """Returns the options as lines "A. ...", "B. ..."."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
