"""Draws pages of rows: tables, receipts and cards."""

from __future__ import annotations

from dataclasses import replace

from visor_jax.data.almanac.content import Content, number_width, random_numbers, widths, words_up_to
from visor_jax.data.almanac.draw import Draws
from visor_jax.data.almanac.facts import Facts
from visor_jax.data.almanac.layout import COLUMN_GAP, ContentSource, Shape, Space, text_rows
from visor_jax.data.almanac.pictures import emoji, flags
from visor_jax.data.almanac.words import TOTAL, content_words
from visor_jax.data.almanac.words import units as unit_names


def draw_table(draws: Draws, shape: Shape, space: Space, source: ContentSource) -> tuple[Content, Facts]:
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
        lines=(" ".join(content.heads), *text_rows(content)),
    )
    return content, facts


def draw_units(draws: Draws, shape: Shape, space: Space, source: ContentSource) -> tuple[Content, Facts]:
    """Draws a table of two columns with the units of both below their heads."""
    canvas, style = space.canvas, space.style
    free = space.lines - space.used
    count = min(draws.integer(*shape.rows), free - 2)
    room = canvas.width - 1 - 2 * COLUMN_GAP
    while True:
        content = source.tabular(style, count, 2, room)
        # Units of real content are true; if two columns have none, the page has mixed content.
        units = content.units
        if len(set(units)) < 2 or not all(units):
            source = replace(source, mixed=1.0)
            content = source.tabular(style, count, 2, room)
            units = tuple(draws.some_of(unit_names(), 2))
        wide, *each = widths(style, content)
        each = [max(width, style.width(unit)) for width, unit in zip(each, units, strict=False)]
        if len(each) == 2 and len(set(units)) == 2 and wide + sum(each) <= room:
            break
    gap = min((canvas.width - 1 - wide - sum(each)) / 2, draws.uniform(COLUMN_GAP, 12))
    left = draws.uniform(0, canvas.width - 1 - wide - sum(each) - 2 * gap)
    starts = (left + wide + gap, left + wide + 2 * gap + each[0])
    first = space.used + draws.integer(0, free - count - 2)
    for start, head, unit in zip(starts, content.heads, units, strict=True):
        canvas.write(head, start, space.top(first))
        canvas.write(unit, start, space.top(first + 1))
    for number, (label, row) in enumerate(zip(content.labels, content.values, strict=True), first + 2):
        canvas.write(label, left, space.top(number))
        for start, value in zip(starts, row, strict=True):
            canvas.write(str(value), start, space.top(number))
    facts = Facts(
        "table",
        style.paper,
        labels=content.labels,
        heads=content.heads,
        values=content.values,
        units=units,
        lines=(" ".join(content.heads), " ".join(units), *text_rows(content)),
    )
    return replace(content, units=("", "")), facts


def draw_receipt(draws: Draws, shape: Shape, space: Space, source: ContentSource) -> tuple[Content, Facts]:
    """Draws items with their prices and, below a line, their sum."""
    canvas, style = space.canvas, space.style
    free = space.lines - space.used
    count = min(draws.integer(2, shape.rows[1] + 1), free - 1)
    limit = canvas.width - style.width("000") - COLUMN_GAP
    words = [word for word in words_up_to(style.face, style.size, limit) if word != TOTAL]
    prices = random_numbers(draws, count, 2 if draws.chance(0.7) else 1)
    content = Content(
        draws.one_of(content_words()), tuple(draws.some_of(words, count)), ("",), ("",), tuple((p,) for p in prices)
    )
    right = canvas.width - draws.uniform(0, canvas.width - limit if canvas.width > limit else 0)
    wide = max(style.width(label) for label in (*content.labels, TOTAL))
    left = draws.uniform(0, max(0.0, min(right - wide - style.width("000") - COLUMN_GAP, 20)))
    right = max(right, left + wide + COLUMN_GAP + style.width("000"))
    first = space.used + draws.integer(0, free - count - 1)
    for number, (label, price) in enumerate(((*zip(content.labels, prices, strict=True), (TOTAL, sum(prices)))), first):
        top = space.top(number)
        if label == TOTAL:
            canvas.rule(top - 1)
        canvas.write(label, left, top)
        canvas.write(str(price), right - style.width(str(price)), top)
    facts = Facts(
        "receipt",
        style.paper,
        labels=content.labels,
        values=content.values,
        total=sum(prices),
        lines=(*text_rows(content), f"{TOTAL} {sum(prices)}"),
    )
    return content, facts


def draw_card(draws: Draws, shape: Shape, space: Space, source: ContentSource) -> tuple[Content, Facts]:
    """Draws a picture, an emoji or a flag, and below it two lines of a word and a number."""
    canvas, style = space.canvas, space.style
    pictures = emoji() if draws.chance(0.5) else flags()
    word = draws.one_of(tuple(pictures))
    picture = pictures[word]
    height, width = picture.shape[:2]
    count = 2
    content = source.listed(style, count, canvas.width - style.width("000") - 12)
    first = space.lines - count - draws.integer(0, space.lines - space.used - count - 3)
    top = draws.uniform(space.top(space.used), space.top(first) - height)
    canvas.paste(picture, draws.uniform(0, canvas.width - width), top)
    wide = max(style.width(label) for label in content.labels)
    gap = draws.uniform(COLUMN_GAP, 8)
    left = draws.uniform(0, canvas.width - wide - gap - number_width(style, content))
    for number, (label, row) in enumerate(zip(content.labels, content.values, strict=True), first):
        canvas.write(label, left, space.top(number))
        canvas.write(str(row[0]), left + wide + gap, space.top(number))
    facts = Facts(
        "card", style.paper, labels=content.labels, values=content.values, picture=word, lines=tuple(text_rows(content))
    )
    return content, facts
