"""Every field of a configuration: the frozen dataclasses that `visor_jax.config.validate` returns. No JAX import.

These classes are the only declaration of the fields: name, type, default, and as metadata the meaning, rule and units.
`SCHEMA` holds the same fields by dotted name; `default_config` and the parsing of files and overrides use it.
`visor_jax.config.checks` checks rules that span several fields.

Messages write a field as `train.steps`; the command line sets it with `--config.train.steps=100`. A setting for one
stage only is `stage_overrides.<stage>.<field of train>`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from visor_jax import architecture as limits
from visor_jax.config.overrides import TrainOverrides
from visor_jax.config.rules import (
    CHANNELS,
    DEVIATIONS,
    GRIDS,
    HOPS,
    LICENSE,
    MESH_SIZE,
    PACKINGS,
    PARTS,
    PATTERNS,
    RATES,
    SAMPLING,
    SEED,
    WEIGHTS,
    Rule,
    above,
    at_least,
    below_one,
    not_empty,
    one_of,
    ordered_subset,
    within,
)
from visor_jax.config.values import Field, describe_field

ASSETS = Path(__file__).parents[1] / "data" / "assets"
# Names of the built-in tokenizers. The first belongs to the generated data set of the same name.
BUILT_IN = tuple(sorted(file.parent.name for file in ASSETS.glob("*/tokenizer.json")))

STAGES = ("base", "dense", "warmup", "full", "search", "universal", "label", "policy")
OFFLINE_STAGES = ("search", "label")  # evaluate only, without training
TRAINED_STAGES = tuple(stage for stage in STAGES if stage not in OFFLINE_STAGES)

DEFAULT_MAX_PIXELS = 89_478_485  # per picture; above this size Pillow warns
PILLOW_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS  # above this size Pillow refuses to open a picture

ValueT = TypeVar("ValueT")


def setting(default: ValueT, meaning: str, rule: Rule | None = None, *, units: str = "") -> ValueT:
    """Returns a dataclass field with its default, and the rest as metadata."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "rule": rule, "units": units})


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
    norm_init: float = setting(1.0, "scale of the final norm, when random", above(0))
    recency_init: float = setting(
        0.0, "logit by which randomly initialized text-only attention prefers the nearest tokens", at_least(0)
    )
    max_positions: int = setting(
        0,
        "limit on text tokens and visual positions of a prompt with its answer; 0: derived from the training rows and"
        " the largest picture (config.default_max_positions)",
        within(0, limits.MAX_VOCABULARY),
    )


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower."""

    tile_size: int = setting(72, "side of a square tile", within(1, limits.MAX_TILE), units="pixels")
    patch_size: int = setting(8, "side of a square patch", within(1, limits.MAX_TILE), units="pixels")
    hidden_size: int = setting(96, "width of the residual stream", within(1, limits.MAX_WIDTH))
    intermediate_size: int = setting(192, "width inside an MLP", within(1, limits.MAX_VOCABULARY))
    num_layers: int = setting(1, "encoder layers that run", within(1, limits.MAX_LAYERS))
    num_heads: int = setting(4, "query heads", within(1, limits.MAX_HEADS))
    layer_norm_eps: float = setting(1e-6, "added to the variance before its root", above(0))
    patch_local: bool = setting(False, "no attention in the tower: patches do not see each other")


@dataclass(frozen=True)
class AnyResConfig:
    """How a picture is cut into tiles and its pixels normalized."""

    pinpoints: str = setting("", "grids of tiles a picture may be cut into; empty: one stretched tile", GRIDS)
    max_tiles: int = setting(9, "cap on a picture's visual tokens, in units of one tile's tokens", at_least(1))
    packing: int = setting(1, "neighboring features in one visual token: 1, 2 (1 x 2) or 4 (2 x 2)", PACKINGS)
    image_mean: tuple[float, float, float] = setting((0.5, 0.5, 0.5), "per RGB channel, of values in [0, 1]", CHANNELS)
    image_std: tuple[float, float, float] = setting((0.5, 0.5, 0.5), "per RGB channel, of values in [0, 1]", DEVIATIONS)


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Cross-attention to the visual tokens."""

    num_kv_heads: int = setting(
        0, "key and value heads of cross-attention; 0: model.text.num_kv_heads", within(0, limits.MAX_HEADS)
    )
    init: str = setting("copy", "cross-attention's initialization (initializers.py)", one_of("copy", "zero", "match"))
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
    cross: CrossAttentionConfig = dataclasses.field(default_factory=CrossAttentionConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)


@dataclass(frozen=True)
class DataConfig:
    """The source of questions, and the shape of one row of a batch."""

    source: str = setting(BUILT_IN[0], "a name from the table in visor_jax/data/sources", not_empty())
    root: str = setting("", "folder that holds the files and the pictures that records name")
    path: str = setting(
        "", "file below data.root, or a pattern (*, ?, [], {a,b}) of its shards; {split} stands for a split"
    )
    sampling: str = setting(
        "all", "records that are used, as in LLaVA's mixtures: all, first:N, end:N, random:10%", SAMPLING
    )
    mixture: str = setting("", "YAML file of several sources, instead of data.source and data.path")
    parts: tuple[tuple[str, str, str, float], ...] = setting(
        (), "several sources: (source or '', path, sampling, weight or 0) of each, as in data.mixture", PARTS
    )
    test_fraction: float = setting(
        0.1, "stored data: fraction of the records in each of validation and test", within(0, 0.45)
    )
    scenes: tuple[tuple[str, int], ...] = setting(
        (), "generated data: (scene, integer weight) pairs; empty: all scenes equally", WEIGHTS
    )
    turns_per_picture: int = setting(4, "questions per conversation", at_least(1))
    batch_size: int = setting(32, "rows per optimizer step over all devices", at_least(1), units="rows")
    tiles: int = setting(1, "tiles per row of a batch; with packing, per sample", at_least(1), units="tiles")
    visual_length: int = setting(128, "visual tokens per row of a batch", at_least(1), units="visual tokens")
    text_length: int = setting(128, "text tokens per row of a batch", at_least(1), units="text tokens")
    pack_window: int = setting(
        0, "samples per pool among which those that share a row are chosen; 0: one sample per row", at_least(0)
    )
    pool_rows: int = setting(1, "packing: rows that share a pool of tiles", at_least(1), units="rows")
    pool_tiles: int = setting(0, "packing: tiles per pool; at least data.tiles", at_least(0), units="tiles")
    workers: int = setting(
        0, "processes that prepare samples, for the batch or for each pool; 0: a thread", at_least(0), units="processes"
    )
    follow_links: bool = setting(False, "source llava: follow links below data.root that lead out of it")
    max_image_pixels: int = setting(
        DEFAULT_MAX_PIXELS,
        "largest picture in pixels; larger ones are skipped, not decoded",
        within(1, PILLOW_MAX_PIXELS),
    )
    reduced_jpeg: bool = setting(
        False, "decode JPEGs far larger than their tiles at a fraction of their size: faster, tiles differ slightly"
    )
    features: str = setting(
        "", "source tfds: 'image=image, question=question, answer=answer': features that hold a sample"
    )
    max_frames: int = setting(
        32, "used of one video, evenly spaced, as in LLaVA-OneVision", within(1, 10_000), units="frames"
    )
    max_skipped_fraction: float = setting(
        0.05, "training stops when a larger fraction of the samples is skipped", within(0, 1)
    )


@dataclass(frozen=True)
class TrainConfig:
    """Training settings of a stage; `stage_overrides` changes them per stage."""

    steps: int = setting(1000, "number of optimizer steps", at_least(1), units="steps")
    objective: str = setting("answer", "training objective", one_of("answer", "base", "policy"))
    batch_size: int = setting(
        0, "rows per optimizer step over all devices; 0 inherits data.batch_size", at_least(0), units="rows"
    )
    learning_rate: float = setting(0.001, "peak of the schedule", above(0))
    schedule: str = setting("cosine", "decay from the peak to the end", one_of("cosine", "linear", "constant"))
    warmup_fraction: float = setting(0.03, "fraction of the steps that warm up from 0 to the peak", within(0, 1))
    end_fraction: float = setting(0.0, "learning rate of the last step, as a fraction of the peak", within(0, 1))
    b1: float = setting(0.9, "Adam's decay of the mean", below_one())
    b2: float = setting(0.999, "Adam's decay of the variance", below_one())
    weight_decay: float = setting(0.0, "decoupled weight decay, as in AdamW", at_least(0))
    clip_norm: float = setting(1.0, "gradients are clipped to this global norm", above(0))
    trainable: tuple[str, ...] = setting(
        (".*",), "patterns matched at the start of parameter paths; other parameters are frozen", PATTERNS
    )
    group_rates: tuple[tuple[str, float], ...] = setting(
        (), "(pattern, learning rate multiplier) pairs; the first match applies", RATES
    )
    budgets: str = setting(
        "full", "the budgets of a step: full, or drawn from this set", one_of("full", "viable", "subsets")
    )
    init_from: str = setting("", "a stage, or a path to another run's stage folder; empty: random weights")
    hops: tuple[int, ...] = setting((1, 2, 3), "objective base: chain length with 1, 2, ... slots on", HOPS)
    label_balance: float = setting(
        0.0, "objective policy: 0 keeps label weights, 1 balances rare and common budgets", within(0, 4)
    )
    label_caution: float = setting(
        1.0, "objective policy: weight of labels above the cheapest budget relative to the cheapest", above(0)
    )
    remat: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    checkpoint_every: int = setting(500, "interval between checkpoints", at_least(1), units="steps")
    keep: int = setting(2, "checkpoints per stage kept on disk", at_least(1))
    max_bad_steps: int = setting(10, "consecutive steps with NaN or Inf before the run stops", at_least(1))
    hang_seconds: float = setting(
        1800.0, "time without a step before the watchdog aborts the process; 0: never", at_least(0), units="seconds"
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer and the system turn."""

    path: str = setting(BUILT_IN[0], "a built-in tokenizer's name, or the path of a tokenizer.json", not_empty())
    system: str = setting("", "text of the system turn; empty: none")


@dataclass(frozen=True)
class LossConfig:
    """Which tokens carry loss."""

    targets: str = setting(
        "answer", "the answer and its end token, or the tokens LLaVA's code trains on", one_of("answer", "llava")
    )


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh."""

    replica: int = setting(1, "copies of the parameters", MESH_SIZE)
    fsdp: int = setting(-1, "devices that share the parameters", MESH_SIZE)
    tensor: int = setting(1, "devices that share each matrix product", MESH_SIZE)


@dataclass(frozen=True)
class SearchConfig:
    """The pass that finds the viable budgets."""

    samples: int = setting(1024, "questions of the validation split", at_least(1))
    max_subsets: int = setting(512, "evaluate all subsets up to this many, else best-first by count", at_least(2))


@dataclass(frozen=True)
class LabelConfig:
    """The pass that finds the cheapest correct budget of each question."""

    samples: int = setting(4096, "questions of the training split", at_least(1))
    tolerance: float = setting(0.01, "fraction of the full budget's score that a cheaper budget may lose", below_one())
    only_right: bool = setting(False, "skip questions that the full budget does not answer exactly")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on the test split."""

    samples: int = setting(1024, "questions of the test split", at_least(1))
    batch_size: int = setting(64, "rows per batch", at_least(1), units="rows")
    cache_gigabytes: float = setting(
        0.0,
        "disk space below WORKDIR/features for visual tokens and budget-independent layers; 0: none",
        at_least(0),
        units="GB",
    )
    dials: tuple[float, ...] = setting(
        (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0), "cost/accuracy dial values to evaluate", not_empty()
    )


@dataclass(frozen=True)
class ExportConfig:
    """Fields of an export's model card."""

    license: str = setting(
        "",
        "license of the weights, as the Hugging Face hub spells it; empty: the base model's, or apache-2.0 without one",
        LICENSE,
    )
    base_model: str = setting("", "hub id of the base model; empty: the imported model")
    languages: tuple[str, ...] = setting(("en",), "two-letter codes of the training languages", not_empty())


_ALL_BUT_ROUTING = ("(?!routing/)",)


@dataclass(frozen=True)
class StageOverrides:
    """The overrides of `train` per trained stage."""

    base: TrainOverrides = dataclasses.field(
        default=TrainOverrides.of(
            objective="base",
            budgets="subsets",
            trainable=("vision/", "connector/", "image_newline", "embed_tokens/", "blocks/(text|cross|self)/"),
        )
    )
    dense: TrainOverrides = dataclasses.field(default=TrainOverrides.of(init_from="base", trainable=_ALL_BUT_ROUTING))
    warmup: TrainOverrides = dataclasses.field(
        default=TrainOverrides.of(init_from="base", trainable=("blocks/cross_attention/",))
    )
    full: TrainOverrides = dataclasses.field(default=TrainOverrides.of(init_from="warmup", trainable=_ALL_BUT_ROUTING))
    universal: TrainOverrides = dataclasses.field(
        default=TrainOverrides.of(init_from="full", trainable=_ALL_BUT_ROUTING, budgets="viable")
    )
    policy: TrainOverrides = dataclasses.field(
        default=TrainOverrides.of(init_from="universal", trainable=("routing/",), objective="policy")
    )

    def of(self, stage: str) -> TrainOverrides:
        """Returns the overrides of a trained stage."""
        return getattr(self, stage)


@dataclass(frozen=True)
class Config:
    """A checked configuration, as `validate` returns it."""

    name: str = setting("visor", "name of the run, for people")
    seed: int = setting(0, "seed of weights, data order and drawn budgets", SEED)
    stage: str = setting("", "the stage that `train` runs", one_of("", *STAGES))
    stages: tuple[str, ...] = setting(
        ("base", "warmup", "full", "search", "universal", "label", "policy"),
        "the stages that `run` runs",
        ordered_subset(STAGES),
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
    label: LabelConfig = dataclasses.field(default_factory=LabelConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    stage_overrides: StageOverrides = dataclasses.field(default_factory=StageOverrides)

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as nested dicts, sorted by name; tuples stay tuples."""
        return _tree(self)


def _tree(node: Any) -> dict[str, Any]:
    names = [*node] if isinstance(node, TrainOverrides) else [field.name for field in dataclasses.fields(node)]
    values = {name: getattr(node, name) for name in sorted(names)}
    return {name: _tree(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def _describe_fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Yields (dotted name, field) of every field below a dataclass, in declaration order."""
    annotations = get_type_hints(kind)
    for declared in dataclasses.fields(kind):
        annotation: Any = annotations[declared.name]
        if annotation is StageOverrides:
            continue
        if dataclasses.is_dataclass(annotation):
            yield from _describe_fields(annotations[declared.name], f"{prefix}{declared.name}.")
        else:
            yield f"{prefix}{declared.name}", describe_field(declared, annotation)


SCHEMA: dict[str, Field] = dict(_describe_fields(Config))


def field_of(name: str) -> Field | None:
    """Returns the field called `name`, including a stage's override of a field of `train`; None if unknown."""
    parts = name.split(".")
    if parts[0] == "stage_overrides" and len(parts) == 3 and parts[1] in TRAINED_STAGES:
        return SCHEMA.get(f"train.{parts[2]}")
    return SCHEMA.get(name)


def all_names() -> list[str]:
    """Returns every name that `field_of` knows."""
    of_train = [name.removeprefix("train.") for name in SCHEMA if name.startswith("train.")]
    return [*SCHEMA, *(f"stage_overrides.{stage}.{name}" for stage in TRAINED_STAGES for name in of_train)]


def build_config(values: Mapping[str, Any]) -> Config:
    """Builds the `Config` from {dotted name: value} with every name of `SCHEMA` and any stage overrides."""
    return _build_section(Config, "", values)


def _build_section(kind: type[ValueT], prefix: str, values: Mapping[str, Any]) -> ValueT:
    parts: dict[str, Any] = {}
    annotations: dict[str, Any] = get_type_hints(kind)
    for name, annotation in annotations.items():
        full = f"{prefix}{name}"
        if annotation is TrainOverrides:
            overrides = {key.removeprefix(f"{full}."): values[key] for key in values if key.startswith(f"{full}.")}
            parts[name] = TrainOverrides.of(**overrides)
        else:
            nested = dataclasses.is_dataclass(annotation)
            parts[name] = _build_section(annotations[name], f"{full}.", values) if nested else values[full]
    return kind(**parts)
