"""Draws pages with a second renderer, Vega through `vl-convert-python`, to test a model on pages of another make.

In: random draws, as `pages.draw_page`. Out: a page with the same facts, whose text lies on no grid and whose marks are
anti-aliased by another program. The package is optional (`pip install visor-jax[vega]`); it draws with the DejaVu fonts
that matplotlib installs. About 15 ms a page.
"""

from __future__ import annotations

import functools
import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from visor_jax.data.almanac.content import Content, widths
from visor_jax.data.almanac.draw import Draws, Style, random_style
from visor_jax.data.almanac.facts import Facts
from visor_jax.data.almanac.layout import ContentSource, Look, Shape, text_rows
from visor_jax.data.almanac.words import BARS, PAPERS
from visor_jax.errors import RequestError

FACES = ("DejaVu Sans", "DejaVu Serif")

_SCHEMA = "https://vega.github.io/schema/{}/v5.json"
_ROOM = 24  # pixels of a page that the renderer's margins and bars need beside text


@dataclass(frozen=True)
class Picture:
    """A drawn page, uint8 [height, width, 3]."""

    pixels: np.ndarray

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.pixels.shape[1]

    def image(self) -> np.ndarray:
        """Returns the picture."""
        return self.pixels


@dataclass(frozen=True)
class VegaPage:
    """A picture and its facts."""

    canvas: Picture
    facts: Facts


@functools.cache
def _renderer() -> ModuleType:
    """Returns the module `vl_convert`, with matplotlib's fonts registered.

    Raises:
      RequestError: it is not installed.
    """
    try:
        vl_convert = importlib.import_module("vl_convert")
    except ImportError:
        raise RequestError(
            "data.path='pages_vega': vl-convert-python is not installed, with which its pages are drawn;"
            " expected it (pip install 'visor-jax[vega]'), or another data.path"
        ) from None
    import matplotlib

    vl_convert.register_font_directory(str(Path(matplotlib.get_data_path(), "fonts", "ttf")))
    return vl_convert


def draw_vega_page(draws: Draws, shape: Shape, look: Look) -> VegaPage:
    """Draws one page: a table, horizontal bars or columns.

    Raises:
      RequestError: `vl-convert-python` is not installed.
    """
    style = random_style(draws, FACES)
    kind = shape.kinds[draws.weighted(shape.weights or (1.0,) * len(shape.kinds))]
    source = ContentSource(draws, look.split, look.mixed if shape.mixed is None else shape.mixed, shape.digits)
    side = shape.width[0]
    titled = draws.chance(shape.titled)
    if kind == "table":
        count = draws.integer(shape.rows[0], shape.rows[1])
        content = source.tabular(style, count, draws.integer(*shape.columns), side - _ROOM)
    elif kind == "bars":
        content = source.listed(style, draws.integer(2, shape.rows[1]), side - style.width("000") - _ROOM)
    else:
        count = draws.integer(2, 3)
        content = source.listed(style, count, side // count - 6)
    color = "" if kind == "table" else draws.one_of(tuple(BARS))
    title, unit = content.title if titled else "", ""
    if titled and content.units[0] and len(set(content.units)) == 1:
        unit = content.units[0] if style.width(f"{title} in {content.units[0]}") < side - 8 else ""
    text = f"{title} in {unit}" if unit else title
    lines = (text,) if text else ()
    if kind == "table":
        pixels = _render("vega", _table(draws, style, content, text, side), side)
        facts = Facts(kind, style.paper, heads=content.heads, lines=(*lines, " ".join(content.heads)))
    else:
        spec = _bars(draws, style, content, text, side, color, upright=kind == "columns")
        pixels = _render("vegalite", spec, side)
        facts = Facts(kind, style.paper, bar=color, lines=lines)
    named = {"title": title, "unit": unit, "labels": content.labels, "values": content.values}
    named["lines"] = (*facts.lines, *text_rows(content))
    return VegaPage(Picture(pixels), Facts(**(vars(facts) | named)))


def _render(language: str, spec: dict[str, Any], side: int) -> np.ndarray:
    """Returns the picture of a specification, uint8 [side, side, 3]."""
    encoded = getattr(_renderer(), f"{language}_to_png")({"$schema": _SCHEMA.format(language), **spec}, scale=1)
    with Image.open(io.BytesIO(encoded)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (side, side, 3), f"the renderer drew {pixels.shape}"
    return pixels


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _bars(
    draws: Draws, style: Style, content: Content, title: str, side: int, color: str, *, upright: bool
) -> dict[str, Any]:
    """Returns a Vega-Lite specification of bars with their labels and numbers."""
    ink = _hex(style.ink)
    most = max(row[0] for row in content.values)
    axis = {"title": None, "ticks": False, "domain": draws.chance(0.5), "labelAngle": 0, "labelPadding": 2}
    label = {
        "field": "label",
        "type": "nominal",
        "sort": None,
        "axis": axis | {"labelLimit": 80, "labelOverlap": False},
    }
    scale = {"domain": [0, most * draws.uniform(1.3 if upright else 1.6, 1.9)]}
    value = {"field": "value", "type": "quantitative", "axis": None, "scale": scale}
    number = {"type": "text", "dy": -6} if upright else {"type": "text", "align": "left", "dx": 2}
    rows = [{"label": label, "value": row[0]} for label, row in zip(content.labels, content.values, strict=True)]
    spec = {
        "width": side, "height": side, "padding": 1, "autosize": {"type": "fit", "contains": "padding"},
        "background": _hex(PAPERS[style.paper]), "data": {"values": rows},
        "encoding": {"x": label, "y": value} if upright else {"y": label, "x": value},
        "layer": [
            {"mark": {"type": "bar", "color": _hex(BARS[color]), "cornerRadius": draws.integer(0, 2)}},
            {"mark": number, "encoding": {"text": {"field": "value"}}},
        ],
        "config": {
            "font": style.face, "view": {"stroke": None}, "text": {"fontSize": style.size, "fill": ink},
            "axis": {"labelFontSize": style.size, "labelColor": ink},
            "title": {"fontSize": style.size, "fontWeight": "normal", "color": ink, "offset": 2},
        },
    }  # fmt: skip
    return spec | ({"title": title} if title else {})


def _table(draws: Draws, style: Style, content: Content, title: str, side: int) -> dict[str, Any]:
    """Returns a Vega specification of a table: one mark per text."""
    marks: list[dict[str, Any]] = []

    def write(x: float, y: float, text: str, align: str) -> None:
        places = {"x": x, "y": y, "text": text, "align": align, "baseline": "middle"}
        look = {"fontSize": style.size, "font": style.face, "fill": _hex(style.ink)}
        marks.append(
            {"type": "text", "encode": {"enter": {key: {"value": value} for key, value in (places | look).items()}}}
        )

    lines = len(content.labels) + 1 + bool(title)
    pitch = draws.uniform(style.size + 3, min(20.0, (side - 2) / lines))
    y = pitch / 2 + draws.uniform(1, side - lines * pitch - 1)
    if title:
        write(side / 2, y, title, "center")
        y += pitch
    wide, *each = (width + 3 for width in widths(style, content))
    left = draws.uniform(1, 4)
    gap = draws.uniform(2, (side - left - wide - sum(each) - 1) / len(each))
    rights = [left + wide + sum(each[: number + 1]) + gap * (number + 1) for number in range(len(each))]
    for right, head in zip(rights, content.heads, strict=True):
        write(right, y, head, "right")
    for label, row in zip(content.labels, content.values, strict=True):
        y += pitch
        write(left, y, label, "left")
        for right, value in zip(rights, row, strict=True):
            write(right, y, str(value), "right")
    return {"width": side, "height": side, "padding": 0, "background": _hex(PAPERS[style.paper]), "marks": marks}
