"""Plans, budgets, and what they cost: FLOPs of decoder and tower, bytes of the cache.

Ground floor: no JAX import. In: an `Architecture`, the bits of a budget, numbers of tokens and tiles. Out: figures by
formula. They count what the model computes for one sample:

* matrix products (projections, MLPs, attention, logits) and the conditional position, 2 FLOPs per multiply-add; not
  norms, activations, rotary embedding, softmax and the gather of visual tokens, which are a few per mille;
* causal attention at half of queries x keys; cross-attention and the tower's attention in full;
* every layer over all its tokens, although the last layer's visual outputs are read by nobody;
* the logits of one token, unless `num_logits` says otherwise.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from visor_jax.architecture import Architecture, TextArchitecture
from visor_jax.errors import RequestError, nearest

Bits = tuple[bool, ...]

WORDS = ("auto", "full", "empty")
MAX_SLOTS = 64  # more than a third of the layers of any decoder: a larger number in a request is a slip
EXPECTED = "expected auto, full, empty, a number of slots such as 3, or one bit per slot such as 0b101"


# --- plans ------------------------------------------------------------------------------------------------------------


class LayerKind(enum.Enum):
    """What a decoder layer does with the visual tokens (method.md section 3)."""

    TEXT = "text"
    CROSS = "cross"
    SELF = "self"


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
    def visor(cls, num_layers: int) -> Plan:
        """Super-blocks of text-only, cross-attention and optional self-attention; what is left over is text-only."""
        blocks, rest = divmod(num_layers, 3)
        kinds = (LayerKind.TEXT, LayerKind.CROSS, LayerKind.SELF) * blocks + (LayerKind.TEXT,) * rest
        return cls(kinds, tuple(range(2, 3 * blocks, 3)))

    @classmethod
    def dense(cls, num_layers: int) -> Plan:
        """The base model: self-attention everywhere, nothing optional."""
        return cls((LayerKind.SELF,) * num_layers)

    @classmethod
    def of(cls, architecture: Architecture) -> Plan:
        make = cls.visor if architecture.plan == "visor" else cls.dense
        return make(architecture.text.num_layers)

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


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def decoder_flops(
    architecture: Architecture,
    bits: Sequence[bool],
    num_visual: int,
    num_text: int,
    plan: Plan | None = None,
    *,
    num_logits: int = 1,
    causal_half: bool = True,
) -> float:
    """FLOPs of the decoder's forward pass over one sample's visual and text tokens.

    Args:
      bits: one per slot of the plan; empty for a dense one.
      plan: None takes the architecture's own.
      num_logits: tokens whose logits are computed; 1 for a prompt, `num_text` in training.
      causal_half: False counts causal attention as an implementation without skipping computes it: all queries x keys.
    """
    text = architecture.text
    causal = 0.5 if causal_half else 1.0
    total = 2.0 * num_logits * text.hidden_size * text.vocab_size
    for kind in (plan or Plan.of(architecture)).under(bits):
        tokens = num_text + (num_visual if kind is LayerKind.SELF else 0)
        pairs = causal * tokens**2
        if kind is LayerKind.SELF and architecture.bidirectional_vision:
            pairs += (1 - causal) * num_visual**2
        total += tokens * _layer_flops_per_token(text) + _attention_flops(text, pairs)
        if kind is LayerKind.CROSS:
            total += _cross_read_flops(architecture, num_visual, num_text)
            total += _cross_keys_flops(architecture, num_visual) + conditional_position_flops(architecture, num_visual)
    return total


def dense_decoder_flops(architecture: Architecture, num_visual: int, num_text: int) -> float:
    """`decoder_flops` of the dense plan on the same shape: what every saving is measured against."""
    return decoder_flops(architecture, (), num_visual, num_text, Plan.dense(architecture.text.num_layers))


def decode_flops(architecture: Architecture, bits: Sequence[bool], num_visual: int, num_text: int) -> float:
    """FLOPs of one decoding step against the cache, logits included; `num_text` counts the new token too."""
    text = architecture.text
    total = 2.0 * text.hidden_size * text.vocab_size
    for kind in Plan.of(architecture).under(bits):
        keys = num_text + (num_visual if kind is LayerKind.SELF else 0)
        total += _layer_flops_per_token(text) + _attention_flops(text, keys)
        if kind is LayerKind.CROSS:
            total += _cross_read_flops(architecture, num_visual, 1)
    return total


def route_flops(architecture: Architecture, num_visual: int, num_text: int) -> float:
    """What the policy adds: the routing token through the layers before the first slot, and its MLP."""
    plan, text, policy = Plan.of(architecture), architecture.text, architecture.policy
    if not plan.slots:
        return 0.0
    total = 2.0 * policy.hidden_size * (text.hidden_size + policy.max_budgets)
    for kind in plan.kinds[: plan.slots[0]]:
        total += _layer_flops_per_token(text) + _attention_flops(text, num_text)
        if kind is LayerKind.CROSS:
            total += _cross_read_flops(architecture, num_visual, 1)
    return total


def tower_flops(architecture: Architecture, num_tiles: int) -> float:
    """FLOPs of the vision tower and the connector over `num_tiles` tiles; no budget changes them."""
    vision, out = architecture.vision, architecture.text.hidden_size
    size, patches = vision.hidden_size, vision.patches_per_tile
    layer = 4.0 * size * vision.intermediate_size
    if not vision.patch_local:
        layer += 8.0 * size**2 + 4.0 * patches * size
    embedding = 2.0 * 3 * vision.patch_size**2 * size
    connector = 2.0 * (size + out) * out
    return num_tiles * patches * (embedding + vision.num_layers * layer + connector)


def saving(
    architecture: Architecture, bits: Sequence[bool], num_visual: int, num_text: int, num_tiles: int
) -> tuple[float, float]:
    """How many times cheaper than the dense plan: (decoder only, end to end with the tower)."""
    dense = dense_decoder_flops(architecture, num_visual, num_text)
    ours = decoder_flops(architecture, bits, num_visual, num_text)
    tower = tower_flops(architecture, num_tiles)
    return dense / ours, (dense + tower) / (ours + tower)


def conditional_position_flops(architecture: Architecture, num_visual: int) -> float:
    """The depthwise convolution over the visual sequence, in one cross-attention layer."""
    return 2.0 * architecture.cross.kernel_size * architecture.text.hidden_size * num_visual


def _layer_flops_per_token(text: TextArchitecture) -> float:
    """All projections of one Qwen2 layer: q and o, k and v, gate, up and down."""
    heads = 2 * text.num_heads * text.head_dim + 2 * text.num_kv_heads * text.head_dim
    return 2.0 * text.hidden_size * (heads + 3 * text.intermediate_size)


def _attention_flops(text: TextArchitecture, pairs: float) -> float:
    """Logits and weighted sum over `pairs` of a query and a key."""
    return 4.0 * pairs * text.num_heads * text.head_dim


def _cross_read_flops(architecture: Architecture, num_visual: int, num_text: int) -> float:
    """The text's half of cross-attention: q and o projections, attention over every visual key."""
    text = architecture.text
    projections = 4.0 * num_text * text.hidden_size * text.num_heads * text.head_dim
    return projections + _attention_flops(text, num_text * num_visual)


def _cross_keys_flops(architecture: Architecture, num_visual: int) -> float:
    """The visual half of cross-attention: k and v projections."""
    text = architecture.text
    return 4.0 * num_visual * text.hidden_size * architecture.cross.num_kv_heads * text.head_dim


# --- cache ------------------------------------------------------------------------------------------------------------


def cache_bytes(
    architecture: Architecture, bits: Sequence[bool], num_visual: int, num_text: int, bytes_per_value: int
) -> int:
    """Bytes of one sample's keys and values: text in every layer, visual only where it is read again."""
    text = architecture.text
    kinds = Plan.of(architecture).under(bits)
    heads = num_text * text.num_kv_heads * len(kinds)
    heads += num_visual * text.num_kv_heads * kinds.count(LayerKind.SELF)
    heads += num_visual * architecture.cross.num_kv_heads * kinds.count(LayerKind.CROSS)
    return 2 * heads * text.head_dim * bytes_per_value
