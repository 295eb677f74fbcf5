"""A field as `visor_jax.config.schema` states it, and values made to fit: the field's type, finite, by its rule.

Ground floor: no JAX import.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from visor_jax.config.rules import Rule


@dataclass(frozen=True)
class Field:
    """One field: its default, type, meaning, rule and units, as its dataclass states them.

    `kind` is int, float, bool or str, or tuple; then `element` is the type of its elements, where a tuple of types
    means tuples of just these.
    """

    default: Any
    kind: type
    meaning: str
    rule: Rule | None = None
    units: str = ""
    element: type | tuple[type, ...] = str


def described(stated: dataclasses.Field[Any], annotation: Any) -> Field:
    """The `Field` of a dataclass's field, whose resolved annotation is `annotation`."""
    kind = get_origin(annotation) or annotation
    element: Any = str
    if kind is tuple:
        element = get_args(annotation)[0]
        element = get_args(element) if get_origin(element) is tuple else element
    return Field(stated.default, kind, element=element, **stated.metadata)


def typed(value: Any, field: Field) -> Any:
    """`value` as the field's type: whole numbers become floats where floats are meant, lists become tuples.

    Raises:
      ValueError: the value has another type, is not finite, or breaks the field's rule; it says what is expected.
    """
    if field.kind is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list of {_type_name(field.element)}")
        result: Any = tuple(_element(item, field.element) for item in value)
    else:
        result = _scalar(value, field.kind)
    if field.rule is not None and not field.rule.holds(result):
        raise ValueError(f"expected {field.rule.expected}")
    return result


def _element(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(kind, tuple):
        return _scalar(value, kind)
    if not isinstance(value, list | tuple) or len(value) != len(kind):
        raise ValueError(f"expected a list of {_type_name(kind)}")
    return tuple(_scalar(item, part) for item, part in zip(value, kind, strict=True))


def _scalar(value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"expected {_type_name(kind)}")
    if kind is float and not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _type_name(kind: type | tuple[type, ...]) -> str:
    if isinstance(kind, tuple):
        return "pairs (" + ", ".join(_type_name(part) for part in kind) + ")"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def from_text(text: str, field: Field) -> Any:
    """An override's text as a value of the field's type; as it stands where it is none, for `typed` to refuse."""
    return _parse_list(text, field.element) if field.kind is tuple else _parse_scalar(text, field.kind)


def _parse_list(text: str, element: type | tuple[type, ...]) -> Any:
    """A Python literal such as (1, 2) or ["a", "b"], else items between commas."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if isinstance(value, list | tuple):
        return value
    if isinstance(element, tuple):  # pairs have no other form
        return value if text.strip() else []
    return [_parse_scalar(item.strip(), element) for item in text.split(",") if item.strip()]


def _parse_scalar(text: str, kind: type) -> Any:
    """The text as a value of `kind`; as it stands where it is none, for the type check to refuse."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text
