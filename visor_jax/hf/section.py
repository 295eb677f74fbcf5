"""Objects of JSON files from outside, each field checked before it is believed.

In: the path of a file. Out: a `Section`, whose methods give fields of one type and range and raise `RequestError`, with
the file, the field, its value and what is expected, for every other.
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
    """A file that holds one JSON object; raises RequestError."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise RequestError(f"{path}: holds {type(found).__name__}, expected an object")
    return found


@dataclass(frozen=True)
class Section:
    """An object of a configuration file; `where` is the file and, with a dot behind it, the object's name.

    A field without a default must be there; null is as good as absent. Each method raises RequestError.
    """

    values: Mapping[str, Any]
    where: str

    def wrong(self, name: str, expected: str) -> RequestError:
        return RequestError(f"{self.where}{name}={_SHORT.repr(self.values.get(name))}: expected {expected}")

    def get(self, name: str, default: Any = None) -> Any:
        found = self.values.get(name)
        found = default if found is None else found
        if found is None:
            raise RequestError(
                f"{self.where}{name}: missing; expected a whole configuration, as transformers writes it"
            )
        return found

    def section(self, name: str, default: Mapping[str, Any] | None = None) -> Section:
        found = self.get(name, default)
        if not isinstance(found, Mapping):
            raise self.wrong(name, "an object")
        return Section(found, f"{self.where}{name}.")

    def whole(self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_WIDTH) -> int:
        found = self.get(name, default)
        if type(found) is not int or not least <= found <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}")
        return found

    def positive(self, name: str, default: float | None = None) -> float:
        found = self.get(name, default)
        if type(found) not in (int, float) or not 0 < found < math.inf:
            raise self.wrong(name, "a positive number")
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        found = self.get(name, default)
        if not isinstance(found, bool):
            raise self.wrong(name, "true or false")
        return found

    def channels(self, name: str, default: Sequence[float], *, least: float, most: float) -> tuple[float, float, float]:
        """A number from `least` to `most` for each of red, green and blue."""
        found = self.get(name, list(default))
        is_list = isinstance(found, list) and len(found) == 3
        if not (is_list and all(type(x) in (int, float) and least <= x <= most for x in found)):
            raise self.wrong(name, f"three numbers from {least:g} to {most:g}")
        red, green, blue = map(float, found)
        return red, green, blue
