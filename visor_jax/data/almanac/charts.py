"""Draws charts: horizontal bars of one or two colors, columns and lines."""

from __future__ import annotations

from dataclasses import replace

from visor_jax.data.almanac.content import Content, number_width
from visor_jax.data.almanac.draw import LINE, Draws, Style
from visor_jax.data.almanac.facts import Facts
from visor_jax.data.almanac.layout import ContentSource, Shape, Space, text_rows
from visor_jax.data.almanac.words import BARS


def draw_bars(draws: Draws, shape: Shape, space: Space, source: ContentSource) -> tuple[Content, Facts]:
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


def draw_columns(draws: Draws, shape: Shape, space: Space, source: ContentSource) -> tuple[Content, Facts]:
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


def draw_line(draws: Draws, shape: Shape, space: Space, source: ContentSource) -> tuple[Content, Facts]:
    """Draws a line through points, each with its label at the bottom and its number above."""
    canvas, style = space.canvas, space.style
    count = draws.integer(3, max(3, min(3 if style.size > 9 else 4, shape.rows[1])))
    pitch = (canvas.width - 1) / count
    content = source.listed(style, count, int(pitch) - 2)
    color = draws.one_of(tuple(BARS))
    bottom, top = space.top(space.lines - 1) - 4, space.top(space.used + 1)
    scale = (bottom - top) / max(row[0] for row in content.values) / draws.uniform(1, 1.2)
    points = [((number + 0.5) * pitch, bottom - row[0] * scale) for number, row in enumerate(content.values)]
    canvas.stroke(points, color)
    for (x, y), label, row in zip(points, content.labels, content.values, strict=True):
        canvas.write(label, x - style.width(label) / 2, space.top(space.lines - 1))
        text = str(row[0])
        line = max(space.used, int((y - 2 - space.jitter) // LINE) - 1)
        canvas.write(text, x - style.width(text) / 2, space.top(line), clear=True)
    return content, _bar_facts("line", style, color, content)


def draw_grouped(draws: Draws, shape: Shape, space: Space, source: ContentSource) -> tuple[Content, Facts]:
    """Draws two horizontal bars per label, in two colors that a legend at the top names."""
    canvas, style = space.canvas, space.style
    free = space.lines - space.used - 1
    count = draws.integer(2, max(2, min(3, free // 2)))
    room = canvas.width - style.width("000") - 16
    swatch = style.height - 3
    while True:
        content = source.tabular(style, count, 2, 2 * canvas.width)
        wide = max(style.width(label) for label in content.labels)
        named = sum(style.width(head) for head in content.heads)
        if len(content.heads) == 2 and wide <= room and named + 2 * swatch + 12 <= canvas.width:
            break
    colors = tuple(draws.some_of(tuple(BARS), 2))
    left = draws.uniform(0, canvas.width - named - 2 * swatch - 12)
    for head, color in zip(content.heads, colors, strict=True):
        top = space.top(space.used)
        canvas.bar(left, top + 2, left + swatch, top + 2 + swatch, color)
        left = canvas.write(head, left + swatch + 3, top) + 6
    first = space.used + 1 + draws.integer(0, free - 2 * count)
    scale = (canvas.width - wide - 5 - number_width(style, content)) / max(map(max, content.values))
    for number, (label, row) in enumerate(zip(content.labels, content.values, strict=True)):
        canvas.write(label, 0, space.top(first + 2 * number))
        for line, (color, value) in enumerate(zip(colors, row, strict=True), first + 2 * number):
            top, tip = space.top(line), wide + 3 + max(2, value * scale)
            canvas.bar(wide + 3, top, tip, top + style.height, color)
            canvas.write(str(value), tip + 2, top)
    lines = (" ".join(content.heads), *text_rows(content))
    facts = Facts("grouped", style.paper, "", "", "", content.labels, content.heads, content.values, lines=lines)
    return content, replace(facts, colors=colors)


def _bar_facts(kind: str, style: Style, color: str, content: Content) -> Facts:
    return Facts(
        kind, style.paper, bar=color, labels=content.labels, values=content.values, lines=tuple(text_rows(content))
    )
