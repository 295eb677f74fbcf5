"""Masks of text in the fonts of the atlas.

In: a text of printable ASCII, a face and a size in pixels. Out: its mask. The masks of characters are precomputed
(atlas.npz, see `build_atlas`), so that no font has to be installed; the masks of texts are cached.
"""

from __future__ import annotations

import functools
import string
from pathlib import Path

import numpy as np

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " "
SIZES = (9, 10, 11)
# The first four are drawn in training; the others only by the exercises with unseen fonts.
FACES = ("DejaVu Sans", "DejaVu Serif", "Arimo", "Tinos", "Cousine", "Arimo Bold")
TRAINING_FACES = FACES[:4]
UNSEEN_FACES = FACES[4:]
HEIGHT, WIDTH, LEFT = 15, 18, 3  # of a character's mask; its origin is `LEFT` pixels from the left

_COLUMN = {character: number for number, character in enumerate(CHARACTERS)}


@functools.cache
def _atlas() -> tuple[np.ndarray, np.ndarray]:
    with np.load(Path(__file__).with_name("atlas.npz"), allow_pickle=False) as arrays:
        return arrays["masks"], arrays["advances"].astype(int)


@functools.cache
def _rows(face: str, size: int) -> tuple[int, int]:
    """Returns the first row of a character's mask that a letter or digit touches, and the row after the last."""
    masks = _atlas()[0][FACES.index(face), SIZES.index(size), : len(string.digits + string.ascii_letters)]
    rows = np.flatnonzero(masks.max((0, 2)) > 40)
    return int(rows[0]), int(rows[-1]) + 1


def line_height(face: str, size: int) -> int:
    """Returns the height of a line of text in pixels, from the top of the capitals to the lowest descender."""
    top, bottom = _rows(face, size)
    return bottom - top


@functools.lru_cache(16384)
def text_mask(text: str, face: str, size: int) -> np.ndarray:
    """Returns the coverage of `text`, float32 [line_height, width, 1] from 0 to 1, without empty columns at the sides.

    The baseline of all texts of one face and size is in the same row. Raises KeyError for a character that is not
    printable ASCII.
    """
    masks, advances = (array[FACES.index(face), SIZES.index(size)] for array in _atlas())
    columns = [_COLUMN[character] for character in text]
    starts = np.cumsum([0, *(advances[column] for column in columns)])
    canvas = np.zeros((HEIGHT, starts[-1] + WIDTH), np.float32)
    for column, start in zip(columns, starts[:-1], strict=True):
        part = canvas[:, start : start + WIDTH]
        np.maximum(part, masks[column], out=part)
    inked = np.flatnonzero(canvas.max(0) > 0)
    top, bottom = _rows(face, size)
    return np.ascontiguousarray(canvas[top:bottom, inked[0] : inked[-1] + 1, None] / 255)


def text_width(text: str, face: str, size: int) -> int:
    """Returns the width of `text` in pixels."""
    return text_mask(text, face, size).shape[1]
