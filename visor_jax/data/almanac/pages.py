"""Draws pages and small pictures: crops, lists, tables, horizontal bars and columns.

In: random draws and the settings of an exercise. Out: a `Page`: its picture and the facts that questions ask about.
Text stands on lines of `LINE` pixels, the rows of patches, moved down by the page's jitter; horizontally it is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from visor_jax.data.almanac.content import (
    Content,
    mixed_content,
    number_width,
    random_numbers,
    real_content,
    widths,
    words_up_to,
)
from visor_jax.data.almanac.draw import LINE, Canvas, Draws, Style, random_style
from visor_jax.data.almanac.words import BARS, content_words

KINDS = ("table", "bars", "columns")
COLUMN_GAP = 4  # least distance in pixels between two columns of a table

_FEW_LINES = 4  # on pictures of at most so many lines, text moves down within its line only
_TRIES = 8  # draws of content before a table gets fewer columns
_LEAST_WIDTH = 16  # pixels of a table's column: a short word or two digits


@dataclass(frozen=True)
class Look:
    """Settings of pages that hold for a whole run.

    Attributes:
      split: whose tables are shown.
      faces: names of the fonts.
      jitter: largest distance in pixels of text below its line.
      mixed: share of pages with mixed instead of real content.
    """

    split: str
    faces: Sequence[str]
    jitter: int
    mixed: float


@dataclass(frozen=True)
class Facts:
    """What a picture shows; all questions are answered from these.

    Attributes:
      kind: "crop", "list", "table", "bars" (horizontal), "grouped" (two colors of them), "columns" (vertical bars),
        "line", "receipt" or "card".
      paper: name of the paper's color.
      bar: name of the color of the bars or of the line; "" without them or with several colors.
      title: the title's word; "" without title.
      unit: the unit that the title names; "" without one.
      labels: from top to bottom, or of columns from left to right.
      heads: of a table's columns.
      values: per label, one per head; one where there are no heads.
      units: printed below the heads, one per head; empty: none.
      colors: of the series that the legend names, one per head; empty: no legend.
      picture: the word for what a card's picture shows; "" without one.
      total: the number in the last line of a receipt; 0 without one.
      lines: the whole text, line by line.
    """

    kind: str
    paper: str
    bar: str = ""
    title: str = ""
    unit: str = ""
    labels: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    values: tuple[tuple[int, ...], ...] = ()
    units: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()
    picture: str = ""
    total: int = 0
    lines: tuple[str, ...] = ()


@dataclass
class Page:
    """A canvas and its facts."""

    canvas: Canvas
    facts: Facts


@dataclass(frozen=True)
class Shape:
    """What an exercise draws.

    Attributes:
      height, width: of the picture in pixels; a width may be one of several.
      kinds: among which one is chosen.
      rows: least and most labels.
      columns: least and most columns of a table.
      titled: probability of a title.
      mixed: share of mixed content; None: that of the run.
      digits: of numbers, as in `content.random_numbers`; None: mostly two.
      barred: lists: probability of bars.
      weights: of `kinds`; empty: all equally often.
    """

    height: int
    width: tuple[int, ...]
    kinds: tuple[str, ...] = KINDS
    rows: tuple[int, int] = (2, 4)
    columns: tuple[int, int] = (1, 3)
    titled: float = 0.6
    mixed: float | None = None
    digits: int | None = None
    barred: float = 0.0
    weights: tuple[float, ...] = ()

    def only(self, kinds: Sequence[str]) -> Shape:
        """Returns this shape with some of its kinds; itself if `kinds` is empty."""
        if not kinds:
            return self
        weights = tuple(self.weights[self.kinds.index(kind)] for kind in kinds) if self.weights else ()
        return replace(self, kinds=tuple(kinds), weights=weights)


def draw_page(draws: Draws, shape: Shape, look: Look) -> Page:
    """Draws one picture of an exercise."""
    style = random_style(draws, look.faces)
    kind = shape.kinds[draws.weighted(shape.weights or (1.0,) * len(shape.kinds))]
    if kind == "crop":
        return _crop(draws, shape, look, style)
    canvas = Canvas(draws, style, shape.height, draws.one_of(shape.width))
    jitter = draws.integer(0, look.jitter)
    if shape.height <= _FEW_LINES * LINE:  # then the last line is needed
        jitter = min(jitter, LINE - style.height)
    if kind == "list":
        return _list(draws, shape, style, canvas, jitter)
    lines = (shape.height - style.height - jitter) // LINE + 1
    least = {"table": shape.rows[0] + 1, "bars": 2, "columns": 4}[kind]
    titled = lines > least and draws.chance(shape.titled)
    space = _Space(canvas, style, jitter, lines, int(titled))
    source = _Source(draws, look.split, look.mixed if shape.mixed is None else shape.mixed, shape.digits)
    content, facts = {"table": _table, "bars": _bars, "columns": _columns}[kind](draws, shape, space, source)
    return Page(canvas, _with_title(draws, canvas, style, jitter, content, facts, titled))


def _with_title(
    draws: Draws, canvas: Canvas, style: Style, jitter: int, content: Content, facts: Facts, titled: bool
) -> Facts:
    """Writes the title, with the unit where all columns have the same and it fits, and returns the complete facts."""
    if not titled:
        return facts
    title, unit = content.title, ""
    units = set(content.units)
    if len(units) == 1 and content.units[0] and style.width(f"{title} in {content.units[0]}") <= canvas.width:
        unit = content.units[0]
    text = f"{title} in {unit}" if unit else title
    canvas.write(text, draws.uniform(0, canvas.width - style.width(text)), jitter)
    return replace(facts, title=title, unit=unit, lines=(text, *facts.lines))


@dataclass(frozen=True)
class _Space:
    """Where a page's content may stand: on `lines` lines, of which the first `used` hold the title."""

    canvas: Canvas
    style: Style
    jitter: int
    lines: int
    used: int

    def top(self, line: int) -> int:
        """Returns the top of the text on a line."""
        return line * LINE + self.jitter


@dataclass(frozen=True)
class _Source:
    """Where content is from."""

    draws: Draws
    split: str
    mixed: float
    digits: int | None

    def listed(self, style: Style, count: int, label_limit: int) -> Content:
        """Returns content with one number per label and no head that is drawn."""
        if not self.draws.chance(self.mixed):
            for _ in range(_TRIES):
                content = real_content(self.draws, style, self.split, count, 1, label_limit)
                if content is not None:
                    return content
        content = mixed_content(self.draws, style, count, (label_limit, 100), self.digits)
        assert content is not None, "no words of this width"
        return content

    def tabular(self, style: Style, count: int, columns: int, room: int) -> Content:
        """Returns content of a table whose labels and columns are together at most `room` pixels wide.

        If nothing of the requested number of columns fits, the table has fewer.
        """
        real = not self.draws.chance(self.mixed)
        while True:
            for attempt in range(_TRIES):
                if real and attempt < _TRIES // 2:
                    content = real_content(self.draws, style, self.split, count, columns, room)
                else:
                    limits = self._limits(room, columns)
                    content = mixed_content(self.draws, style, count, limits, self.digits)
                if content is not None and sum(widths(style, content)) <= room:
                    return content
            columns -= 1
            room += COLUMN_GAP
            assert columns, "no table of one column fits"

    def _limits(self, room: int, columns: int) -> list[int]:
        """Returns random widths for labels and heads that add up to `room`."""
        shares = [0.5 + self.draws.uniform() for _ in range(columns + 1)]
        free = room - _LEAST_WIDTH * (columns + 1)
        return [int(_LEAST_WIDTH + free * share / sum(shares)) for share in shares]


def _crop(draws: Draws, shape: Shape, look: Look, style: Style) -> Page:
    """Draws one word or number, a bar, or a bar and a number; the picture is as wide as the word needs."""
    what = draws.weighted((0.4, 0.32, 0.17, 0.11))
    text = draws.one_of(content_words()) if what == 0 else str(random_numbers(draws, 1, _digits(draws))[0])
    width = next(size for size in shape.width if size >= style.width(text) or size == shape.width[-1])
    canvas = Canvas(draws, style, shape.height, width)
    top = draws.integer(0, shape.height // LINE - 1) * LINE + draws.integer(0, look.jitter)
    if what < 2:
        canvas.write(text, draws.uniform(0, width - style.width(text)), top)
        return Page(canvas, Facts("crop", style.paper, lines=(text,)))
    color = draws.one_of(tuple(BARS))
    left, length = draws.uniform(0, 14), draws.uniform(4, 20)
    if what == 3:
        canvas.bar(left, top, left + length, top + (LINE if draws.chance(0.5) else style.height), color)
        return Page(canvas, Facts("crop", style.paper, bar=color))
    length = min(length, width - style.width(text) - left - 2)
    canvas.bar(left, top, left + length, top + style.height, color)
    canvas.write(text, left + max(2, length) + 2, top)
    return Page(canvas, Facts("crop", style.paper, bar=color, lines=(text,)))


def _digits(draws: Draws) -> int:
    """Returns 2 mostly, else 0: any number of digits."""
    return 2 if draws.chance(0.85) else 0


def _list(draws: Draws, shape: Shape, style: Style, canvas: Canvas, jitter: int) -> Page:
    """Draws lines of a word and a number on random lines, in some exercises with a bar between the two."""
    slots = (canvas.height - style.height - jitter) // LINE + 1
    count = min(draws.integer(*shape.rows), slots)
    tops = [slot * LINE + jitter for slot in sorted(draws.some_of(range(slots), count))]
    barred = draws.chance(shape.barred)
    digits = _digits(draws) if shape.digits is None else shape.digits
    numbers = random_numbers(draws, count, digits)
    digits_width = max(style.width(str(number)) for number in numbers)
    label_width = canvas.width - digits_width - (18 if barred else 4)
    labels = draws.some_of(words_up_to(style.face, style.size, label_width), count)
    wide = max(style.width(label) for label in labels)
    color = draws.one_of(tuple(BARS)) if barred else ""
    right_aligned = draws.chance(0.5)
    left = draws.uniform(0, min(6, label_width - wide) if barred else label_width - wide)
    scale = (canvas.width - left - wide - digits_width - 6) / max(numbers) / draws.uniform(1, 1.3)
    for label, number, top in zip(labels, numbers, tops, strict=True):
        start = left + wide - style.width(label) if right_aligned else left
        end = canvas.write(label, start, top)
        if barred:
            tip = left + wide + 3 + max(2, number * scale)
            canvas.bar(left + wide + 3, top, tip, top + style.height, color)
            canvas.write(str(number), tip + 2, top)
        else:
            canvas.write(str(number), (left + wide if right_aligned else end) + draws.uniform(3, 8), top)
    facts = Facts(
        "bars" if barred else "list",
        style.paper,
        bar=color,
        labels=tuple(labels),
        values=tuple((number,) for number in numbers),
        lines=tuple(f"{label} {number}" for label, number in zip(labels, numbers, strict=True)),
    )
    return Page(canvas, facts)


def _table(draws: Draws, shape: Shape, space: _Space, source: _Source) -> tuple[Content, Facts]:
    """Draws a table with a head per column: labels at the left, numbers below the heads."""
    canvas, style = space.canvas, space.style
    free = space.lines - space.used
    count = min(draws.integer(*shape.rows), free - 1)
    columns = draws.integer(*shape.columns)
    content = source.tabular(style, count, columns, canvas.width - 1 - COLUMN_GAP * columns)
    texts = [[head, *(str(row[column]) for row in content.values)] for column, head in enumerate(content.heads)]
    wide, *each = widths(style, content)
    gap = min((canvas.width - 1 - wide - sum(each)) / len(each), draws.uniform(COLUMN_GAP, 12))
    left = draws.uniform(0, canvas.width - 1 - wide - sum(each) - gap * len(each))
    starts = [left + wide + gap * (column + 1) + sum(each[:column]) for column in range(len(each))]
    pitch = 2 if 2 * count + 1 <= free and draws.chance(0.4) else 1
    first = space.used + draws.integer(0, free - pitch * count - 1)
    rule, right_aligned = draws.integer(0, 2), draws.chance(0.5)
    for start, head in zip(starts, content.heads, strict=True):
        canvas.write(head, start, space.top(first))
    for number, label in enumerate(content.labels):
        top = space.top(first + (number + 1) * pitch)
        if rule == 1 or (rule == 2 and number == 0):
            canvas.rule(top - 1)
        canvas.write(label, left, top)
        for start, width, column in zip(starts, each, texts, strict=True):
            text = column[number + 1]
            canvas.write(text, start + (width - style.width(text) if right_aligned else 0), top)
    facts = Facts(
        "table",
        style.paper,
        labels=content.labels,
        heads=content.heads,
        values=content.values,
        lines=(" ".join(content.heads), *_rows(content)),
    )
    return content, facts


def _bars(draws: Draws, shape: Shape, space: _Space, source: _Source) -> tuple[Content, Facts]:
    """Draws horizontal bars, each with its label at the left and its number at the end."""
    canvas, style = space.canvas, space.style
    free = space.lines - space.used
    count = max(2, min(draws.integer(2, shape.rows[1] + 1), free))
    content = source.listed(style, count, canvas.width - style.width("000") - 16)
    color = draws.one_of(tuple(BARS))
    wide = max(style.width(label) for label in content.labels)
    pitch = 2 if 2 * count - 1 <= free and draws.chance(0.4) else 1
    first = space.used + draws.integer(0, free - pitch * (count - 1) - 1)
    room = canvas.width - wide - 3 - 2 - number_width(style, content)
    scale = room / max(row[0] for row in content.values) / draws.uniform(1, 1.3)
    left_aligned = draws.chance(0.5)
    for number, (label, row) in enumerate(zip(content.labels, content.values, strict=True)):
        top = space.top(first + number * pitch)
        canvas.write(label, 0 if left_aligned else wide - style.width(label), top)
        tip = wide + 3 + max(2, row[0] * scale)
        canvas.bar(wide + 3, top, tip, top + style.height, color)
        canvas.write(str(row[0]), tip + 2, top)
    return content, _bar_facts("bars", style, color, content)


def _columns(draws: Draws, shape: Shape, space: _Space, source: _Source) -> tuple[Content, Facts]:
    """Draws vertical bars, each with its label below and its number above."""
    canvas, style = space.canvas, space.style
    most = max(2, min((3 if style.size > 9 else 4) * canvas.width // 96, shape.rows[1]))
    count = draws.integer(2, most)
    pitch = (canvas.width - 1) / count
    content = source.listed(style, count, int(pitch) - 2)
    color = draws.one_of(tuple(BARS))
    bottom = space.top(space.lines - 1)
    top = space.top(space.used + 1)
    scale = (bottom - 1 - top) / max(row[0] for row in content.values) / draws.uniform(1, 1.2)
    for number, (label, row) in enumerate(zip(content.labels, content.values, strict=True)):
        left = 0.5 + number * pitch
        height = max(2, int(row[0] * scale))
        canvas.bar(left + 3, bottom - 1 - height, left + min(pitch - 3, 16), bottom - 1, color)
        canvas.write(label, left, bottom)
        line = max(space.used, (bottom - 1 - height - space.jitter) // LINE - 1)
        canvas.write(str(row[0]), left + 3, space.top(line))
    return content, _bar_facts("columns", style, color, content)


def _bar_facts(kind: str, style: Style, color: str, content: Content) -> Facts:
    return Facts(
        kind, style.paper, bar=color, labels=content.labels, values=content.values, lines=tuple(_rows(content))
    )


def _rows(content: Content) -> list[str]:
    return [
        " ".join((label, *(str(value) for value in row)))
        for label, row in zip(content.labels, content.values, strict=True)
    ]
