"""LLaVA's sampling strategies: `all`, `first:N`, `end:N`, `random:N`, with N a number of records or a percentage.

In: the text of a strategy. Out: a `Sampling`, which says how many of a number of records are used. Imports no JAX.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

KINDS = ("all", "first", "end", "random")
EXPECTED = "all, first:N, end:N or random:N, with N a number of records or a percentage such as 10%"

_FORM = re.compile(r"(all|first|end|random)(?::([0-9]{1,15}|[0-9]{1,3}(?:\.[0-9]{1,9})?%))?")


@dataclass(frozen=True)
class Sampling:
    """Which records are used: the first, the last, or randomly chosen ones; `count` of them, or `percent`."""

    kind: str
    count: int | None = None
    percent: float | None = None

    def size(self, total: int) -> int:
        """Returns how many of `total` records are used; of a percentage the next whole number, as LLaVA counts."""
        if self.percent is not None:
            return min(total, math.ceil(total * self.percent / 100))
        return total if self.count is None else min(total, self.count)


def parse_sampling(text: str) -> Sampling:
    """Parses a strategy. Without a number all records are used, as in LLaVA's code.

    Raises:
      ValueError: the text is no strategy, or its number is 0 or above 100 %.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None or (match[1] == "all" and match[2]):
        raise ValueError(f"expected {EXPECTED}")
    kind, number = match.groups()
    if number is None:
        return Sampling(kind)
    if number.endswith("%"):
        percent = float(number[:-1])
        if not 0 < percent <= 100:
            raise ValueError("expected a percentage above 0 and up to 100")
        return Sampling(kind, percent=percent)
    if int(number) < 1:
        raise ValueError("expected at least 1 record")
    return Sampling(kind, count=int(number))


def is_sampling(text: str) -> bool:
    """Returns whether a text is a sampling strategy."""
    try:
        parse_sampling(text)
    except ValueError:
        return False
    return True
