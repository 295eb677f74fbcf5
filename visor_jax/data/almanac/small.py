"""Draws the smallest pictures: crops of one word, number or bar, and lists."""

from __future__ import annotations

from visor_jax.data.almanac.content import random_numbers, words_up_to
from visor_jax.data.almanac.draw import LINE, Canvas, Draws, Style
from visor_jax.data.almanac.facts import Facts
from visor_jax.data.almanac.layout import Look, Shape
from visor_jax.data.almanac.words import BARS


def draw_crop(draws: Draws, shape: Shape, look: Look, style: Style) -> tuple[Canvas, Facts]:
    """Draws one word or number, a bar, or a bar and a number; the picture is as wide as the word needs."""
    what = draws.weighted((0.45, 0.35, 0.13, 0.07))  # word, number, bar and number, bar
    text = (
        draws.one_of(words_up_to(style.face, style.size, shape.width[-1]))
        if what == 0
        else str(random_numbers(draws, 1, _digits(draws))[0])
    )
    width = next(size for size in shape.width if size >= style.width(text) or size == shape.width[-1])
    canvas = Canvas(draws, style, shape.height, width)
    top = draws.integer(0, shape.height // LINE - 1) * LINE + draws.integer(0, look.jitter)
    if what < 2:
        canvas.write(text, draws.uniform(0, width - style.width(text)), top)
        return canvas, Facts("crop", style.paper, lines=(text,))
    color = draws.one_of(tuple(BARS))
    left, length = draws.uniform(0, 14), draws.uniform(4, 20)
    if what == 3:
        canvas.bar(left, top, left + length, top + (LINE if draws.chance(0.5) else style.height), color)
        return canvas, Facts("crop", style.paper, bar=color)
    length = min(length, width - style.width(text) - left - 2)
    canvas.bar(left, top, left + length, top + style.height, color)
    canvas.write(text, left + max(2, length) + 2, top)
    return canvas, Facts("crop", style.paper, bar=color, lines=(text,))


def _digits(draws: Draws) -> int:
    """Returns 2 mostly, else 0: any number of digits."""
    return 2 if draws.chance(0.85) else 0


def draw_list(draws: Draws, shape: Shape, style: Style, canvas: Canvas, jitter: int) -> tuple[Canvas, Facts]:
    """Draws lines of a word and a number on random lines, in some exercises with a bar between the two."""
    slots = (canvas.height - style.height - jitter) // LINE + 1
    count = min(draws.integer(*shape.rows), slots)
    tops = [slot * LINE + jitter for slot in sorted(draws.some_of(range(slots), count))]
    barred = draws.chance(shape.barred)
    digits = _digits(draws) if shape.digits is None else shape.digits
    numbers = random_numbers(draws, count, digits)
    digits_width = max(style.width(str(number)) for number in numbers)
    label_width = canvas.width - digits_width - (18 if barred else 4)
    labels = draws.some_of(words_up_to(style.face, style.size, label_width, shape.vocabulary), count)
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
    return canvas, facts
