"""The shape that a JSON value has to have before anything is made of it.

Ground floor: no JAX import. In: a value that a file held, and a description of what is expected. Out: nothing, or a
`RequestError` that names file and field. A description is a kind (`TEXT`, `NUMBER`, ...), a dict of fields, `each(...)`
for an object with any names, `list_of(...)`, or `optional(...)` around one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.errors import RequestError, short

LARGEST = 1e18  # of any number that the package writes


@dataclass(frozen=True)
class Kind:
    """Values that `holds` accepts, and how a message calls them."""

    holds: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True)
class Optional:
    """The field may be missing or null."""

    inner: Shape


@dataclass(frozen=True)
class Each:
    """An object of which every value has a shape."""

    inner: Shape


@dataclass(frozen=True)
class ListOf:
    """A list of which every item has a shape."""

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
# Means of fractions round a little past their ends.
FRACTION = Kind(lambda value: _is_number(value) and -1e-6 <= value <= 1 + 1e-6, "a number from 0 to 1")
COUNT = Kind(lambda value: type(value) is int and 0 <= value < 2**53, "a whole number of at least 0")


def check_shape(value: Any, shape: Shape, file: str | Path, field: str = "") -> None:
    """
    Args:
      value: what was read.
      shape: what it has to be; fields that it does not name may hold anything.
      file: whose content it is, for the message.
      field: where in the file it stands.

    Raises:
      RequestError: it is something else; names file, field, value and what is expected.
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
