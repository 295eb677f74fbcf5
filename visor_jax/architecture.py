"""The shape of a VISOR model, as plain frozen dataclasses.

Ground floor: no JAX import. `visor_jax.config` builds an `Architecture` from a run's configuration, `visor_jax.budget`
counts its FLOPs and cache bytes, `visor_jax.model` declares its parameters, and `visor_jax.export` writes it down.
Being frozen and hashable, an `Architecture` is a static argument of every compiled program.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import cached_property

# Sizes that no model of this kind exceeds: what is larger is a slip or a damaged file, and nothing is computed from it.
MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_KERNEL = 1 << 16, 1000, 1024, 4096, 255
MAX_VOCABULARY = 1 << 22  # also of intermediate sizes
MAX_TILE, MAX_PINPOINT, MAX_PINPOINTS = 4096, 1 << 16, 1000  # pixels a side, and how many pinpoints

# Axes of the device mesh, named here once: samples are split over the first two, heads and vocabulary over the last.
MESH_AXES = REPLICA, FSDP, TENSOR = ("replica", "fsdp", "tensor")


class LayerKind(enum.StrEnum):
    """What a decoder layer does with the visual tokens (method.md section 3)."""

    TEXT = "text"
    CROSS = "cross"
    SELF = "self"


PATTERN = (LayerKind.TEXT, LayerKind.CROSS, LayerKind.SELF)  # of the paper: what a super-block consists of


@dataclass(frozen=True)
class TextArchitecture:
    """The Qwen2 decoder (`transformers.Qwen2Config`'s names)."""

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
    norm_init: float = 1.0  # scale of the final norm in a random initialization: the temperature of a tied head
    recency_init: float = 0.0  # head start of near tokens over far ones, as a logit, in random text-only attention
    max_positions: int = 32_768  # `max_position_embeddings`: the longest sequence that may be asked about


@dataclass(frozen=True)
class VisionArchitecture:
    """The SigLIP tower: `num_layers` encoder layers are run, the output is taken before `post_layernorm`.

    `patch_local` drops the attention of every encoder layer, so that no patch sees another (the generated data set
    needs a tower that does not do the decoder's work for it).
    """

    tile_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float = 1e-6
    patch_local: bool = False

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

    `pinpoints` are (height, width) in pixels; empty means that every picture is one stretched tile. `max_tiles` is the
    "9" of `anyres_max_9`: a cap on visual tokens in units of tiles, not on tiles. Mean and standard deviation are per
    RGB channel, for values in [0, 1]. `packing` is how many neighboring features make one visual token: 1, 2 or 4.
    """

    pinpoints: tuple[tuple[int, int], ...] = ()
    max_tiles: int = 9
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    packing: int = 1


@dataclass(frozen=True)
class CrossAttentionArchitecture:
    """The new layers through which text reads the visual tokens (method.md section 3)."""

    num_kv_heads: int
    init: str = "copy"  # or "zero", "match": see visor_jax.model.cross_init
    gate_init: float = 1.0  # before tanh; ignored by init="zero", whose gate starts at 0
    kernel_size: int = 7  # of the conditional position's depthwise convolution


@dataclass(frozen=True)
class PolicyArchitecture:
    """The MLP that reads the routing token; it has one output for each of at most `max_budgets` viable budgets."""

    hidden_size: int
    max_budgets: int = 32


@dataclass(frozen=True)
class LayerPlace:
    """One decoder layer: its kind in a VISOR plan, and where the parameter tree holds it.

    Attributes:
      kind: in a dense plan every layer runs as self-attention, whatever this says.
      path: of its parameters: "head", "tail", or in a super-block "blocks/self" or, where a super-block has several
        layers of its kind, "blocks/self/layer_0".
      index: its place in the arrays at `path`, which are stacked.
      cross: the path of its cross-attention, stacked alike; "" where it has none.
    """

    kind: LayerKind
    path: str
    index: int
    cross: str = ""


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the parameter tree and the arithmetic of a model.

    Attributes:
      plan: "visor" (text-only, cross-attention and optional self-attention layers) or "dense" (self-attention
        everywhere, nothing optional).
      pattern: the kinds of the layers of a super-block, in order; every "self" is an optional slot. Super-blocks are
        repeated as often as they fit; the layers left over at the end are text-only.
      head_layers: text-only layers before the first super-block.
    """

    text: TextArchitecture
    vision: VisionArchitecture
    cross: CrossAttentionArchitecture
    policy: PolicyArchitecture
    anyres: AnyResArchitecture = field(default_factory=AnyResArchitecture)
    plan: str = "visor"
    bidirectional_vision: bool = False
    pattern: tuple[LayerKind | str, ...] = PATTERN
    head_layers: int = 0

    def __post_init__(self):
        object.__setattr__(self, "pattern", tuple(LayerKind(kind) for kind in self.pattern))
        missing = [kind.value for kind in (LayerKind.CROSS, LayerKind.SELF) if kind not in self.pattern]
        if missing:
            raise ValueError(f"pattern={self.pattern}: it has no {' and no '.join(map(repr, missing))} layer")

    @property
    def num_head_layers(self) -> int:
        """`head_layers`, or fewer where a dense model has not as many layers."""
        return min(self.head_layers, self.text.num_layers)

    @property
    def num_blocks(self) -> int:
        """How many whole super-blocks follow the head layers."""
        return (self.text.num_layers - self.num_head_layers) // len(self.pattern)

    @property
    def slots_per_block(self) -> int:
        return self.pattern.count(LayerKind.SELF)

    @property
    def num_slots(self) -> int:
        """The optional self-attention layers of a VISOR plan."""
        return self.num_blocks * self.slots_per_block if self.plan == "visor" else 0

    @property
    def num_tail_layers(self) -> int:
        return self.text.num_layers - self.num_head_layers - self.num_blocks * len(self.pattern)

    @property
    def shared_layers(self) -> range:
        """The layers before the first slot, which every budget runs alike; a dense plan has as many."""
        return range(min(self.num_head_layers + self.pattern.index(LayerKind.SELF), self.text.num_layers))

    @cached_property
    def block(self) -> tuple[LayerPlace, ...]:
        """The layers of the first super-block; those of the others have the same paths."""
        return _block(tuple(LayerKind(kind) for kind in self.pattern))

    @cached_property
    def layers(self) -> tuple[LayerPlace, ...]:
        """Every decoder layer, in order."""
        head = [LayerPlace(LayerKind.TEXT, "head", i) for i in range(self.num_head_layers)]
        blocks = [
            LayerPlace(place.kind, place.path, index, place.cross)
            for index in range(self.num_blocks)
            for place in self.block
        ]
        return (*head, *blocks, *(LayerPlace(LayerKind.TEXT, "tail", i) for i in range(self.num_tail_layers)))


def _block(pattern: tuple[LayerKind, ...]) -> tuple[LayerPlace, ...]:
    """A super-block's layers under their names: the kind alone where it stands once, else numbered."""
    found = []
    for place, kind in enumerate(pattern):
        name = "" if pattern.count(kind) == 1 else f"/layer_{pattern[:place].count(kind)}"
        cross = f"blocks/cross_attention{name}" if kind is LayerKind.CROSS else ""
        found.append(LayerPlace(kind, f"blocks/{kind}{name}", 0, cross))
    return tuple(found)
