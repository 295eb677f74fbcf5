"""What an entry is: a table or a figure of the paper, what is run for it, and where its numbers come from.

In: nothing. Out: `Entry` and its parts, and the tables as text. Every file beside this one that is named for a table or
a figure makes an `Entry`; `entries.py` lists them.

A number has one of three origins: the paper (in the rows), the paper's scale measured or computed here (`PaperSource`),
or the embedded data set (`SmallSource`). What nobody has run is empty; a number of the paper that this project does not
have says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

Cells = Mapping[str, Mapping[str, float]]  # row -> column -> number

UNKNOWN = "not known here"
BY_FORMULA = "*"  # after a number that follows from the formulas, without any training


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
      key: names it in `Cells`.
      title: as tables show it, with its unit.
      suffix: written after a number, such as "x".
      digits: after the point.
    """

    key: str
    title: str
    suffix: str = ""
    digits: int = 1

    def shown(self, value: float | str | None) -> str:
        """Returns a number, or a range of the paper's, as text; "" for none."""
        if isinstance(value, str):
            return value
        return "" if value is None else f"{value:.{self.digits}f}{self.suffix}"


ACCURACY = (Column("easy", "easy, %"), Column("hard", "hard, %"))
SAVING = Column("saving", "saving of decoder FLOPs", suffix="x")


@dataclass(frozen=True)
class Row:
    """A row, with the numbers or ranges that the paper has in it, by column; others are not known here."""

    key: str
    title: str
    paper: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What the embedded data set's runs depend on.

    Attributes:
      seeds: of the runs.
      steps_scale: multiplies all steps; 1 is the shipped configuration.
      samples: questions of an analysis.
      results: the folder of the committed results, benchmarks/results.
      runs: the folder of runs.
      overrides: "--config.FIELD=VALUE", of the embedded data set's configuration.
    """

    seeds: Sequence[int]
    steps_scale: float
    samples: int
    results: Path
    runs: Path
    overrides: Sequence[str] = ()


class PaperSource(Protocol):
    """Where the numbers at the paper's scale come from."""

    def commands(self) -> list[str]:
        """Returns the commands, in order, as shell lines with variables (`runs.VARIABLES`)."""
        ...

    def files(self) -> list[str]:
        """Returns the files below the folder of the runs that numbers are read from; none if nothing is."""
        ...

    def read(self, runs: Path) -> Cells:
        """Returns what these commands have measured below a folder; what they have not, is missing."""
        ...


class SmallSource(Protocol):
    """Where the numbers on the embedded data set come from."""

    def commands(self, settings: Settings) -> list[str]:
        """Returns the commands that measure what is missing."""
        ...

    def run(self, settings: Settings) -> None:
        """Measures what is missing."""
        ...

    def read(self, settings: Settings) -> Cells:
        """Returns what was measured."""
        ...


@dataclass(frozen=True)
class Nothing:
    """The small source of an entry without a counterpart on the embedded data set."""

    def commands(self, settings: Settings) -> list[str]:
        """Returns no command."""
        return []

    def run(self, settings: Settings) -> None:
        """Does nothing: there is nothing to measure."""

    def read(self, settings: Settings) -> Cells:
        """Returns no number."""
        return {}


@dataclass(frozen=True)
class Entry:
    """A table or a figure of the paper.

    Attributes:
      name: as the command line takes it, "table2".
      title: as headings show it.
      columns: of its numbers.
      rows: with the paper's numbers.
      paper: what is run at the paper's scale.
      small: what is run on the embedded data set.
      formula: returns numbers of ours that need no run; a measured one takes their place.
      about: what it shows, and what the reader should know; Markdown.
      stands_for: row -> what stands for it on the embedded data set; rows without one have no counterpart.
      small_rows: rows on the embedded data set, where they are not those of `rows`.
      small_columns: columns on the embedded data set, where they are not those of `columns`.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    paper: PaperSource
    small: SmallSource
    formula: Callable[[], Cells] | None = None
    about: str = ""
    stands_for: Mapping[str, str] = field(default_factory=dict)
    small_rows: tuple[Row, ...] = ()
    small_columns: tuple[Column, ...] = ()


def comparison(entry: Entry, measured: Cells) -> Iterator[list[str]]:
    """Yields the table of an entry, its heading first: each column of the paper's with ours beside it.

    Args:
      measured: our numbers at the paper's scale.
    """
    computed = entry.formula() if entry.formula else {}
    yield ["", *(f"{column.title}, {whose}" for column in entry.columns for whose in ("paper", "ours"))]
    for row in entry.rows:
        cells = [row.title]
        for column in entry.columns:
            paper, ours = row.paper.get(column.key), measured.get(row.key, {}).get(column.key)
            formula = computed.get(row.key, {}).get(column.key)
            cells.append(UNKNOWN if paper is None else column.shown(paper))
            cells.append(column.shown(formula) + BY_FORMULA if ours is None and formula is not None else
                         column.shown(ours))  # fmt: skip
        yield cells


def small_table(entry: Entry, measured: Cells) -> Iterator[list[str]]:
    """Yields the same table with the embedded data set's numbers, its heading first."""
    named, columns = bool(entry.stands_for), entry.small_columns or entry.columns
    yield ["", *(["embedded data set"] if named else []), *(column.title for column in columns)]
    for row in entry.small_rows or entry.rows:
        about = [entry.stands_for.get(row.key, "-")] if named else []
        yield [row.title, *about, *(c.shown(measured.get(row.key, {}).get(c.key)) for c in columns)]


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table, its heading first, as Markdown; numbers are aligned to the right."""
    heading, *rows = table
    numbers = "-+0123456789"
    numeric = [
        column > 0 and all(row[column][:1] in numbers or row[column] == UNKNOWN for row in rows)
        for column in range(len(heading))
    ]
    lines = [heading, ["---:" if right else "---" for right in numeric], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def text(table: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table, its heading first, as lines of aligned text."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
