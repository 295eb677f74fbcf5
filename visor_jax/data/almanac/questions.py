"""The tasks: which questions a page answers, their wording, and their answers.

In: the facts of a page. Out: for each task the list of its questions, each with the answer that follows from the facts.
A question whose answer would be ambiguous is never asked, such as a number that stands twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from visor_jax.data.almanac.facts import Facts
from visor_jax.data.almanac.words import NONE, TOTAL


@dataclass(frozen=True)
class Task:
    """One task: its level, its wording, and its questions on given facts, each (fields of the wording, answer).

    `answers` are answers that occur neither on a page nor among the colors.
    """

    level: str
    phrasings: tuple[str, ...]
    ask: Callable[[Facts], Iterator[tuple[Mapping[str, str], str]]]
    answers: tuple[str, ...] = ()


Fields = Iterator[tuple[Mapping[str, str], str]]
# What "kind" answers; pages of two kinds of bars have one name.
KINDS = {
    "list": "list", "table": "table", "bars": "bars", "grouped": "bars", "columns": "columns", "line": "line",
    "receipt": "receipt", "card": "card",
}  # fmt: skip
LISTED = ("list", "bars", "columns", "line", "receipt", "card")  # one number per label
ACROSS = ("columns", "line")  # their labels stand side by side


def _kind(facts: Facts) -> Fields:
    if facts.kind != "crop":
        yield {}, KINDS[facts.kind]


def _paper(facts: Facts) -> Fields:
    yield {}, facts.paper


def _bar_color(facts: Facts) -> Fields:
    if facts.bar and facts.kind != "line":
        yield {}, facts.bar


def _line_color(facts: Facts) -> Fields:
    if facts.kind == "line":
        yield {}, facts.bar


def _direction(facts: Facts) -> Fields:
    if facts.kind in ("bars", "grouped", "columns"):
        yield {}, "up" if facts.kind == "columns" else "across"


def _picture(facts: Facts) -> Fields:
    if facts.picture:
        yield {}, facts.picture


def _title(facts: Facts) -> Fields:
    if facts.kind not in ("crop", "list"):
        yield {}, facts.title or NONE


def _unit(facts: Facts) -> Fields:
    if facts.title and not facts.units:
        yield {}, facts.unit or NONE


def _column_unit(facts: Facts) -> Fields:
    for head, unit in zip(facts.heads, facts.units, strict=False):
        yield {"c": head}, unit


def _legend(facts: Facts) -> Fields:
    for head, color in zip(facts.heads, facts.colors, strict=False):
        yield {"c": head}, color


def _legend_of(facts: Facts) -> Fields:
    for head, color in zip(facts.heads, facts.colors, strict=False):
        yield {"b": color}, head


def _trend(facts: Facts) -> Fields:
    if facts.kind == "line" and facts.values[0] != facts.values[-1]:
        yield {}, "rise" if facts.values[-1] > facts.values[0] else "fall"


def _total(facts: Facts) -> Fields:
    if facts.total:
        yield {}, str(facts.total)


def _count(facts: Facts) -> Fields:
    if facts.labels:
        yield {}, str(len(facts.labels))


def _read(facts: Facts) -> Fields:
    if facts.lines:
        yield {}, "\n".join(facts.lines)


def _value(facts: Facts) -> Fields:
    if facts.kind in LISTED:
        for label, row in zip(facts.labels, facts.values, strict=True):
            yield {"a": label}, str(row[0])


def _who(facts: Facts) -> Fields:
    if facts.kind in LISTED:
        numbers = [row[0] for row in facts.values]
        for label, number in zip(facts.labels, numbers, strict=True):
            if numbers.count(number) == 1:
                yield {"v": str(number)}, label


def _followers(facts: Facts) -> tuple[str, ...]:
    """Returns for each label the next one; after the last stands "none", or the total of a receipt."""
    return (*facts.labels[1:], TOTAL if facts.total else NONE)


def _below(facts: Facts) -> Fields:
    if facts.kind not in ACROSS:
        for label, following in zip(facts.labels, _followers(facts), strict=True):
            yield {"a": label}, following


def _above(facts: Facts) -> Fields:
    if facts.kind not in ACROSS:
        for label, before in zip(facts.labels, (NONE, *facts.labels[:-1]), strict=True):
            yield {"a": label}, before


def _right(facts: Facts) -> Fields:
    if facts.kind in ACROSS:
        for label, following in zip(facts.labels, _followers(facts), strict=True):
            yield {"a": label}, following


def _row(facts: Facts) -> Fields:
    for number, label in enumerate(facts.labels, 1):
        yield {"k": str(number)}, label


def _single(facts: Facts, column: int, choose: Callable[[list[int]], int]) -> int | None:
    """Returns the row of a column's largest or smallest number; None if it stands twice."""
    numbers = [row[column] for row in facts.values]
    return numbers.index(choose(numbers)) if numbers.count(choose(numbers)) == 1 else None


def _extreme(choose: Callable[[list[int]], int]) -> Callable[[Facts], Fields]:
    """Returns the questions for the label of the largest or smallest number, per column of a table."""

    def ask(facts: Facts) -> Fields:
        for column in range(len(facts.values[0]) if len(facts.labels) > 1 else 0):
            row = _single(facts, column, choose)
            if row is not None:
                where = f" in {facts.heads[column]}" if len(facts.heads) > 1 else ""
                yield {"where": where}, facts.labels[row]

    return ask


def _more(facts: Facts) -> Fields:
    if facts.kind in LISTED:
        for i, a in enumerate(facts.labels):
            for j, b in enumerate(facts.labels):
                if facts.values[i][0] != facts.values[j][0]:
                    yield {"a": a, "b": b}, a if facts.values[i][0] > facts.values[j][0] else b


def _cell(columns: int) -> Callable[[Facts], Fields]:
    """Returns the questions for one cell of a table with `columns` columns."""

    def ask(facts: Facts) -> Fields:
        if facts.kind == "table" and len(facts.heads) == columns:
            for label, row in zip(facts.labels, facts.values, strict=True):
                for head, value in zip(facts.heads, row, strict=True):
                    yield {"a": label, "c": head}, str(value)

    return ask


def _series(facts: Facts) -> Fields:
    if facts.colors:
        for label, row in zip(facts.labels, facts.values, strict=True):
            for head, value in zip(facts.heads, row, strict=True):
                yield {"a": label, "c": head}, str(value)


def _line(facts: Facts) -> Fields:
    if len(facts.heads) > 1:
        for label, row in zip(facts.labels, facts.values, strict=True):
            yield {"a": label}, " ".join(map(str, row))


def _column(facts: Facts) -> Fields:
    if facts.kind == "table":
        for number, head in enumerate(facts.heads):
            yield {"c": head}, " ".join(str(row[number]) for row in facts.values)


def _below_top(facts: Facts) -> Fields:
    if len(facts.labels) > 1 and len(facts.values[0]) == 1 and facts.kind not in ACROSS:
        row = _single(facts, 0, max)
        if row is not None:
            yield {}, _followers(facts)[row]


def _other_column(facts: Facts) -> Fields:
    if facts.kind == "table" and len(facts.labels) > 1:
        for column, head in enumerate(facts.heads):
            row = _single(facts, column, max)
            for other, value in zip(facts.heads, facts.values[row] if row is not None else (), strict=False):
                if other != head:
                    yield {"c": head, "d": other}, str(value)


def _unit_of_largest(facts: Facts) -> Fields:
    if len(set(facts.units)) > 1:
        for label, row in zip(facts.labels, facts.values, strict=True):
            if row.count(max(row)) == 1:
                yield {"a": label}, facts.units[row.index(max(row))]


_CELL = ("{a} in {c}?", "{c} of {a}?", "What is {a} in {c}?", "Value of {a} in {c}?")
_TOP = ("Largest{where}?", "Which is largest{where}?", "Most{where}?", "Highest{where}?")
_LOW = ("Smallest{where}?", "Which is smallest{where}?", "Least{where}?", "Lowest{where}?")

TASKS: dict[str, Task] = {
    "kind": Task("easy", ("What is this?", "Kind of page?", "What is shown?"), _kind, tuple(KINDS.values())),
    "paper": Task("easy", ("Color of the page?", "Which paper color?", "Background color?"), _paper),
    "bars": Task("easy", ("Color of the bars?", "Which bar color?", "Bar color?"), _bar_color),
    "line_color": Task("easy", ("Color of the line?", "Which line color?", "Line color?"), _line_color),
    "direction": Task("easy", ("Bars across or up?", "Direction of the bars?"), _direction, ("across", "up")),
    "picture": Task("easy", ("Which picture?", "What is in the picture?", "Name the picture."), _picture),
    "title": Task("middle", ("Title?", "What is the title?", "Name the title."), _title),
    "unit": Task("middle", ("Unit?", "What is the unit?", "In which unit?"), _unit),
    "column_unit": Task("middle", ("Unit of {c}?", "Which unit has {c}?", "In which unit is {c}?"), _column_unit),
    "legend": Task("middle", ("Color of {c}?", "Which color is {c}?", "Which color has {c}?"), _legend),
    "trend": Task(
        "middle", ("Rise or fall?", "Does it rise or fall?", "Does the line rise or fall?"), _trend, ("rise", "fall")
    ),
    "count": Task("middle", ("How many labels?", "Number of labels?", "Count the labels."), _count),
    "read": Task("middle", ("Read.", "Read the page.", "Read all text."), _read),
    "value": Task("hard", ("Value of {a}?", "What is {a}?", "Number for {a}?", "How much is {a}?"), _value),
    "who": Task("hard", ("Which has {v}?", "What has {v}?", "Label of {v}?", "Whose value is {v}?"), _who),
    "below": Task("hard", ("Below {a}?", "What is below {a}?", "Which follows {a}?", "Next after {a}?"), _below),
    "above": Task("hard", ("Above {a}?", "What is above {a}?", "Which is before {a}?"), _above),
    "right": Task("hard", ("Right of {a}?", "What is right of {a}?", "Next to the right of {a}?"), _right),
    "row": Task("hard", ("Row {k}?", "Name row {k}.", "Label number {k}?", "Which label is number {k}?"), _row),
    "top": Task("hard", _TOP, _extreme(max)),
    "low": Task("hard", _LOW, _extreme(min)),
    "more": Task("hard", ("More: {a} or {b}?", "Which is more, {a} or {b}?", "Larger: {a} or {b}?"), _more),
    "cell1": Task("hard", ("Value of {a}?", "What is {a}?", *_CELL[:2]), _cell(1)),
    "cell2": Task("hard", _CELL, _cell(2)),
    "cell3": Task("hard", _CELL, _cell(3)),
    "total": Task("hard", ("Total?", "What is the total?", "Sum of all?", "How much in all?"), _total),
    "series": Task("hard", _CELL, _series),
    "legend_of": Task("hard", ("Which is {b}?", "What is {b}?", "Name of the {b} bars?"), _legend_of),
    "line": Task("hard", ("All of {a}?", "Numbers of {a}?", "Read row {a}."), _line),
    "column": Task("hard", ("All in {c}?", "Numbers in {c}?", "Read column {c}."), _column),
    "below_top": Task(
        "hard", ("Below the largest?", "What is below the largest?", "Which follows the largest?"), _below_top
    ),
    "two_step": Task(
        "hard",
        ("{d} where {c} is largest?", "{d} of the largest {c}?", "{d} of the highest {c}?"),
        _other_column,
    ),
    "unit_step": Task(
        "hard",
        ("In which unit is {a} largest?", "Unit where {a} is largest?", "Unit of the largest of {a}?"),
        _unit_of_largest,
    ),
}


def questions(task: str, facts: Facts) -> list[tuple[Mapping[str, str], str]]:
    """Returns all questions of a task that the facts answer: (fields of the wording, answer) each."""
    return list(TASKS[task].ask(facts))
