"""Draws one picture of an exercise: chooses its look and kind, draws it and its title.

In: random draws and the settings of an exercise. Out: a `Page`: its picture and the facts that questions ask about.
Text stands on lines of `LINE` pixels, the rows of patches, moved down by the page's jitter; horizontally it is free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from visor_jax.data.almanac.charts import draw_bars, draw_columns, draw_grouped, draw_line
from visor_jax.data.almanac.content import Content
from visor_jax.data.almanac.draw import LINE, Canvas, Draws, Style, random_style
from visor_jax.data.almanac.facts import Facts
from visor_jax.data.almanac.layout import ContentSource, Look, Shape, Space
from visor_jax.data.almanac.rows import draw_card, draw_receipt, draw_table, draw_units
from visor_jax.data.almanac.small import draw_crop, draw_list

_FEW_LINES = 4  # on pictures of at most so many lines, text moves down within its line only
# kind -> (how it is drawn, lines that it needs without a title)
_LAYOUTS = {
    "table": (draw_table, 0),
    "bars": (draw_bars, 2),
    "columns": (draw_columns, 4),
    "units": (draw_units, 4),
    "grouped": (draw_grouped, 5),
    "line": (draw_line, 4),
    "receipt": (draw_receipt, 3),
    "card": (draw_card, 5),
}


@dataclass(frozen=True)
class Page:
    """A canvas and its facts."""

    canvas: Canvas
    facts: Facts


def draw_page(draws: Draws, shape: Shape, look: Look) -> Page:
    """Draws one picture of an exercise."""
    style = random_style(draws, look.faces)
    kind = shape.kinds[draws.weighted(shape.weights or (1.0,) * len(shape.kinds))]
    if kind == "crop":
        return Page(*draw_crop(draws, shape, look, style))
    canvas = Canvas(draws, style, shape.height, draws.one_of(shape.width))
    jitter = draws.integer(0, look.jitter)
    if shape.height <= _FEW_LINES * LINE:  # then the last line is needed
        jitter = min(jitter, LINE - style.height)
    if kind == "list":
        return Page(*draw_list(draws, shape, style, canvas, jitter))
    lines = (shape.height - style.height - jitter) // LINE + 1
    draw, least = _LAYOUTS[kind]
    titled = lines > (least or shape.rows[0] + 1) and draws.chance(shape.titled)
    space = Space(canvas, style, jitter, lines, int(titled))
    mixed = look.mixed if shape.mixed is None else shape.mixed
    source = ContentSource(draws, look.split, mixed, shape.digits, shape.vocabulary)
    content, facts = draw(draws, shape, space, source)
    return Page(canvas, _with_title(draws, canvas, style, jitter, content, facts, titled))


def _with_title(
    draws: Draws, canvas: Canvas, style: Style, jitter: int, content: Content, facts: Facts, titled: bool
) -> Facts:
    """Writes the title, with the unit where all columns have the same and it fits, and returns the complete facts."""
    if not titled:
        return facts
    title, unit = content.title, ""
    units = set(content.units)
    if len(units) == 1 and content.units[0] and style.width(f"{title} in {content.units[0]}") <= canvas.width:
        unit = content.units[0]
    text = f"{title} in {unit}" if unit else title
    canvas.write(text, draws.uniform(0, canvas.width - style.width(text)), jitter)
    return replace(facts, title=title, unit=unit, lines=(text, *facts.lines))
