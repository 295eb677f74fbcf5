"""Draws rows of a batch: which samples share them, their positions, and what is padding.

In: a `Batch` as a step receives it. Out: a picture for a preview sheet. For each row two streams, visual and text: a
bar with one color per sample (white: padding), with lines between independent turns, the targets of the loss in dark
green below the text, and above each bar the position ids, from 0 at its foot. Then the pool of tiles, each with the
number of the row that reads it.
"""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image, ImageDraw

from visor_jax.data.collate import Batch
from visor_jax.data.preview_text import TextPainter
from visor_jax.data.preview_tokens import FAINT, INK, LINE, PAGE, RULE, TARGET, WIDTH

COLORS = ("#7fb2e5", "#f2b36b", "#9ccf8f", "#d9a0d6", "#e5d36b", "#8fd0cf", "#e29a94", "#b3a9e0")
_LABEL = 150  # pixels left of a bar
_BAR, _PLOT = 24, 44  # heights
_MOST_ROWS = 8


def color_of(segment: int) -> str:
    """Returns the color of a row's segment 1, 2, ..."""
    return COLORS[(segment - 1) % len(COLORS)]


def draw_rows(batch: Batch, rows_per_pool: int, font: TextPainter) -> Image.Image:
    """Returns a picture `WIDTH` wide of the batch's first rows."""
    arrays = batch.arrays
    ids = [*batch.ids]
    parts: list[Image.Image] = []
    for row in range(min(len(arrays["text_segments"]), _MOST_ROWS)):
        count = int(max(arrays["text_segments"][row].max(initial=0), arrays["visual_segments"][row].max(initial=0)))
        names, ids = ids[:count], ids[count:]
        parts.append(caption(f"row {row}: {count} sample{'s' if count != 1 else ''}: {', '.join(names)}", font))
        for kind in ("visual", "text"):
            parts.append(_draw_stream(arrays, kind, row, font))
        if (row + 1) % rows_per_pool == 0:
            parts.append(_draw_pool(batch, row // rows_per_pool, rows_per_pool, font))
    return stacked(parts, 6)


def stacked(parts: list[Image.Image], gap: int) -> Image.Image:
    """Returns pictures of one width below each other."""
    height = sum(part.height for part in parts) + gap * max(len(parts) - 1, 0)
    canvas = Image.new("RGB", (WIDTH, height), PAGE)
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height + gap
    return canvas


def caption(text: str, font: TextPainter) -> Image.Image:
    """Returns a line of text."""
    line = Image.new("RGB", (WIDTH, LINE), PAGE)
    font.draw(ImageDraw.Draw(line), (0, 0), font.readable(" ".join(text[:300].split())), INK)
    return line


def _labeled(draw: ImageDraw.ImageDraw, top: int, text: str, font: TextPainter) -> None:
    for number, line in enumerate(text.split("\n")):
        font.draw(draw, (0, top + number * (LINE - 4)), line, FAINT)


def _draw_stream(arrays: dict[str, np.ndarray], kind: str, row: int, font: TextPainter) -> Image.Image:
    """Draws one stream of a row: its position ids, its segments, and for text the loss mask."""
    segments, positions = arrays[f"{kind}_segments"][row], arrays[f"{kind}_positions"][row]
    canvas = Image.new("RGB", (WIDTH, _PLOT + _BAR + 8), PAGE)
    draw = ImageDraw.Draw(canvas)
    used, total = int((segments > 0).sum()), len(segments)
    highest = int(positions[segments > 0].max(initial=0))
    _labeled(draw, 0, f"positions to {highest}\n{kind}: {used} of {total}\n{used / total:.1%} filled", font)
    _draw_bar(draw, segments, _PLOT)
    scale = (WIDTH - _LABEL - 1) / total
    if kind == "text" and "text_turns" in arrays:
        for place in np.flatnonzero(np.diff(arrays["text_turns"][row]) > 0) + 1:
            draw.line((_LABEL + place * scale, _PLOT, _LABEL + place * scale, _PLOT + _BAR - 1), PAGE)
    draw.line((_LABEL, _PLOT, WIDTH, _PLOT), RULE)
    columns = (_LABEL + np.flatnonzero(segments > 0) * scale).astype(int)
    heights = (_PLOT - 2 - positions[segments > 0] * (_PLOT - 4) / max(highest, 1)).astype(int)
    for x, y, segment in zip(columns, heights, segments[segments > 0], strict=True):
        draw.rectangle((int(x), int(y) - 1, int(x) + 1, int(y)), color_of(int(segment)))
    if kind == "text":
        for place in np.flatnonzero(arrays["loss_mask"][row]):
            left = _LABEL + place * scale
            draw.rectangle((left, _PLOT + _BAR + 2, left + max(scale - 1, 0), _PLOT + _BAR + 6), TARGET)
    return canvas


def _draw_bar(draw: ImageDraw.ImageDraw, segments: np.ndarray, top: int) -> None:
    """Draws a bar with one color per segment; padding stays white, in a frame."""
    scale = (WIDTH - _LABEL - 1) / len(segments)
    edges = np.concatenate([[0], np.flatnonzero(np.diff(segments)) + 1, [len(segments)]])
    for begin, end in itertools.pairwise(edges):
        if segments[begin]:
            box = (_LABEL + begin * scale, top, _LABEL + end * scale, top + _BAR)
            draw.rectangle(box, color_of(int(segments[begin])), outline=PAGE)
    draw.rectangle((_LABEL, top, WIDTH - 1, top + _BAR), outline=FAINT)


def tile_owners(batch: Batch, pool: int, rows_per_pool: int) -> np.ndarray:
    """Returns (row, segment) of the sample that reads each tile of a pool, (-1, 0) for padding: int [n, 2].

    A tile that several samples of a sheet share is that of the first of them.
    """
    owners = [
        (row, segment)
        for row in range(pool * rows_per_pool, (pool + 1) * rows_per_pool)
        for segment, content in enumerate(batch.contents[row], 1)
        for _ in range(content.tiles)
    ]
    padding = batch.arrays["tiles"].shape[1] - len(owners)
    return np.array([*owners, *[(-1, 0)] * padding]).reshape(-1, 2)


def _draw_pool(batch: Batch, pool: int, rows_per_pool: int, font: TextPainter) -> Image.Image:
    """Draws the tiles of a pool as boxes in the colors of their samples; padding stays white."""
    owners = tile_owners(batch, pool, rows_per_pool)
    total, used = len(owners), int((owners[:, 0] >= 0).sum())
    columns = min(total, 80)
    side = min(_BAR, (WIDTH - _LABEL) // columns)
    lines = -(-total // columns)
    canvas = Image.new("RGB", (WIDTH, max(side * lines, 2 * LINE) + 8), PAGE)
    draw = ImageDraw.Draw(canvas)
    _labeled(draw, 0, f"tiles: {used} of {total}\n{used / total:.1%} filled", font)
    for place, (row, segment) in enumerate(owners):
        line, column = divmod(place, columns)
        left, top = _LABEL + column * side, line * side
        color = color_of(int(segment)) if row >= 0 else PAGE
        draw.rectangle((left, top, left + side - 2, top + side - 2), color, outline=RULE)
        if row >= 0 and rows_per_pool > 1 and side >= 14:
            font.draw(draw, (left + 2, top - 1), str(row % rows_per_pool), INK)
    return canvas
