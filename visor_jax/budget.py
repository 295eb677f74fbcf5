"""Plans and budgets: the kind of every decoder layer, and which optional layers run. No JAX import.

A `Plan` comes from an `Architecture`. A `Budget` is parsed from text and resolves to bits, one per optional layer.
`visor_jax.cost` counts what a budget costs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from visor_jax.architecture import PATTERN, Architecture, LayerKind
from visor_jax.errors import RequestError, nearest

Bits = tuple[bool, ...]

WORDS = ("auto", "full", "empty")
MAX_SLOTS = 64  # of any plan (configurations with more are refused); a larger number in a request is a typing error
EXPECTED = "expected auto, full, empty, a number of slots such as 3, or one bit per slot such as 0b101"


# --- plans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The kind of every decoder layer; `slots` are the indices of the optional layers."""

    kinds: tuple[LayerKind, ...]
    slots: tuple[int, ...] = ()

    def __post_init__(self):
        wrong = [i for i in self.slots if self.kinds[i] is not LayerKind.SELF]
        if wrong:
            raise ValueError(f"slots must be self-attention layers; layers {wrong} are not")

    @classmethod
    def visor(cls, num_layers: int, pattern: Sequence[LayerKind | str] = PATTERN, head_layers: int = 0) -> Plan:
        """Builds a plan: `head_layers` text-only layers, super-blocks of `pattern`, then text-only layers."""
        blocks = (num_layers - head_layers) // len(pattern)
        head, unit = (LayerKind.TEXT,) * head_layers, tuple(LayerKind(kind) for kind in pattern)
        kinds = (*head, *unit * blocks)
        slots = tuple(i for i, kind in enumerate(kinds) if kind is LayerKind.SELF)
        return cls((*kinds, *(LayerKind.TEXT,) * (num_layers - len(kinds))), slots)

    @classmethod
    def dense(cls, num_layers: int) -> Plan:
        """Builds the base model's plan: every layer is self-attention, none is optional."""
        return cls((LayerKind.SELF,) * num_layers)

    @classmethod
    def of(cls, architecture: Architecture) -> Plan:
        """Builds the plan of an architecture."""
        if architecture.plan == "dense":
            return cls.dense(architecture.text.num_layers)
        return cls.visor(architecture.text.num_layers, architecture.pattern, architecture.num_head_layers)

    @property
    def cross(self) -> tuple[int, ...]:
        """Returns the indices of the cross-attention layers."""
        return tuple(i for i, kind in enumerate(self.kinds) if kind is LayerKind.CROSS)

    def under(self, bits: Sequence[bool]) -> tuple[LayerKind, ...]:
        """Returns the layer kinds that run under a budget; a slot that is off runs as text-only.

        Raises:
          ValueError: the number of bits is not the number of slots.
        """
        if len(bits) != len(self.slots):
            raise ValueError(f"bits must have one entry for each of the {len(self.slots)} slots, got {len(bits)}")
        off = {slot for slot, on in zip(self.slots, bits, strict=True) if not on}
        return tuple(LayerKind.TEXT if i in off else kind for i, kind in enumerate(self.kinds))


# --- budgets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """A request for a budget: a word ("auto", "full", "empty"), a number of slots, or bits."""

    request: str | int | Bits

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parses "auto", "full", "empty", "3" (slots) or "0b101" (leftmost bit: first slot).

        Raises:
          RequestError: anything else.
        """
        if text in WORDS:
            return cls(text)
        if re.fullmatch(f"0b[01]{{1,{MAX_SLOTS}}}", text):
            return cls(parse_bits(text))
        if re.fullmatch("[0-9]{1,3}", text) and int(text) <= MAX_SLOTS:
            return cls(int(text))
        hint = nearest(text, WORDS)
        raise RequestError(f"budget {text!r}: {EXPECTED}" + (f"; {hint}" if hint else ""))

    @classmethod
    def of(cls, bits: Sequence[bool]) -> Budget:
        """Builds a request for exactly these bits."""
        return cls(tuple(bool(bit) for bit in bits))

    def __str__(self) -> str:
        return budget_name(self.request) if isinstance(self.request, tuple) else str(self.request)

    def resolve(self, num_slots: int, viable: Sequence[Bits] | None = None) -> Bits:
        """Returns the bits of this budget in a model with `num_slots` slots.

        Args:
          num_slots: slots of the model's plan.
          viable: its viable budgets, in the order of the search; "n" selects the first with n slots on.

        Raises:
          RequestError: the request is "auto" (the policy decides per sample), has the wrong number of bits, or is a
            number of slots that exceeds the model's or has no known viable budget.
        """
        if self.request == "auto":
            raise RequestError("budget 'auto' is decided for each sample by the policy; name a fixed budget here")
        if isinstance(self.request, tuple):
            if len(self.request) != num_slots:
                raise RequestError(
                    f"budget '{bit_string(self.request)}' has {len(self.request)} bits, the model has {num_slots} slots"
                    f": expected 0b and {num_slots} bits"
                )
            return self.request
        count = {"empty": 0, "full": num_slots}[self.request] if isinstance(self.request, str) else self.request
        if count > num_slots:
            raise RequestError(f"budget '{self}' asks for more slots than the model has: expected 0 to {num_slots}")
        if count in (0, num_slots):
            return (count > 0,) * num_slots
        matches = [tuple(bits) for bits in viable or () if sum(bits) == count]
        if not matches:
            names = ", ".join(budget_name(bits) for bits in viable or ()) or "none known, the search has not run"
            raise RequestError(
                f"budget '{self}' means the best viable budget with {count} slots on, but none is known (viable: "
                f"{names}); expected one of these, or bits such as 0b101"
            )
        return matches[0]


def budget_name(bits: Sequence[bool]) -> str:
    """Returns a budget's name in tables: "empty", "full" or "0b101" (leftmost bit: first slot)."""
    if not any(bits):
        return "empty"
    return "full" if all(bits) else bit_string(bits)


def bit_string(bits: Sequence[bool]) -> str:
    """Returns every bit as "0b100", also for the empty and the full budget."""
    return "0b" + "".join("1" if bit else "0" for bit in bits)


def parse_bits(text: str) -> Bits:
    """Inverts `bit_string`."""
    return tuple(bit == "1" for bit in text.removeprefix("0b"))


def check_viable(bits: Bits, viable: Sequence[Bits], *, has_policy: bool) -> None:
    """Checks that a searched model was trained under a budget.

    Raises:
      RequestError: the budget is not viable.
    """
    if bits not in viable:
        names = ", ".join([*(["auto"] if has_policy else []), *map(budget_name, viable)])
        raise RequestError(f"budget {budget_name(bits)!r} is not viable: expected one of {names}")


def parse_budgets(names: object, num_slots: int, *, where: str) -> list[Bits]:
    """Parses a list of budgets from a file, each as `bit_string` writes it.

    Raises:
      RequestError: `names` is anything else; the message begins with `where`, the file and field.
    """
    form = re.compile(f"0b[01]{{{num_slots}}}")
    if not (isinstance(names, list) and all(isinstance(name, str) and form.fullmatch(name) for name in names)):
        raise RequestError(f"{where}={names!r}: expected a list of budgets, 0b and {num_slots} bits each")
    return [parse_bits(name) for name in names]


def by_count(num_slots: int) -> list[Bits]:
    """Returns one budget per number of slots on, the first slots first, for models without a search result."""
    return [(True,) * count + (False,) * (num_slots - count) for count in range(num_slots + 1)]


def all_subsets(num_slots: int) -> list[Bits]:
    """Returns every budget of `num_slots` slots, by number of slots on, then lexicographically."""
    return sorted(itertools.product((False, True), repeat=num_slots), key=lambda bits: (sum(bits), bits))


def searched_at_once(num_slots: int, max_subsets: int, slots: Sequence[int] = ()) -> list[Bits]:
    """Returns every budget that has only `slots` (empty: any) on, and the full one, in the order of `all_subsets`.

    Returns [] if these are more than `max_subsets`.
    """
    places, full = sorted(slots) or list(range(num_slots)), (True,) * num_slots
    if 2 ** len(places) + (len(places) < num_slots) > max_subsets:
        return []
    budgets = []
    for bits in all_subsets(len(places)):
        on = {slot for slot, chosen in zip(places, bits, strict=True) if chosen}
        budgets.append(tuple(slot in on for slot in range(num_slots)))
    return list(dict.fromkeys([*budgets, full]))
