"""What all layouts share: the settings of a picture, the lines that are free, and where its content is from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from visor_jax.data.almanac.content import Content, mixed_content, real_content, searched_content, widths
from visor_jax.data.almanac.draw import LINE, Canvas, Draws, Style

KINDS = ("table", "bars", "columns")
MORE_KINDS = (*KINDS, "units", "grouped", "line", "receipt", "card")
COLUMN_GAP = 4  # least distance in pixels between two columns of a table

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
      vocabulary: the only labels and heads of mixed content; empty: all content words.
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
    vocabulary: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def only(self, kinds: Sequence[str]) -> Shape:
        """Returns this shape with some of its kinds; itself if `kinds` is empty."""
        if not kinds:
            return self
        weights = tuple(self.weights[self.kinds.index(kind)] for kind in kinds) if self.weights else ()
        return replace(self, kinds=tuple(kinds), weights=weights)


@dataclass(frozen=True)
class Space:
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
class ContentSource:
    """Where content is from."""

    draws: Draws
    split: str
    mixed: float
    digits: int | None
    vocabulary: tuple[str, ...] = ()

    def listed(self, style: Style, count: int, label_limit: int) -> Content:
        """Returns content with one number per label and no head that is drawn."""
        if content := self._searched(style, count, 1, label_limit, with_numbers=False):
            return content
        if not self.draws.chance(self.mixed):
            for _ in range(_TRIES):
                content = real_content(self.draws, style, self.split, count, 1, label_limit)
                if content is not None:
                    return content
        content = mixed_content(self.draws, style, count, (label_limit, 100), self.digits, self.vocabulary)
        assert content is not None, "no words of this width"
        return content

    def tabular(self, style: Style, count: int, columns: int, room: int) -> Content:
        """Returns content of a table whose labels and columns are together at most `room` pixels wide.

        If nothing of the requested number of columns fits, the table has fewer.
        """
        for fewer in range(columns, 0, -1):
            wider = room + COLUMN_GAP * (columns - fewer)
            if content := self._searched(style, count, fewer, wider, with_numbers=True):
                return content
        real = not self.draws.chance(self.mixed)
        while True:
            for attempt in range(_TRIES):
                if real and attempt < _TRIES // 2:
                    content = real_content(self.draws, style, self.split, count, columns, room)
                else:
                    limits = self._limits(room, columns)
                    content = mixed_content(self.draws, style, count, limits, self.digits, self.vocabulary)
                if content is not None and sum(widths(style, content)) <= room:
                    return content
            columns -= 1
            room += COLUMN_GAP
            assert columns, "no table of one column fits"

    def _searched(self, style: Style, count: int, columns: int, room: int, *, with_numbers: bool) -> Content | None:
        """Returns real content that fits if no content may be mixed; None otherwise, or if no table has any."""
        if self.mixed:
            return None
        return searched_content(self.draws, style, self.split, count, columns, room, with_numbers=with_numbers)

    def _limits(self, room: int, columns: int) -> list[int]:
        """Returns random widths for labels and heads that add up to `room`."""
        shares = [0.5 + self.draws.uniform() for _ in range(columns + 1)]
        free = room - _LEAST_WIDTH * (columns + 1)
        return [int(_LEAST_WIDTH + free * share / sum(shares)) for share in shares]


def text_rows(content: Content) -> list[str]:
    """Returns the text of each label with its numbers."""
    return [
        " ".join((label, *(str(value) for value in row)))
        for label, row in zip(content.labels, content.values, strict=True)
    ]
