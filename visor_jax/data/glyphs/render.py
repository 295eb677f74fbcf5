"""Defines the alphabet of the glyph pictures and renders grids of glyphs.

In: integer grids (glyph and color ids) and a random generator. Out: uint8 RGB pictures of 8-pixel patches with at most
one glyph per patch. A vision tower that encodes patches separately therefore sees whole glyphs but no relations.
"""

from __future__ import annotations

import numpy as np

PATCH = 8  # pixels
COLOR_NOISE = 8.0  # standard deviation of a glyph's color, in gray levels, drawn per patch and channel
PIXEL_NOISE = 6.0  # standard deviation of every pixel and channel

LETTERS = tuple("ABCDEFHK")
DIGITS = tuple("12345678")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
ARROWS = ("up", "left")
EMPTY = "empty"
GLYPHS = (EMPTY, *LETTERS, *DIGITS, *SHAPES, *ARROWS)  # a glyph's id is its index here

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 240),
    "yellow": (235, 220, 50),
    "pink": (240, 120, 220),
    "white": (245, 245, 245),
}
BACKGROUNDS = {"black": (10, 10, 10), "grey": (110, 110, 110), "brown": (100, 60, 20), "navy": (15, 20, 90)}

FIRST_LETTER = GLYPHS.index(LETTERS[0])
FIRST_DIGIT = GLYPHS.index(DIGITS[0])
FIRST_SHAPE = GLYPHS.index(SHAPES[0])
UP = GLYPHS.index("up")
LEFT = GLYPHS.index("left")
WHITE = tuple(COLORS).index("white")

# Seven rows of five dots each.
_FONT = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "01110 10000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "circle": "01110 11111 11111 11111 11111 01110 00000",
    "square": "11111 11111 11111 11111 11111 11111 00000",
    "triangle": "00100 00100 01110 01110 11111 11111 00000",
    "cross": "00100 00100 11111 11111 00100 00100 00000",
    "ring": "01110 10001 10001 10001 10001 01110 00000",
    "up": "00100 01110 10101 00100 00100 00100 00100",
    "left": "00100 01000 11111 01000 00100 00000 00000",
}
_OFFSETS = ((0, 1), (1, 1), (0, 2), (1, 2))  # (down, right): offsets of a glyph inside its patch


def _dots() -> np.ndarray:
    """Returns every glyph at every offset: float32 [offsets, PATCH, PATCH, glyphs], 1 where the glyph is drawn."""
    dots = np.zeros((len(_OFFSETS), PATCH, PATCH, len(GLYPHS)), np.float32)
    for glyph, rows in _FONT.items():
        bitmap = np.array([[int(dot) for dot in row] for row in rows.split()], np.float32)
        for offset, (down, right) in enumerate(_OFFSETS):
            dots[offset, down : down + 7, right : right + 5, GLYPHS.index(glyph)] = bitmap
    return dots


# Indexed [glyph * offsets + offset]; a patch's pixels are flat, so that coloring works on long rows.
_DOTS = np.ascontiguousarray(_dots().transpose(3, 0, 1, 2)).reshape(-1, PATCH * PATCH)
_COLOR_VALUES = np.array(list(COLORS.values()), np.float32)
_BACKGROUND_VALUES = np.array(list(BACKGROUNDS.values()), np.float32)


def render(rng: np.random.Generator, glyphs: np.ndarray, colors: np.ndarray, background: int) -> np.ndarray:
    """Draws one picture.

    Args:
      rng: source of jitter and noise.
      glyphs: int [grid, grid], ids into `GLYPHS`; 0 draws nothing.
      colors: int [grid, grid], ids into `COLORS`; ignored where there is no glyph.
      background: id into `BACKGROUNDS`.

    Returns:
      uint8 [grid * PATCH, grid * PATCH, 3], RGB.
    """
    grid = glyphs.shape[0]
    patches = grid * grid
    offsets = rng.integers(0, len(_OFFSETS), patches)
    dots = _DOTS[glyphs.reshape(-1) * len(_OFFSETS) + offsets]  # [patches, pixels]
    paper = _BACKGROUND_VALUES[background]
    ink = _COLOR_VALUES[colors.reshape(-1)] + COLOR_NOISE * rng.standard_normal((patches, 3), np.float32)
    picture = PIXEL_NOISE * _noise(rng, 3 * patches * PATCH * PATCH).reshape(3, patches, PATCH * PATCH)
    picture += paper[:, None, None]
    picture += dots * (ink - paper).T[:, :, None]
    np.rint(picture, out=picture)
    np.clip(picture, 0, 255, out=picture)
    planes = picture.astype(np.uint8).reshape(3, grid, grid, PATCH, PATCH)  # [channel, row, column, y, x]
    return planes.transpose(1, 3, 2, 4, 0).reshape(grid * PATCH, grid * PATCH, 3)


def _noise(rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns nearly normal noise, float32 [count], mean 0, standard deviation 1.

    It sums four random bytes per value, which takes a third of the time of `standard_normal`.
    """
    words = rng.integers(0, 2**32, count, np.uint32)
    pairs = (words & 0x00FF00FF) + (words >> 8 & 0x00FF00FF)
    sums = (pairs + (pairs >> 16)) & 0x7FF
    noise = sums.astype(np.float32)
    noise -= 4 * 255 / 2
    noise /= np.sqrt(4 * (256**2 - 1) / 12, dtype=np.float32)
    return noise
