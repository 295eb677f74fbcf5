"""Writes the report's numbers as text, and the colors of table cells."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from visor_jax.report import figures

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def percent(value: float | None) -> str:
    """0.987 -> "98.7"; the caller adds the unit."""
    return DASH if value is None else f"{100 * value:.1f}"


def points(difference: float | None) -> str:
    """0.003 -> "+0.3 points"."""
    if difference is None:
        return DASH
    text = f"{abs(100 * difference):.1f}"
    sign = "±" if text == "0.0" else "+" if difference > 0 else MINUS
    return f"{sign}{text} points"


def counted(count: int, noun: str) -> str:
    """1, "tile" -> "1 tile"; 2, "tile" -> "2 tiles"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def times(ratio: float) -> str:
    """3.987 -> "3.99", 11.23 -> "11.2", with a multiplication sign."""
    return (f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}") + TIMES


def flops(gflops: float, largest: float) -> str:
    """Formats a number of GFLOP in the unit that suits the largest number of its table."""
    factor, _ = figures.flops_unit(largest)
    return f"{gflops * factor:,.2f}" if gflops * factor < 100 else f"{gflops * factor:,.0f}"


def duration(seconds: float) -> str:
    """4000.0 -> "1 h 06 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def brief(value: Any, longest: int = 200) -> str:
    """Returns a value's text, shortened to `longest` characters."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def data_uri(data: bytes, kind: str) -> str:
    """Returns an image of a media type such as "png" as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


SHADES = 20  # steps of the background of an accuracy
STOPS = [0.0, 0.5, 0.9, 1.0]  # accuracies of the colors below
LIGHT = [(239, 178, 130), (250, 220, 196), (255, 255, 255), (203, 230, 220)]
DARK = [(110, 62, 26), (66, 44, 28), (22, 24, 28), (23, 66, 54)]


def shade(accuracy: float | None) -> str:
    """Returns the class of an accuracy's cell, from "a0" to "a20"; "" for none."""
    return "" if accuracy is None else f"a{round(SHADES * min(max(accuracy, 0.0), 1.0))}"


def shade_colors(colors: Sequence[tuple[int, int, int]]) -> dict[str, str]:
    """Returns the background of each class of `shade`: amber for low values, paper at 90 %, green near 100 %."""
    return {
        f"a{step}": "#"
        + "".join(f"{round(float(np.interp(step / SHADES, STOPS, c))):02x}" for c in zip(*colors, strict=True))
        for step in range(SHADES + 1)
    }
