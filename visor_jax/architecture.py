"""The shape of a VISOR model, as plain frozen dataclasses. No JAX import.

`visor_jax.config` builds an `Architecture` from a run's configuration, `visor_jax.cost` counts its FLOPs and cache
bytes, `visor_jax.model` declares its parameters, and `visor_jax.export` writes it to a folder. An `Architecture` is
frozen and hashable, so it can be a static argument of every compiled program.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

# Upper limits of sizes. A larger value is a typing error or comes from a damaged file, and is rejected.
MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_KERNEL = 1 << 16, 1000, 1024, 4096, 255
MAX_VOCABULARY = 1 << 22  # also of intermediate sizes
MAX_TILE, MAX_PINPOINT, MAX_PINPOINTS = 4096, 1 << 16, 1000  # pixels per side (twice), and the number of pinpoints

# Axes of the device mesh: samples are split over the first two, heads and vocabulary over the last.
MESH_AXES = REPLICA, FSDP, TENSOR = ("replica", "fsdp", "tensor")


class LayerKind(enum.StrEnum):
    """How a decoder layer uses the visual tokens (method.md section 3)."""

    TEXT = "text"
    CROSS = "cross"
    SELF = "self"


PATTERN = (LayerKind.TEXT, LayerKind.CROSS, LayerKind.SELF)  # the paper's super-block


@dataclass(frozen=True)
class TextArchitecture:
    """The Qwen2 decoder, with the field names of `transformers.Qwen2Config`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    embedding_init: float = 0.02  # standard deviation of a random initialization's token embeddings
    residual_init: float = 1.0  # gain of o_proj and down_proj in a random initialization
    max_positions: int = 32_768  # `max_position_embeddings`: the longest sequence of a prompt with its answer


@dataclass(frozen=True)
class VisionArchitecture:
    """The SigLIP tower: runs `num_layers` encoder layers and outputs features before `post_layernorm`."""

    tile_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float = 1e-6
    position_init: str = "random"  # or "sines": how position embeddings start in a random initialization
    residual_init: float = 1.0  # gain of out_proj and fc2 in a random initialization

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        return self.patches_per_side**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class AnyResArchitecture:
    """How pictures are cut into tiles (method.md section 2).

    Attributes:
      pinpoints: (height, width) in pixels; empty makes every picture one stretched tile.
      max_tiles: the "9" of `anyres_max_9`: a cap on visual tokens in units of one tile's tokens, not on tiles.
      image_mean, image_std: per RGB channel, of values in [0, 1].
      packing: neighboring features in one visual token: 1, 2 or 4.
      packing_kind: how neighbors become one: their "mean", "bilinear" interpolation, or "shuffle", their channels side
        by side into the connector, whose input is `packing` times as wide.
      standardize: each picture's pixels minus their mean, over their deviation, in place of `image_mean` and
        `image_std`.
      small_pictures: batches say for every patch of a tile its position in the tile and its picture, so that pictures
        smaller than a tile keep their size and share tiles (`data.small_pictures`).
    """

    pinpoints: tuple[tuple[int, int], ...] = ()
    max_tiles: int = 9
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    packing: int = 1
    packing_kind: str = "mean"
    standardize: bool = False
    small_pictures: bool = False

    @property
    def shuffled(self) -> int:
        """Returns how many patches' features the connector reads side by side."""
        return self.packing if self.packing_kind == "shuffle" else 1


PACKING_KINDS = ("mean", "bilinear", "shuffle")  # config `model.anyres.packing_kind`
REDUCTIONS = ("none", "m3", "divprune", "vispruner", "visionzip", "hired")  # config `model.reduction.method`
MAX_DENOMINATOR = 10_000  # of the kept share as a fraction, so that the device counts kept tokens in int32


def _fraction(share: float) -> Fraction:
    return Fraction(share).limit_denominator(MAX_DENOMINATOR)


@dataclass(frozen=True)
class ReductionArchitecture:
    """How the visual tokens are reduced before the decoder (`visor_jax.model.reduction`, docs/reduction.md).

    Attributes:
      method: one of `REDUCTIONS`.
      ratio: share of the visual tokens that is kept; used as the nearest fraction of a denominator of at most
        `MAX_DENOMINATOR`.
      important_share: vispruner: share of the kept tokens that is chosen by attention.
      contextual_share: visionzip: share of the kept tokens that is merged from the others.
      base_share: hired: share of the kept tokens that belongs to the base tile (the authors' alpha).
      marks: hired: "paper" or "code": which crop a patch of the base tile counts for.
      scales: m3: shares of which training minimizes the mean of the losses; `ratio` is one of them. Empty: `ratio`.
    """

    method: str = "none"
    ratio: float = 1.0
    important_share: float = 0.5
    contextual_share: float = 0.15625
    base_share: float = 0.5
    marks: str = "paper"
    scales: tuple[float, ...] = ()

    @property
    def selects(self) -> bool:
        """Whether values decide which tokens are kept; "m3" pools neighbors instead."""
        return self.method not in ("none", "m3")

    @property
    def fraction(self) -> Fraction:
        """Returns `ratio` as a fraction; what is kept of a group of n tokens is n times it, rounded up."""
        return _fraction(self.ratio)

    @property
    def stride(self) -> int:
        """Returns the side of the windows of patches that "m3" averages; 1 for other methods."""
        return math.isqrt(int(1 / self.fraction)) if self.method == "m3" else 1

    @property
    def share(self) -> float:
        """Returns the share of the visual tokens that remains, about: groups round up, and edges are left out."""
        return float(self.fraction) if self.selects else 1 / self.stride**2

    def kept(self, size: Any) -> Any:
        """Returns how many of a group of `size` tokens a method that selects keeps; int, or an array of integers."""
        share = self.fraction
        return -(-size * share.numerator // share.denominator)

    def important(self, kept: Any) -> Any:
        """Returns how many of a tile's kept tokens "vispruner" chooses by attention, rounded down; as `kept`."""
        share = _fraction(self.important_share)
        return kept * share.numerator // share.denominator

    def contextual(self, kept: Any) -> Any:
        """Returns how many of a tile's kept tokens "visionzip" merges, to the nearest number; as `kept`."""
        share = _fraction(self.contextual_share)
        return (2 * kept * share.numerator + share.denominator) // (2 * share.denominator)

    def of_base(self, kept: Any) -> Any:
        """Returns how many of a picture's kept tokens "hired" gives to its base tile, rounded down; as `kept`."""
        share = _fraction(self.base_share)
        return kept * share.numerator // share.denominator

    def marked(self, patches: int) -> int:
        """Returns how many of a base tile's patches "hired" marks, rounded down."""
        share = _fraction(self.base_share)
        return patches * (share.denominator - share.numerator) // share.denominator

    def candidates(self, visual: int) -> int:
        """Returns how many visual tokens before the reduction a row of `visual` positions after it has room for.

        Groups whose kept tokens fit the row never have more tokens than this, because `kept` rounds up.
        """
        return math.floor(visual / self.fraction) if self.selects else visual


DROPPINGS = ("none", "fastv", "pyramiddrop", "sparsevlm")  # config `model.dropping.method`


class DropCounts(NamedTuple):
    """What one drop makes of a sample: visual tokens that stay, and clusters made of the `best` of the others."""

    kept: Any
    best: Any
    clusters: Any


@dataclass(frozen=True)
class DroppingArchitecture:
    """How many visual tokens the later layers of a dense plan read (`visor_jax.model.dropping`, docs/reduction.md).

    Attributes:
      method: one of `DROPPINGS`.
      layers: how many layers run before each drop, ascending.
      ratios: share of a sample's visual tokens that remains after each drop, rounded down, descending; used as the
        nearest fractions of a denominator of at most `MAX_DENOMINATOR`. "sparsevlm" adds its clusters to them.
      score: fastv: "paper" or "code": whose attention decides.
    """

    method: str = "none"
    layers: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()
    score: str = "code"

    @property
    def active(self) -> bool:
        return self.method != "none"

    @property
    def trains(self) -> bool:
        """Whether training drops tokens, as the method's authors do; otherwise only prompts and given answers do."""
        return self.method == "pyramiddrop"

    def counts(self, drop: int, visual: Any) -> DropCounts:
        """Returns what a drop makes of a sample of `visual` tokens; of int, or of an array of integers.

        "sparsevlm" drops at least one token, and clusters 30 % of those it drops into a tenth of them.
        """
        remaining, counts = visual, DropCounts(visual, 0 * visual, 0 * visual)
        for ratio in self.ratios[: drop + 1]:
            share = _fraction(ratio)
            kept = visual * share.numerator // share.denominator
            best = clusters = 0 * visual
            if self.method == "sparsevlm":
                some = visual > 0
                kept = some * (kept - (kept >= remaining) * (kept - remaining + 1))
                best = some * ((remaining - kept) * 3 // 10 + 1)
                clusters = some * (best // 10 + 1)
            counts = DropCounts(kept, best, clusters)
            remaining = kept + clusters
        return counts

    def remaining(self, drop: int, visual: Any) -> Any:
        """Returns how many visual tokens a sample of `visual` has after a drop; int, or an array of integers."""
        counts = self.counts(drop, visual)
        return counts.kept + counts.clusters

    def room(self, drop: int, visual: int) -> DropCounts:
        """Returns the most that a drop makes of what fits a row of `visual` places; with "sparsevlm" of one sample."""
        if self.method != "sparsevlm":
            return self.counts(drop, visual)
        return _most(self, drop, visual)

    def drops_before(self, layer: int) -> int:
        """Returns how many drops precede a layer."""
        return sum(first <= layer for first in self.layers)

    def visual_in(self, layer: int, visual: int) -> int:
        """Returns how many of a sample's `visual` tokens a layer reads."""
        drops = self.drops_before(layer)
        return self.remaining(drops - 1, visual) if drops else visual


@lru_cache(maxsize=1024)
def _most(dropping: DroppingArchitecture, drop: int, visual: int) -> DropCounts:
    """Returns the largest `DropCounts` of samples of up to `visual` tokens, each field by itself."""
    return DropCounts(*map(max, zip(*(dropping.counts(drop, count) for count in range(visual + 1)), strict=True)))


@dataclass(frozen=True)
class CrossAttentionArchitecture:
    """The added cross-attention from text to visual tokens (method.md section 3)."""

    num_kv_heads: int
    init: str = "copy"  # or "zero": see visor_jax.model.initializers
    gate_init: float = 1.0  # before tanh; ignored by init="zero", whose gate starts at 0
    kernel_size: int = 7  # of the conditional position's depthwise convolution


@dataclass(frozen=True)
class PolicyArchitecture:
    """The MLP over the routing token, with one output per viable budget, at most `max_budgets`."""

    hidden_size: int
    max_budgets: int = 32


@dataclass(frozen=True)
class LayerPlace:
    """One decoder layer: its kind in a VISOR plan, and its place in the parameter tree.

    Attributes:
      kind: in a VISOR plan; in a dense plan every layer runs as self-attention.
      path: of its parameters: "head", "tail", "blocks/self", or "blocks/self/layer_0" if a super-block has several
        layers of its kind.
      index: its index in the stacked arrays at `path`.
      cross: the path of its cross-attention, stacked in the same way; "" if it has none.
    """

    kind: LayerKind
    path: str
    index: int
    cross: str = ""


@dataclass(frozen=True)
class Architecture:
    """Everything that determines the parameter tree and the computation of a model.

    Attributes:
      plan: "visor" (text-only, cross-attention and optional self-attention layers) or "dense" (self-attention in every
        layer, none optional).
      bidirectional_vision: visual tokens also attend to later visual tokens.
      pattern: the layer kinds of a super-block, in order; every "self" is an optional slot. The layers after the last
        whole super-block are text-only.
      head_layers: text-only layers before the first super-block.
    """

    text: TextArchitecture
    vision: VisionArchitecture
    cross: CrossAttentionArchitecture
    policy: PolicyArchitecture
    anyres: AnyResArchitecture = field(default_factory=AnyResArchitecture)
    reduction: ReductionArchitecture = field(default_factory=ReductionArchitecture)
    dropping: DroppingArchitecture = field(default_factory=DroppingArchitecture)
    plan: str = "visor"
    bidirectional_vision: bool = False
    pattern: tuple[LayerKind | str, ...] = PATTERN
    head_layers: int = 0

    def __post_init__(self):
        object.__setattr__(self, "pattern", tuple(LayerKind(kind) for kind in self.pattern))
        missing = [kind.value for kind in (LayerKind.CROSS, LayerKind.SELF) if kind not in self.pattern]
        if missing:
            raise ValueError(f"pattern={self.pattern}: has no {' and no '.join(map(repr, missing))} layer")

    @cached_property
    def without_dropping(self) -> Architecture:
        """Returns this architecture with every visual token in every layer of a dense plan."""
        return replace(self, dropping=DroppingArchitecture())

    @cached_property
    def whole(self) -> Architecture:
        """Returns this architecture with every visual token of every picture in all layers that read them.

        It is this object itself if nothing changes.
        """
        all_tokens = replace(self.without_dropping, anyres=replace(self.anyres, packing=1))
        all_tokens = replace(all_tokens, reduction=ReductionArchitecture())
        return self if all_tokens == self else all_tokens

    @property
    def in_training(self) -> Architecture:
        """Returns what training computes: without a dropping that its authors do not train with."""
        return self if self.dropping.trains else self.without_dropping

    @property
    def connector_input(self) -> int:
        """Returns the width of what the connector reads."""
        return self.vision.hidden_size * self.anyres.shuffled

    @cached_property
    def other_scales(self) -> tuple[Architecture, ...]:
        """Returns this architecture at each of `reduction.scales` besides `reduction.ratio`, in order."""
        ratios = [ratio for ratio in self.reduction.scales if ratio != self.reduction.ratio]
        return tuple(replace(self, reduction=replace(self.reduction, ratio=ratio, scales=())) for ratio in ratios)

    @property
    def num_head_layers(self) -> int:
        """Returns `head_layers`, limited to the number of layers of a dense model."""
        return min(self.head_layers, self.text.num_layers)

    @property
    def num_blocks(self) -> int:
        """Returns the number of whole super-blocks after the head layers."""
        return (self.text.num_layers - self.num_head_layers) // len(self.pattern)

    @property
    def slots_per_block(self) -> int:
        return self.pattern.count(LayerKind.SELF)

    @property
    def num_slots(self) -> int:
        """Returns the number of optional self-attention layers; 0 for a dense plan."""
        return self.num_blocks * self.slots_per_block if self.plan == "visor" else 0

    @property
    def num_tail_layers(self) -> int:
        return self.text.num_layers - self.num_head_layers - self.num_blocks * len(self.pattern)

    @property
    def shared_layers(self) -> range:
        """Returns the layers before the first slot, which every budget runs; the same range for a dense plan.

        None if layers drop tokens, so that one program has them all.
        """
        if self.dropping.active:
            return range(0)
        return range(min(self.num_head_layers + self.pattern.index(LayerKind.SELF), self.text.num_layers))

    @cached_property
    def block(self) -> tuple[LayerPlace, ...]:
        """Returns the layers of the first super-block; other super-blocks have the same paths."""
        return _block(tuple(LayerKind(kind) for kind in self.pattern))

    @cached_property
    def layers(self) -> tuple[LayerPlace, ...]:
        """Returns every decoder layer, in order."""
        head = [LayerPlace(LayerKind.TEXT, "head", i) for i in range(self.num_head_layers)]
        blocks = [
            LayerPlace(place.kind, place.path, index, place.cross)
            for index in range(self.num_blocks)
            for place in self.block
        ]
        return (*head, *blocks, *(LayerPlace(LayerKind.TEXT, "tail", i) for i in range(self.num_tail_layers)))


def _block(pattern: tuple[LayerKind, ...]) -> tuple[LayerPlace, ...]:
    """Returns a super-block's layers; paths are numbered for a kind that occurs more than once."""
    layers = []
    for position, kind in enumerate(pattern):
        suffix = "" if pattern.count(kind) == 1 else f"/layer_{pattern[:position].count(kind)}"
        cross = f"blocks/cross_attention{suffix}" if kind is LayerKind.CROSS else ""
        layers.append(LayerPlace(kind, f"blocks/{kind}{suffix}", 0, cross))
    return tuple(layers)
