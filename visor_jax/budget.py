"""Plans and budgets: what kind every decoder layer is, and which of its optional layers run.

Ground floor: no JAX import. In: an `Architecture`, or a budget as people write it. Out: the kinds of the layers, and
the bits of a budget, one for each optional layer. What a budget costs is in `visor_jax.cost`.
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
MAX_SLOTS = 64  # more than a third of the layers of any decoder: a larger number in a request is a slip
EXPECTED = "expected auto, full, empty, a number of slots such as 3, or one bit per slot such as 0b101"


# --- plans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The kind of every decoder layer; `slots` are the indices of the layers that a budget may turn off."""

    kinds: tuple[LayerKind, ...]
    slots: tuple[int, ...] = ()

    def __post_init__(self):
        wrong = [i for i in self.slots if self.kinds[i] is not LayerKind.SELF]
        if wrong:
            raise ValueError(f"slots must be self-attention layers, layers {wrong} are not")

    @classmethod
    def visor(cls, num_layers: int, pattern: Sequence[LayerKind | str] = PATTERN, head_layers: int = 0) -> Plan:
        """Text-only layers first, then super-blocks of `pattern`; what is left over at the end is text-only."""
        blocks = (num_layers - head_layers) // len(pattern)
        head, unit = (LayerKind.TEXT,) * head_layers, tuple(LayerKind(kind) for kind in pattern)
        kinds = (*head, *unit * blocks)
        slots = tuple(i for i, kind in enumerate(kinds) if kind is LayerKind.SELF)
        return cls((*kinds, *(LayerKind.TEXT,) * (num_layers - len(kinds))), slots)

    @classmethod
    def dense(cls, num_layers: int) -> Plan:
        """The base model: self-attention everywhere, nothing optional."""
        return cls((LayerKind.SELF,) * num_layers)

    @classmethod
    def of(cls, architecture: Architecture) -> Plan:
        if architecture.plan == "dense":
            return cls.dense(architecture.text.num_layers)
        return cls.visor(architecture.text.num_layers, architecture.pattern, architecture.num_head_layers)

    @property
    def cross(self) -> tuple[int, ...]:
        """The indices of the cross-attention layers."""
        return tuple(i for i, kind in enumerate(self.kinds) if kind is LayerKind.CROSS)

    def under(self, bits: Sequence[bool]) -> tuple[LayerKind, ...]:
        """The kinds that run under a budget: a slot that is off runs as text-only.

        Raises:
          ValueError: not one bit per slot.
        """
        if len(bits) != len(self.slots):
            raise ValueError(f"bits must have one entry for each of the {len(self.slots)} slots, got {len(bits)}")
        off = {slot for slot, on in zip(self.slots, bits, strict=True) if not on}
        return tuple(LayerKind.TEXT if i in off else kind for i, kind in enumerate(self.kinds))


# --- budgets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """A request for a budget: a word ("auto", "full", "empty"), a number of slots, or the bits themselves."""

    request: str | int | Bits

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from "auto", "full", "empty", "3" (slots) or "0b101" (leftmost bit: first slot).

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
        raise RequestError(f"budget {text!r} is none: {EXPECTED}" + (f"; {hint}" if hint else ""))

    @classmethod
    def of(cls, bits: Sequence[bool]) -> Budget:
        return cls(tuple(bool(bit) for bit in bits))

    def __str__(self) -> str:
        return budget_name(self.request) if isinstance(self.request, tuple) else str(self.request)

    def resolve(self, num_slots: int, viable: Sequence[Bits] | None = None) -> Bits:
        """The bits that are meant in a model of `num_slots` slots.

        Args:
          num_slots: slots of the model's plan.
          viable: its viable budgets, in the order of the search; the first with n slots on is what "n" means.

        Raises:
          RequestError: "auto" (the policy decides it, sample by sample), bits of another length, a number of slots that
            the model has not or for which no viable budget is known.
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
        found = [tuple(bits) for bits in viable or () if sum(bits) == count]
        if not found:
            names = ", ".join(budget_name(bits) for bits in viable or ()) or "none known, the search has not run"
            raise RequestError(
                f"budget '{self}' means the best viable budget with {count} slots on, and there is none (viable: "
                f"{names}); expected one of these, or the bits themselves"
            )
        return found[0]


def budget_name(bits: Sequence[bool]) -> str:
    """The name under which a budget stands in every table: "empty", "full" or "0b101" (leftmost bit: first slot)."""
    if not any(bits):
        return "empty"
    return "full" if all(bits) else bit_string(bits)


def bit_string(bits: Sequence[bool]) -> str:
    """ "0b100": every bit, also of the empty and the full budget."""
    return "0b" + "".join("1" if bit else "0" for bit in bits)


def parse_bits(text: str) -> Bits:
    """The inverse of `bit_string`."""
    return tuple(bit == "1" for bit in text.removeprefix("0b"))


def parse_budgets(names: object, num_slots: int, *, where: str) -> list[Bits]:
    """Budgets from a list in a file, each as `bit_string` writes it.

    Raises:
      RequestError: anything else; it begins with `where`, the file and field.
    """
    wanted = re.compile(f"0b[01]{{{num_slots}}}")
    if not (isinstance(names, list) and all(isinstance(name, str) and wanted.fullmatch(name) for name in names)):
        raise RequestError(f"{where}={names!r}: expected a list of budgets, 0b and {num_slots} bits each")
    return [parse_bits(name) for name in names]


def by_count(num_slots: int) -> list[Bits]:
    """One budget for each number of slots on, the first ones: for models of which no search has found the best."""
    return [(True,) * count + (False,) * (num_slots - count) for count in range(num_slots + 1)]


def all_subsets(num_slots: int) -> list[Bits]:
    """Every budget of `num_slots` slots, by number of slots on, then lexicographically."""
    return sorted(itertools.product((False, True), repeat=num_slots), key=lambda bits: (sum(bits), bits))
