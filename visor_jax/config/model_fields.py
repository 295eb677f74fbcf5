"""The fields of a configuration's section `model`. No JAX import."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from visor_jax import architecture as limits
from visor_jax.config.rules import CHANNELS, DEVIATIONS, GRIDS, PACKINGS, SHARE, SHARES, above, at_least, one_of, within
from visor_jax.config.values import setting


@dataclass(frozen=True)
class TextConfig:
    """The text decoder."""

    vocab_size: int = setting(
        0, "rows of the embedding; 0: as many as the tokenizer needs", within(0, limits.MAX_VOCABULARY)
    )
    hidden_size: int = setting(64, "width of the residual stream", within(1, limits.MAX_WIDTH))
    intermediate_size: int = setting(192, "width inside an MLP", within(1, limits.MAX_VOCABULARY))
    num_layers: int = setting(
        9, "in super-blocks of model.pattern; remaining layers at the end are text-only", within(1, limits.MAX_LAYERS)
    )
    num_heads: int = setting(4, "query heads", within(1, limits.MAX_HEADS))
    num_kv_heads: int = setting(4, "key and value heads", within(1, limits.MAX_HEADS))
    head_dim: int = setting(16, "width of one head", within(2, limits.MAX_HEAD_DIM))
    rope_theta: float = setting(1e6, "base of the rotary frequencies", above(0))
    rms_norm_eps: float = setting(1e-6, "added to the mean square before its root", above(0))
    tie_word_embeddings: bool = setting(False, "the output projection is the embedding table")
    embedding_init: float = setting(0.02, "standard deviation of random token embeddings", above(0))
    residual_init: float = setting(1.0, "gain of the projections that end a residual branch, when random", above(0))
    max_positions: int = setting(
        0,
        "limit on text tokens and visual positions of a prompt with its answer; 0: derived from the training rows and"
        " the largest picture (config.default_max_positions)",
        within(0, limits.MAX_VOCABULARY),
    )


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower."""

    tile_size: int = setting(96, "side of a square tile", within(1, limits.MAX_TILE), units="pixels")
    patch_size: int = setting(12, "side of a square patch", within(1, limits.MAX_TILE), units="pixels")
    hidden_size: int = setting(96, "width of the residual stream", within(1, limits.MAX_WIDTH))
    intermediate_size: int = setting(192, "width inside an MLP", within(1, limits.MAX_VOCABULARY))
    num_layers: int = setting(1, "encoder layers that run", within(1, limits.MAX_LAYERS))
    num_heads: int = setting(4, "query heads", within(1, limits.MAX_HEADS))
    layer_norm_eps: float = setting(1e-6, "added to the variance before its root", above(0))
    position_init: str = setting(
        "random",
        "start of the position embeddings: normal numbers, or sines of row and column",
        one_of("random", "sines"),
    )
    residual_init: float = setting(1.0, "gain of the projections that end a residual branch, when random", above(0))


@dataclass(frozen=True)
class AnyResConfig:
    """How a picture is cut into tiles and its pixels normalized."""

    pinpoints: str = setting("", "grids of tiles a picture may be cut into; empty: one stretched tile", GRIDS)
    max_tiles: int = setting(9, "cap on a picture's visual tokens, in units of one tile's tokens", at_least(1))
    packing: int = setting(1, "neighboring features in one visual token: 1, 2 (1 x 2) or 4 (2 x 2)", PACKINGS)
    packing_kind: str = setting(
        "mean",
        "how neighbors become one token: averaged, interpolated (bilinear), or side by side into a wider connector"
        " (shuffle)",
        one_of(*limits.PACKING_KINDS),
    )
    image_mean: tuple[float, float, float] = setting((0.5, 0.5, 0.5), "per RGB channel, of values in [0, 1]", CHANNELS)
    image_std: tuple[float, float, float] = setting((0.5, 0.5, 0.5), "per RGB channel, of values in [0, 1]", DEVIATIONS)
    standardize: bool = setting(
        False, "pixels minus the mean of their picture, over its deviation, instead of image_mean and image_std"
    )


@dataclass(frozen=True)
class ReductionConfig:
    """How the visual tokens are reduced before the decoder reads them (docs/reduction.md)."""

    method: str = setting(
        "none",
        "averaged windows (m3), or tokens chosen by diversity (divprune), by the tower's attention (hired) or by both"
        " (vispruner), or chosen and merged (visionzip); see also model.anyres.packing",
        one_of(*limits.REDUCTIONS),
    )
    ratio: float = setting(
        1.0, "share of the visual tokens that is kept, rounded up in each tile or picture; 0.25: a fourth", SHARE
    )
    scales: tuple[float, ...] = setting(
        (),
        "m3: shares whose mean loss training minimizes, model.reduction.ratio among them; empty: at that ratio alone",
        SHARES,
    )
    important_share: float = setting(
        0.5, "vispruner: share of the kept tokens that is chosen by attention", within(0, 1)
    )
    contextual_share: float = setting(
        0.15625, "visionzip: share of the kept tokens that is merged from the others, as 10 of 64", within(0, 1)
    )
    base_share: float = setting(
        0.5, "hired: share of the kept tokens that belongs to the whole picture's tile (alpha)", within(0, 1)
    )
    marks: str = setting(
        "paper",
        "hired: a patch of the whole picture's tile counts for the crop that shows it, or, as in the authors' code, for"
        " the crop of its run of consecutive patches",
        one_of("paper", "code"),
    )


@dataclass(frozen=True)
class DroppingConfig:
    """Which visual tokens the later layers of a dense plan read (docs/reduction.md)."""

    method: str = setting(
        "none",
        "dense plan: later layers read the visual tokens that text attends to most (fastv), fewer after every stage"
        " (pyramiddrop), with clusters of the others (sparsevlm)",
        one_of(*limits.DROPPINGS),
    )
    layers: tuple[int, ...] = setting((), "layers that run before each drop, ascending")
    ratios: tuple[float, ...] = setting(
        (), "share of the visual tokens that remains after each drop, rounded down, descending", SHARES
    )
    score: str = setting(
        "code",
        "fastv: attention of the prompt's last token, as in the authors' code, or the average over all tokens",
        one_of("paper", "code"),
    )


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Cross-attention to the visual tokens."""

    num_kv_heads: int = setting(
        0, "key and value heads of cross-attention; 0: model.text.num_kv_heads", within(0, limits.MAX_HEADS)
    )
    init: str = setting("copy", "cross-attention's initialization (initializers.py)", one_of("copy", "zero"))
    gate_init: float = setting(1.0, "initial gate before tanh, with init='copy'")
    kernel_size: int = setting(7, "width of the conditional position's convolution", within(1, limits.MAX_KERNEL))


@dataclass(frozen=True)
class PolicyConfig:
    """The routing MLP, which chooses a budget."""

    hidden_size: int = setting(128, "hidden width of the routing MLP", within(1, limits.MAX_WIDTH))
    max_budgets: int = setting(
        32, "outputs of the routing MLP: the largest number of viable budgets", within(1, limits.MAX_WIDTH)
    )


@dataclass(frozen=True)
class ModelConfig:
    """The model's shape; `visor_jax.config.architecture` builds an `Architecture` from it."""

    plan: str = setting(
        "visor", "super-blocks with optional self-attention, or every layer dense", one_of("visor", "dense")
    )
    pattern: tuple[str, ...] = setting(
        tuple(kind.value for kind in limits.PATTERN),
        "layer kinds of a super-block, in order: 'text', 'cross', 'self'; every 'self' is an optional slot",
    )
    head_layers: int = setting(0, "text-only layers before the first super-block", within(0, limits.MAX_LAYERS))
    dtype: str = setting("float32", "dtype of activations", one_of("float32", "bfloat16"))
    bidirectional_vision: bool = setting(False, "visual tokens also attend to later visual tokens")
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    anyres: AnyResConfig = dataclasses.field(default_factory=AnyResConfig)
    reduction: ReductionConfig = dataclasses.field(default_factory=ReductionConfig)
    dropping: DroppingConfig = dataclasses.field(default_factory=DroppingConfig)
    cross: CrossAttentionConfig = dataclasses.field(default_factory=CrossAttentionConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
