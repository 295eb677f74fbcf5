"""Descriptions of configuration fields, and conversion of values to a field's type. No JAX import."""

from __future__ import annotations

import ast
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, get_args, get_origin

from visor_jax.config.rules import Rule

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Many:
    """The type of tuples of any length whose elements have the type `of`."""

    of: Element


Element: TypeAlias = "type | tuple[Element, ...] | Many"
"""The type of a tuple's elements; a tuple of types stands for tuples of exactly these."""


@dataclass(frozen=True)
class Field:
    """One field as its dataclass declares it.

    Attributes:
      kind: int, float, bool, str or tuple.
      element: for a tuple, the type of its elements.
      booleans: the values that False and True of earlier versions stand for; None if the field never was a boolean.
    """

    default: Any
    kind: type
    meaning: str
    rule: Rule | None = None
    units: str = ""
    element: Element = str
    booleans: tuple[str, str] | None = None


def setting(
    default: ValueT,
    meaning: str,
    rule: Rule | None = None,
    *,
    units: str = "",
    booleans: tuple[str, str] | None = None,
) -> ValueT:
    """Returns a dataclass field with its default, and the rest as metadata."""
    metadata = {"meaning": meaning, "rule": rule, "units": units, "booleans": booleans}
    return dataclasses.field(default=default, metadata=metadata)


def describe_field(declared: dataclasses.Field[Any], annotation: Any) -> Field:
    """Returns the `Field` for a dataclass field and its resolved annotation."""
    kind = get_origin(annotation) or annotation
    element = _element_of(get_args(annotation)[0]) if kind is tuple else str
    return Field(declared.default, kind, element=element, **declared.metadata)


def _element_of(annotation: Any) -> Element:
    """Returns the type that an annotation describes: int, float, bool, str, tuple[X, ...] or tuple[X, Y]."""
    if get_origin(annotation) is not tuple:
        return annotation
    first, *others = get_args(annotation)
    return Many(_element_of(first)) if others == [...] else tuple(map(_element_of, (first, *others)))


def convert(value: Any, field: Field) -> Any:
    """Converts `value` to the field's type: integers to floats for float fields, lists to tuples.

    Raises:
      ValueError: the value has another type, is not finite, or breaks the field's rule; the message says what is
        expected.
    """
    if field.booleans is not None and isinstance(value, bool):
        value = field.booleans[value]
    if field.kind is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list of {_type_name(field.element)}")
        result: Any = tuple(_element(item, field.element) for item in value)
    else:
        result = _scalar(value, field.kind)
    if field.rule is not None and not field.rule.holds(result):
        raise ValueError(f"expected {field.rule.expected}")
    return result


def _element(value: Any, kind: Element) -> Any:
    if isinstance(kind, type):
        return _scalar(value, kind)
    if not isinstance(value, list | tuple) or (isinstance(kind, tuple) and len(value) != len(kind)):
        raise ValueError(f"expected {_type_name(kind) if isinstance(kind, Many) else f'a list of {_type_name(kind)}'}")
    parts = kind if isinstance(kind, tuple) else [kind.of] * len(value)
    return tuple(_element(item, part) for item, part in zip(value, parts, strict=True))


def _scalar(value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"expected {_type_name(kind)}")
    if kind is float and not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _type_name(kind: Element) -> str:
    if isinstance(kind, Many):
        return f"a list of {_type_name(kind.of)}"
    if isinstance(kind, tuple):
        return "pairs (" + ", ".join(_type_name(part) for part in kind) + ")"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def from_text(text: str, field: Field) -> Any:
    """Converts an override's text to the field's type; returns text that does not convert, for `convert` to reject."""
    if field.booleans is not None and isinstance(value := _parse_scalar(text, bool), bool):
        return value
    return _parse_list(text, field.element) if field.kind is tuple else _parse_scalar(text, field.kind)


def _parse_list(text: str, element: Element) -> Any:
    """Parses a Python literal such as (1, 2) or ["a", "b"], else items separated by commas."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if isinstance(value, list | tuple):
        return value
    if not isinstance(element, type):  # pairs are only written as a literal
        return value if text.strip() else []
    return [_parse_scalar(item.strip(), element) for item in text.split(",") if item.strip()]


def _parse_scalar(text: str, kind: type) -> Any:
    """Converts the text to `kind`; returns text that does not convert, for the type check to reject."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text
