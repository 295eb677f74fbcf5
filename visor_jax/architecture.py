"""The shape of a VISOR model, as plain frozen dataclasses.

Ground floor: no JAX import. `visor_jax.config` builds an `Architecture` from a run's configuration, `visor_jax.budget`
counts its FLOPs and cache bytes, `visor_jax.model` declares its parameters, and `visor_jax.export` writes it down.
Being frozen and hashable, an `Architecture` is a static argument of every compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Sizes that no model of this kind exceeds: what is larger is a slip or a damaged file, and nothing is computed from it.
MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_KERNEL = 1 << 16, 1000, 1024, 4096, 255
MAX_VOCABULARY = 1 << 22  # also of intermediate sizes
MAX_TILE, MAX_PINPOINT, MAX_PINPOINTS = 4096, 1 << 16, 1000  # pixels a side, and how many pinpoints


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
    embedding_init: float = 0.02  # standard deviation of a random initialisation's token embeddings
    residual_init: float = 1.0  # gain of o_proj and down_proj in a random initialisation
    norm_init: float = 1.0  # scale of the final norm in a random initialisation: the temperature of a tied head
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
    RGB channel, for values in [0, 1]. `packing` is how many neighbouring features make one visual token: 1, 2 or 4.
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
class Architecture:
    """Everything that decides the parameter tree and the arithmetic of a model."""

    text: TextArchitecture
    vision: VisionArchitecture
    cross: CrossAttentionArchitecture
    policy: PolicyArchitecture
    anyres: AnyResArchitecture = field(default_factory=AnyResArchitecture)
    plan: str = "visor"  # "visor": super-blocks of text-only, cross-attention, optional self-attention; "dense"
    bidirectional_vision: bool = False

    @property
    def num_blocks(self) -> int:
        """Super-blocks of three layers; the optional self-attention slots of a VISOR plan."""
        return self.text.num_layers // 3

    @property
    def num_slots(self) -> int:
        return self.num_blocks if self.plan == "visor" else 0

    @property
    def num_tail_layers(self) -> int:
        return self.text.num_layers % 3
