"""Rules for values of configuration fields, attached to the fields by `visor_jax.config.schema`. No JAX import."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from visor_jax.config.sampling import EXPECTED as STRATEGIES
from visor_jax.config.sampling import is_sampling

# Licenses as the Hugging Face hub spells them; the hub rejects a model card with any other.
_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
openrail++ afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl osl-3.0
postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3
llama4 gemma unknown other
"""
LICENSES = tuple(_LICENSES.split())


DRAWN_BUDGETS = ("viable", "subsets")  # sets of budgets that a step draws from


@dataclass(frozen=True)
class Rule:
    """A predicate on a field's value, and the text that completes "expected ..." in an error message."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(low: float) -> Rule:
    return Rule(lambda value: value >= low, f"a number of at least {low}")


def above(low: float) -> Rule:
    return Rule(lambda value: value > low, f"a number above {low}")


def within(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"a number from {low} to {high}")


def below_one() -> Rule:
    return Rule(lambda value: 0 <= value < 1, "a number from 0 to less than 1")


def one_of(*names: str) -> Rule:
    return Rule(lambda value: value in names, "one of " + ", ".join(repr(name) for name in names))


def ordered_subset(names: Iterable[str]) -> Rule:
    """Accepts a tuple of distinct names in the order of `names`."""
    order = list(names)

    def holds(value: tuple[str, ...]) -> bool:
        return all(name in order for name in value) and list(value) == sorted(set(value), key=order.index)

    return Rule(holds, "different stages in the order " + ", ".join(order))


def not_empty() -> Rule:
    return Rule(lambda value: len(value) > 0, "a non-empty value")


def parse_grids(text: str) -> tuple[tuple[int, int], ...]:
    """Parses "(1x1),(1x2)" into (rows, columns) pairs; "(1x1),...,(6x6)" adds every grid between the two.

    Raises:
      ValueError: the text is not of this form.
    """
    grids: list[tuple[int, int]] = []
    span = False
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part == "..." and grids and not span:
            span = True
            continue
        match = re.fullmatch(r"\(([1-9]\d?)x([1-9]\d?)\)", part)
        if match is None:
            raise ValueError(f"{part!r} is not a grid")
        rows, columns = int(match[1]), int(match[2])
        if span:
            first_row, first_column = grids.pop()
            grids += [(r, c) for r in range(first_row, rows + 1) for c in range(first_column, columns + 1)]
        else:
            grids.append((rows, columns))
        span = False
    if span:
        raise ValueError("'...' needs a grid after it")
    return tuple(grids)


def is_grids(text: str) -> bool:
    try:
        parse_grids(text)
    except ValueError:
        return False
    return True


def parse_window(text: str) -> tuple[int, int]:
    """Parses "START:STEPS", both at least 1.

    Raises:
      ValueError: the text is not of this form.
    """
    match = re.fullmatch(r"([1-9]\d{0,15}):([1-9]\d{0,15})", text)
    if match is None:
        raise ValueError(f"{text!r} is not START:STEPS")
    return int(match[1]), int(match[2])


def is_window(text: str) -> bool:
    try:
        parse_window(text)
    except ValueError:
        return text == ""
    return True


def is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


MESH_SIZE = Rule(lambda value: value == -1 or value >= 1, "at least 1, or -1 for all remaining devices")
PATTERNS = Rule(
    lambda value: len(value) > 0 and all(map(is_pattern, value)), "one or more regular expressions for paths"
)
RATES = Rule(
    lambda value: all(is_pattern(pattern) and rate >= 0 for pattern, rate in value),
    "pairs (regular expression for paths, multiplier of at least 0)",
)
WINDOW = Rule(is_window, "START:STEPS, such as '10:3' for steps 10, 11 and 12, or an empty value")
SHARE = Rule(lambda value: 1e-4 <= value <= 1, "a number from 0.0001 to 1")
SHARES = Rule(
    lambda value: len({*value}) == len(value) and all(map(SHARE.holds, value)), "different numbers from 0.0001 to 1"
)
PACKINGS = Rule(lambda value: value in (1, 2, 4), "1, 2 or 4")
GRIDS = Rule(is_grids, "grids of tiles, rows x columns, such as '(1x2),(2x1)' or '(1x1),...,(6x6)'")
CHANNELS = Rule(lambda value: len(value) == 3, "three numbers, one per RGB channel")
DEVIATIONS = Rule(lambda value: len(value) == 3 and min(value) > 0, "three numbers above 0, one per RGB channel")
BUDGETS = Rule(
    lambda value: value in ("full", "empty", *DRAWN_BUDGETS) or bool(re.fullmatch("0b[01]+", value)),
    "'full', 'empty' or bits such as '0b10' for every step, or 'viable' or 'subsets' to draw from",
)
SAMPLING = Rule(is_sampling, STRATEGIES)
PARTS = Rule(
    lambda value: all(path and is_sampling(sampling or "all") and weight >= 0 for _, path, sampling, weight in value),
    "a (source or '', path, sampling or '', weight or 0) for each source",
)
CURRICULUM = Rule(
    lambda phases: (
        all(first >= 0 for first, _ in phases)
        and all(a < b for (a, _), (b, _) in itertools.pairwise(phases))
        and all(len({name for name, _ in weights}) == len(weights) for _, weights in phases)
        and all(min(w for _, w in weights) >= 0 < max(w for _, w in weights) for _, weights in phases if weights)
        and all(weights for _, weights in phases)
    ),
    "(steps done before, ((part, weight), ...)) for each phase: increasing steps, different parts, weights of at least"
    " 0 and not all 0",
)
SEED = Rule(lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
LICENSE = Rule(
    lambda value: value in ("", *LICENSES), "a license as the hub spells it, such as 'apache-2.0' or 'other'"
)
