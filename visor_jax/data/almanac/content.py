"""Chooses what stands on a page: labels, heads, a title, units and numbers, real or mixed.

In: random draws, a split and how much fits. Out: `Content`. Real content is a part of one table of the split; mixed
content combines any words of the vocabulary with random numbers, so that no answer follows from knowledge of the world.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from visor_jax.data.almanac.draw import Draws, Style
from visor_jax.data.almanac.tables import Column, Table, tables_of
from visor_jax.data.almanac.words import content_words, units


@dataclass(frozen=True)
class Content:
    """What a page shows: `values[i][j]` belongs to label i and head j; `units[j]` is "" where head j has none."""

    title: str
    labels: tuple[str, ...]
    heads: tuple[str, ...]
    units: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]


@functools.lru_cache(4096)
def words_up_to(face: str, size: int, width: int, vocabulary: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the words of `vocabulary`, or all content words if it is empty, of at most `width` pixels."""
    style = Style(face, size, "", (0, 0, 0))
    return tuple(word for word in vocabulary or content_words() if style.width(word) <= width)


def random_numbers(draws: Draws, count: int, digits: int = 2) -> list[int]:
    """Returns `count` different random numbers of `digits` digits; 0 digits: of one, two or three, mostly two."""
    low, high = {0: (1, 999), 1: (1, 9), 2: (10, 99), 3: (100, 999)}[digits]
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        if digits == 0:
            low, high = ((1, 9), (10, 99), (10, 99), (10, 99), (100, 999))[draws.integer(0, 4)]
        chosen.setdefault(draws.integer(low, high))
    return list(chosen)


def number_width(style: Style, content: Content) -> int:
    """Returns the width of the widest number in pixels."""
    return max(style.width(str(value)) for row in content.values for value in row)


def widths(style: Style, content: Content) -> list[int]:
    """Returns the widths in pixels of the labels and of each column with its head."""
    columns = [
        max(style.width(head), *(style.width(str(row[number])) for row in content.values))
        for number, head in enumerate(content.heads)
    ]
    return [max(style.width(label) for label in content.labels), *columns]


def mixed_content(
    draws: Draws,
    style: Style,
    count: int,
    limits: Sequence[int],
    digits: int | None,
    vocabulary: tuple[str, ...] = (),
) -> Content | None:
    """Returns random words and numbers, or None if too few words fit.

    Args:
      draws: the random stream.
      style: font and size.
      count: number of labels.
      limits: widths in pixels that the labels and each head may have.
      digits: of the numbers, as in `random_numbers`; None: mostly two on the whole page.
      vocabulary: the only labels and heads; empty: all content words.
    """
    fitting = [words_up_to(style.face, style.size, limit, vocabulary) for limit in limits]
    columns = len(limits) - 1
    if any(len(words) < count + columns for words in fitting):
        return None
    labels = draws.some_of(fitting[0], count)
    heads: list[str] = []
    while len(heads) < columns:
        word = draws.one_of(fitting[len(heads) + 1])
        if word not in labels and word not in heads:
            heads.append(word)
    if digits is None:
        digits = 2 if draws.chance(0.85) else 0
    numbers = random_numbers(draws, count * columns, digits)
    values = tuple(tuple(numbers[row * columns : (row + 1) * columns]) for row in range(count))
    unit = draws.one_of(units()) if draws.chance(0.5) else ""
    return Content(draws.one_of(content_words()), tuple(labels), tuple(heads), (unit,) * columns, values)


def real_content(draws: Draws, style: Style, split: str, count: int, columns: int, label_limit: int) -> Content | None:
    """Returns rows and columns of a random table of the split; None if it has fewer, or fewer of the given width."""
    table = draws.one_of(tables_of(split))
    fitting = _rows_up_to(style, table, label_limit)
    if len(fitting) < count or len(table.columns) < columns:
        return None
    return _part(draws, table, draws.some_of(fitting, count), draws.some_of(table.columns, columns))


def searched_content(
    draws: Draws, style: Style, split: str, count: int, columns: int, room: int, *, with_numbers: bool
) -> Content | None:
    """Returns rows and columns of a table of the split that fit; None if no table has such a part.

    Tries all tables, and all columns of each, in random order.

    Args:
      draws: the random stream.
      style: font and size.
      split: whose tables.
      count: number of rows.
      columns: number of columns.
      room: width in pixels that a row may have.
      with_numbers: whether heads and numbers take a part of `room`, or labels alone.
    """
    tables = tables_of(split)
    for table in draws.some_of(tables, len(tables)):
        choices = list(itertools.combinations(table.columns, columns))
        for chosen in draws.some_of(choices, len(choices)):
            taken = sum(_column_width(style, column) for column in chosen) if with_numbers else 0
            fitting = _rows_up_to(style, table, room - taken)
            if len(fitting) >= count:
                return _part(draws, table, draws.some_of(fitting, count), draws.some_of(chosen, columns))
    return None


def _rows_up_to(style: Style, table: Table, width: int) -> list[int]:
    """Returns the rows whose labels have at most `width` pixels."""
    return [number for number, label in enumerate(table.labels) if style.width(label) <= width]


def _column_width(style: Style, column: Column) -> int:
    """Returns the width of a column in pixels, whatever its rows."""
    return max(style.width(column.head), *(style.width(str(value)) for value in column.values))


def _part(draws: Draws, table: Table, rows: Sequence[int], columns: Sequence[Column]) -> Content:
    title = columns[0].head if len(columns) == 1 and draws.chance(0.5) else table.title
    return Content(
        title,
        tuple(table.labels[row] for row in rows),
        tuple(column.head for column in columns),
        tuple(column.unit for column in columns),
        tuple(tuple(column.values[row] for column in columns) for row in rows),
    )
