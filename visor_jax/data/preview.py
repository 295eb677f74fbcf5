"""Draws a contact sheet: samples side by side, pictures with their questions and answers.

In: samples of any source. Out: one PNG, to inspect data before training on it.
"""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.preview_text import TextPainter
from visor_jax.data.sample import Sample, Turn
from visor_jax.files.read_write import write_bytes

PICTURE = 288  # pixels, the longest side of a picture
_MARGIN = 16
_TEXT = 14  # font size, pixels
_LINE = 19
_INDENT = 12  # pixels, for answers
_MAX_LINES = 12  # per question or answer
_MAX_PICTURES = 4  # shown per sample

_PAGE, _INK, _FAINT, _RULE = "#ffffff", "#1c1c1c", "#77787c", "#d9dadd"
_ANSWER = "#0b6b3a"
_LEVELS = {"easy": "#2463b4", "middle": "#7a4fa3", "hard": "#b4471b"}


@dataclass(frozen=True)
class _Line:
    text: str
    color: str
    indent: int = 0
    note: str = ""  # drawn in gray at the right end


def contact_sheet(samples: Sequence[Sample], path: str | os.PathLike[str], columns: int = 0) -> set[str]:
    """Draws samples row by row and writes the sheet atomically.

    Small pictures are enlarged by an integer factor without smoothing; large ones are shrunk. Only the first pictures
    of a sample and the beginning of a long text are shown.

    Args:
      samples: the samples to draw.
      path: the PNG file to write.
      columns: samples per row; 0 chooses.

    Returns:
      The characters that no installed font has; the sheet shows their names or numbers.

    Raises:
      ValueError: `samples` is empty.
    """
    if not samples:
        raise ValueError("a contact sheet needs at least one sample")
    columns = columns or min(len(samples), 5 if len(samples) > 8 else 4)
    font = TextPainter(_TEXT)
    cells = [_draw_cell(sample, font) for sample in samples]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    width = max(cell.width for cell in cells) + _MARGIN
    heights = [max(cell.height for cell in row) + _MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * width + _MARGIN, sum(heights) + _MARGIN), _PAGE)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if number:
            draw.line([(_MARGIN, top - _MARGIN // 2), (sheet.width - _MARGIN, top - _MARGIN // 2)], _RULE)
        for column, cell in enumerate(row):
            sheet.paste(cell, (_MARGIN + column * width, top))
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
    return font.missing


def _draw_cell(sample: Sample, font: TextPainter) -> Image.Image:
    """Draws one sample: a caption, its pictures, its turns."""
    pictures = _pictures(sample.images)
    system = _wrap(f"system: {sample.system}", PICTURE, font) if sample.system else []
    notes = [*system, *([] if sample.images else ["(no picture)"])]
    lines = [*(_Line(text, _FAINT) for text in notes), *_turn_lines(sample.turns, font)]
    height = _LINE + pictures.height + 6 + _LINE * len(lines)
    cell = Image.new("RGB", (PICTURE, height), _PAGE)
    draw = ImageDraw.Draw(cell)
    font.draw(draw, (0, 0), _shorten(sample.id, PICTURE - 40, font), _FAINT)
    _draw_right(draw, 0, sample.level, _LEVELS.get(sample.level, _FAINT), font)
    cell.paste(pictures, (0, _LINE))
    top = _LINE + pictures.height + 6
    for number, line in enumerate(lines):
        font.draw(draw, (line.indent, top + number * _LINE), line.text, line.color)
        _draw_right(draw, top + number * _LINE, line.note, _FAINT, font)
    return cell


def _draw_right(draw: ImageDraw.ImageDraw, top: int, text: str, color: str, font: TextPainter) -> None:
    """Draws a text at the cell's right end."""
    text = _one_line(text, font)
    font.draw(draw, (PICTURE - int(font.getlength(text)), top), text, color)


def _pictures(images: Sequence[np.ndarray]) -> Image.Image:
    """Returns a sample's pictures, or frames of its videos, on one canvas PICTURE wide; several are two per row."""
    shown = [still for image in images for still in _stills(image)][:_MAX_PICTURES]
    if not shown:
        return Image.new("RGB", (PICTURE, 0), _PAGE)
    side = PICTURE if len(shown) == 1 else (PICTURE - 4) // 2
    scaled = [_scale(Image.fromarray(image), side) for image in shown]
    rows = [scaled[start : start + 2] for start in range(0, len(scaled), 2)]
    canvas = Image.new("RGB", (PICTURE, sum(max(picture.height for picture in row) + 4 for row in rows) - 4), _PAGE)
    top = 0
    for row in rows:
        for column, picture in enumerate(row):
            canvas.paste(picture, (column * (side + 4), top))
        top += max(picture.height for picture in row) + 4
    return canvas


def _stills(image: np.ndarray) -> Sequence[np.ndarray]:
    """Returns the picture itself, or evenly spaced frames of a video, including the first and the last."""
    if image.ndim == 3:
        return [image]
    places = np.linspace(0, len(image) - 1, min(len(image), _MAX_PICTURES)).astype(int)
    return [image[place] for place in places]


def _scale(picture: Image.Image, side: int) -> Image.Image:
    """Resizes the picture so that its longer side is at most `side`."""
    longer = max(picture.size)
    if longer <= side:
        factor = side // longer
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = (max(1, picture.width * side // longer), max(1, picture.height * side // longer))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _turn_lines(turns: Sequence[Turn], font: TextPainter) -> list[_Line]:
    """Returns the wrapped lines of a conversation: each question, then its answer, indented, with the task's name."""
    lines: list[_Line] = []
    for turn in turns:
        question = turn.question.replace(IMAGE_MARKER, "[picture]")
        lines += [_Line(text, _INK) for text in _wrap(question, PICTURE, font)]
        room = PICTURE - _INDENT - int(font.getlength(_one_line(turn.task, font))) - _INDENT
        first, *rest = _wrap(turn.answer, max(room, PICTURE // 2), font) or [""]
        lines += [_Line(first, _ANSWER, _INDENT, turn.task), *(_Line(text, _ANSWER, _INDENT) for text in rest)]
    return lines


def _wrap(text: str, width: int, font: TextPainter) -> list[str]:
    """Wraps `text` to lines of at most `width` pixels, between words if possible; at most _MAX_LINES lines."""
    lines: list[str] = []
    for paragraph in font.readable(text[: width * _MAX_LINES]).splitlines():
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if _fitting(joined, width, font) < len(joined) and line:
                lines.append(line)
                joined = word
            while (fitting := _fitting(joined, width, font)) < len(joined):
                lines.append(joined[:fitting])
                joined = joined[fitting:]
            line = joined
        if line:
            lines.append(line)
    return lines if len(lines) <= _MAX_LINES else [*lines[: _MAX_LINES - 1], "..."]


def _one_line(text: str, font: TextPainter) -> str:
    """Returns `text` as one drawable line; names from data may hold line breaks."""
    return font.readable(" ".join(text.split()))


def _shorten(text: str, width: int, font: TextPainter) -> str:
    """Returns `text`, with dots in place of its end if it is wider than `width` pixels."""
    text = _one_line(text[:width], font)
    if _fitting(text, width, font) == len(text):
        return text
    return text[: _fitting(text, width - int(font.getlength("...")), font)] + "..."


def _fitting(text: str, width: int, font: TextPainter) -> int:
    """Returns how many leading characters of `text` fit into `width` pixels, at least one."""
    if len(text) <= width and font.getlength(text) <= width:  # no letter is narrower than a pixel
        return len(text)
    longer = bisect.bisect_right(range(1, min(len(text), width) + 1), width, key=lambda n: font.getlength(text[:n]))
    return max(1, longer)
