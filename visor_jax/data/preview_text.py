"""Draws text of any script on a picture; replaces characters that no font has by readable names.

In: a text. Out: its width, or the text drawn. The first font is DejaVu Sans, which ships with matplotlib (Latin, Greek,
Cyrillic, Arabic, ...); characters that it lacks are looked up in the fonts installed on this computer. A character that
no font has is written as its name (`:large_red_circle:`) or number (`[U+8272]`), never as an empty box.
"""

from __future__ import annotations

import functools
import unicodedata
from itertools import groupby

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

_JOINERS = "\u200c\u200d"  # affect the shapes of the letters around them
_VARIATIONS = "\ufe0e\ufe0f"  # select a variant of an emoji
# Fonts that have a box or a letter for every code point, or symbols instead of text.
_NO_TEXT = ("Last Resort", "LastResort", "cmb10", "cmex10", "cmmi10", "cmr10", "cmss10", "cmsy10", "cmtt10", "STIX")


class TextPainter:
    """Draws text of one size. `missing` collects the characters that were replaced by their names."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.missing: set[str] = set()

    def readable(self, text: str) -> str:
        """Returns `text` with undrawable characters replaced by names; the other methods expect such a text."""
        return "".join(map(self._readable, text))

    def getlength(self, text: str) -> float:
        """Returns the width of a line in pixels."""
        return sum(font.getlength(piece) for font, piece in self._runs(text))

    def draw(self, draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, color: str) -> None:
        """Draws a line whose upper left corner is `place`."""
        left, top = place
        for font, piece in self._runs(text):
            draw.text((left, top), piece, color, font)
            left += int(font.getlength(piece))

    def _readable(self, character: str) -> str:
        if character in _VARIATIONS:
            return ""
        control = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") and character not in _JOINERS
        if character in " \n\t":
            return character
        if not control and _font_with(character):
            return character
        self.missing.add(character)
        if unicodedata.category(character) == "So" and (name := unicodedata.name(character, "")):
            return f":{name.lower().replace(' ', '_')}:"
        return f"[U+{ord(character):04X}]"

    def _runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        """Splits a line into pieces, each drawn with one font."""
        pieces = groupby(text, lambda character: _font_with(character) or _first_font())
        return [(_loaded(path, self._size), "".join(piece)) for path, piece in pieces]


@functools.cache
def _first_font() -> str:
    return f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"


@functools.cache
def _loaded(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@functools.cache
def _font_with(character: str) -> str:
    """Returns the first font that has a character; "" if none has."""
    code = ord(character)
    if code in _codes(_first_font()):
        return _first_font()
    return next((path for path in _installed() if code in _codes(path) and _draws(path)), "")


@functools.cache
def _installed() -> tuple[str, ...]:
    """Returns the installed upright text fonts in a fixed order."""
    entries = (entry for entry in font_manager.fontManager.ttflist if entry.style == "normal")
    text = (entry for entry in entries if not entry.name.startswith(_NO_TEXT))
    return tuple(
        dict.fromkeys(entry.fname for entry in sorted(text, key=lambda e: (abs(int(e.weight) - 400), e.fname)))
    )


@functools.cache
def _codes(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # deleted, or of a kind that FreeType cannot open
        return frozenset()


@functools.cache
def _draws(path: str) -> bool:
    """Whether Pillow can draw a font at any size; it cannot draw fonts of colored bitmaps."""
    try:
        return bool(ImageFont.truetype(path, 14))
    except OSError:
        return False
