"""Random draws and the canvas: what every layout of the data set uses.

In: a random stream and the size of a picture. Out: uint8 [height, width, 3]. `Canvas` records where each text is drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from visor_jax.data.almanac.fonts import SIZES, line_height, text_mask, text_width
from visor_jax.data.almanac.words import BARS, INKS, PAPERS

NOISE = 3.0  # standard deviation of a pixel, of 255
TINT = 4.0  # standard deviation of a paper's color, of 255
LINE = 12  # pixels from one line of text to the next: a row of patches

_BLOCK = 256
T = TypeVar("T")


class Draws:
    """Random numbers of one sample: uniform doubles drawn in blocks, because single draws of NumPy are slow."""

    def __init__(self, *key: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        self._block: list[float] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Returns a number from `low` up to `high`; `low` if there is nothing between."""
        if not self._block:
            self._block = self._generator.random(_BLOCK).tolist()
        return low + self._block.pop() * max(0.0, high - low)

    def chance(self, probability: float) -> bool:
        """Returns True with the given probability."""
        return self.uniform() < probability

    def integer(self, low: int, high: int) -> int:
        """Returns a whole number from `low` to `high`, both included; `low` if `high` is below it."""
        return low + int(self.uniform() * max(1, high - low + 1))

    def one_of(self, items: Sequence[T]) -> T:
        """Returns one of `items`, all equally likely."""
        return items[int(self.uniform() * len(items))]

    def weighted(self, weights: Sequence[float]) -> int:
        """Returns an index, chosen in proportion to `weights`."""
        left = self.uniform() * sum(weights)
        for number, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return number
        return max(number for number, weight in enumerate(weights) if weight)

    def some_of(self, items: Sequence[T], count: int) -> list[T]:
        """Returns `count` different items in a random order."""
        rest = list(items)
        for number in range(count):
            other = self.integer(number, len(rest) - 1)
            rest[number], rest[other] = rest[other], rest[number]
        return rest[:count]


@functools.cache
def _noise() -> np.ndarray:
    return np.random.Generator(np.random.PCG64(5)).normal(0, NOISE, 2**19).astype(np.float32)


@dataclass(frozen=True)
class Drawn:
    """One text on a page and its box in pixels; right and bottom are excluded."""

    text: str
    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Style:
    """The look of one page."""

    face: str
    size: int
    paper: str
    ink: tuple[int, int, int]

    def width(self, text: str) -> int:
        """Returns the width of a text in pixels."""
        return text_width(text, self.face, self.size)

    @property
    def height(self) -> int:
        """Height in pixels from the top of capitals to the lowest descender."""
        return line_height(self.face, self.size)


def random_style(draws: Draws, faces: Sequence[str]) -> Style:
    """Returns a random face, size, paper and ink."""
    return Style(draws.one_of(faces), draws.one_of(SIZES), draws.one_of(tuple(PAPERS)), draws.one_of(INKS))


class Canvas:
    """A picture being drawn.

    Attributes:
      height, width: in pixels.
      texts: what is written on it, in the order of writing.
    """

    def __init__(self, draws: Draws, style: Style, height: int, width: int) -> None:
        self.height, self.width, self.style = height, width, style
        self.texts: list[Drawn] = []
        self._draws = draws
        self._pixels = np.empty((height, width, 3), np.float32)
        tint = [draws.uniform(-2 * TINT, 2 * TINT) for _ in range(3)]
        self._background = np.asarray(PAPERS[style.paper], np.float32) + tint
        self._pixels[:] = self._background

    def write(self, text: str, left: float, top: float, clear: bool = False) -> int:
        """Writes a text with its upper left corner at (left, top), moved onto the page; returns its right end.

        With `clear`, the box of the text is first filled with the paper's color.
        """
        mask = text_mask(text, self.style.face, self.style.size)
        height, width = mask.shape[:2]
        x = int(max(0, min(left, self.width - width)))
        y = int(max(0, min(top, self.height - height)))
        if clear:
            self._pixels[y : y + height, max(0, x - 1) : x + width + 1] = self._background
        part = self._pixels[y : y + height, x : x + width]
        part += mask * (np.asarray(self.style.ink, np.float32) - part)
        self.texts.append(Drawn(text, x, y, x + width, y + height))
        return x + width

    def bar(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        """Fills a rectangle, at least 2 pixels in both directions."""
        x, y = max(0, int(left)), max(0, int(top))
        self._pixels[y : max(y + 2, int(bottom)), x : max(x + 2, int(right))] = BARS[color]

    def rule(self, y: float) -> None:
        """Draws a thin line across the page."""
        row = self._pixels[int(max(0, min(y, self.height - 1)))]
        row += 0.5 * (np.asarray(self.style.ink, np.float32) - row)

    def stroke(self, points: Sequence[tuple[float, float]], color: str) -> None:
        """Draws a line of 2 pixels through points (x, y), which are sorted by x, and a dot at each."""
        columns = np.arange(int(points[0][0]), int(points[-1][0]) + 1)
        heights = np.interp(columns, [x for x, _ in points], [y for _, y in points])
        following = np.append(heights[1:], heights[-1])
        for x, low, high in zip(columns, np.minimum(heights, following), np.maximum(heights, following), strict=True):
            self._pixels[max(0, int(low)) : int(high) + 2, x] = BARS[color]
        for x, y in points:
            self.bar(x - 1, y - 1, x + 3, y + 3, color)

    def paste(self, picture: np.ndarray, left: float, top: float) -> None:
        """Pastes a picture, [height, width, 4] with its coverage last, with its upper left corner at (left, top)."""
        height, width = picture.shape[:2]
        part = self._pixels[int(top) : int(top) + height, int(left) : int(left) + width]
        part += picture[..., 3:] * (picture[..., :3] - part)

    def image(self) -> np.ndarray:
        """Returns the picture with noise, uint8 [height, width, 3]."""
        noise = _noise()
        size = self._pixels.size
        start = self._draws.integer(0, max(noise.size - size, size) - 1)
        part = noise[start : start + size] if start + size <= noise.size else np.resize(np.roll(noise, -start), size)
        pixels = self._pixels + part.reshape(self._pixels.shape)
        return np.clip(pixels, 0, 255).astype(np.uint8)
