"""Validated access to the fields of JSON configuration files.

In: the path of a file. Out: a `Section`, whose methods check type and range of a field. A wrong value is a
`RequestError` with the file, the field, its value and the expected values.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.architecture import MAX_WIDTH
from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_json

_SHORT = reprlib.Repr()  # values of files from outside may be long or deep
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def read_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object; raises RequestError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RequestError(f"{path}: holds {type(value).__name__}, expected an object")
    return value


@dataclass(frozen=True)
class Section:
    """One object of a configuration file.

    A field without a default is required; null counts as missing. The methods raise RequestError.

    Attributes:
      values: the object's fields.
      where: prefix of messages: the file and the dotted name of the object, "config.json: text_config.".
    """

    values: Mapping[str, Any]
    where: str

    def wrong(self, name: str, expected: str) -> RequestError:
        """Returns the error for a wrong value of a field."""
        return RequestError(f"{self.where}{name}={_SHORT.repr(self.values.get(name))}: expected {expected}")

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field of any type."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise RequestError(
                f"{self.where}{name}: missing; expected a whole configuration, as transformers writes it"
            )
        return value

    def section(self, name: str, default: Mapping[str, Any] | None = None) -> Section:
        """Returns a nested object."""
        value = self.get(name, default)
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Section(value, f"{self.where}{name}.")

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_WIDTH) -> int:
        """Returns an integer from `minimum` to `maximum`."""
        value = self.get(name, default)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.wrong(name, f"a whole number from {minimum} to {maximum}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """Returns a positive finite number."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.wrong(name, "a positive number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Returns a boolean."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def channels(
        self, name: str, default: Sequence[float], *, minimum: float, maximum: float
    ) -> tuple[float, float, float]:
        """Returns three numbers from `minimum` to `maximum`, for red, green and blue."""
        value = self.get(name, list(default))
        is_list = isinstance(value, list) and len(value) == 3
        if not (is_list and all(type(x) in (int, float) and minimum <= x <= maximum for x in value)):
            raise self.wrong(name, f"three numbers from {minimum:g} to {maximum:g}")
        red, green, blue = map(float, value)
        return red, green, blue
