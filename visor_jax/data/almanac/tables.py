"""The real tables of the data set (tables.json, see `build_tables`), and which split each belongs to.

Whole tables are held out: a page of "validation" or "test" shows only tables of that split. Every word of a held-out
table also occurs in training: crops, lists, small tables and pages with random content use the words of all tables in
every role.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Column:
    """One column of a table: its head, its unit ("" if none) and a whole number from 1 to 999 per label."""

    head: str
    unit: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """One real table: labels of the rows, columns of numbers, a title, and where it is from."""

    name: str
    split: str
    title: str
    package: str
    license: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]


@functools.cache
def all_tables() -> tuple[Table, ...]:
    """Returns all tables, in a fixed order."""
    listed = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
    return tuple(
        Table(
            name=each["name"],
            split=each["split"],
            title=each["title"],
            package=each["source"]["package"],
            license=each["source"]["license"],
            labels=tuple(each["labels"]),
            columns=tuple(Column(c["head"], c["unit"], tuple(c["values"])) for c in each["columns"]),
        )
        for each in listed
    )


@functools.cache
def tables_of(split: str) -> tuple[Table, ...]:
    """Returns the tables of a split: "train", "validation" or "test"."""
    return tuple(table for table in all_tables() if table.split == split)
