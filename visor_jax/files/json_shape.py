"""Validates the structure of JSON values.

Imports no JAX. In: a value read from a file, and a description of the expected structure. Out: nothing, or a
`RequestError` that names file and field. A description is a kind (`TEXT`, `NUMBER`, ...), a dict of fields, `each(...)`
for an object with arbitrary names, `list_of(...)`, or `optional(...)` around one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.errors import RequestError, short

LARGEST = 1e18  # bound of every number that the package writes


@dataclass(frozen=True)
class Kind:
    """The values that `holds` accepts, and their description in messages."""

    holds: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True)
class Optional:
    """The field may be missing or null."""

    inner: Shape


@dataclass(frozen=True)
class Each:
    """An object whose values all have a shape."""

    inner: Shape


@dataclass(frozen=True)
class ListOf:
    """A list whose items all have a shape."""

    inner: Shape


Shape = Kind | Optional | Each | ListOf | Mapping[str, "Shape"]
optional, each, list_of = Optional, Each, ListOf


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # NaN is not <= anything


TEXT = Kind(lambda value: isinstance(value, str), "text")
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
NUMBER = Kind(_is_number, "a finite number")
AMOUNT = Kind(lambda value: _is_number(value) and value >= 0, "a number of at least 0")
COST = Kind(lambda value: _is_number(value) and value > 0, "a number above 0")
# Rounding moves means of fractions slightly past the ends.
FRACTION = Kind(lambda value: _is_number(value) and -1e-6 <= value <= 1 + 1e-6, "a number from 0 to 1")
COUNT = Kind(lambda value: type(value) is int and 0 <= value < 2**53, "a whole number of at least 0")


def check_shape(value: Any, shape: Shape, file: str | Path, field: str = "") -> None:
    """Checks a value against a shape.

    Args:
      value: the value.
      shape: the expected structure; other fields may hold anything.
      file: its file, for the message.
      field: its dotted name in the file, for the message.

    Raises:
      RequestError: the value has another structure; the message names file, field, value and expectation.
    """
    if isinstance(shape, Optional):
        if value is not None:
            check_shape(value, shape.inner, file, field)
    elif isinstance(shape, Kind):
        if not shape.holds(value):
            raise _unexpected(value, shape.expected, file, field)
    elif isinstance(shape, ListOf):
        if not isinstance(value, list):
            raise _unexpected(value, "a list", file, field)
        for index, item in enumerate(value):
            check_shape(item, shape.inner, file, f"{field}[{index}]")
    else:
        if not isinstance(value, dict):
            raise _unexpected(value, "an object", file, field)
        fields = dict.fromkeys(value, shape.inner) if isinstance(shape, Each) else shape
        for name, inner in fields.items():
            if name not in value and not isinstance(inner, Optional):
                raise RequestError(f"{file}: field {_joined(field, name)} is missing")
            check_shape(value.get(name), inner, file, _joined(field, name))


def _joined(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def _unexpected(value: Any, expected: str, file: str | Path, field: str) -> RequestError:
    shown = f"{value}" if isinstance(value, float) and not math.isfinite(value) else short(value)
    return RequestError(f"{file}: {f'field {field} is ' if field else 'holds '}{shown}; expected {expected}")
