"""Every field of a configuration: the frozen dataclasses that `visor_jax.config.validate` returns.

Ground floor: no JAX import. The fields of these classes are the only statement of what exists: name, type, default, and
as metadata the meaning, the rule and the units. `SCHEMA` is the same by dotted name, `default_config` and the reading
of files and overrides are made from it; `visor_jax.config.checks` checks what spans several fields.

In the messages a field reads `train.steps`; on the command line it is `--config.train.steps=100`. What holds for one
stage only stands in `stage_overrides.<stage>.<field of train>`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from visor_jax import architecture as most
from visor_jax.config.overrides import TrainOverrides
from visor_jax.config.rules import (
    CHANNELS,
    DEVIATIONS,
    GRIDS,
    HOPS,
    LICENSE,
    MESH_SIZE,
    PACKINGS,
    PATTERNS,
    RATES,
    SEED,
    WEIGHTS,
    Rule,
    above,
    at_least,
    below_one,
    not_empty,
    one_of,
    some_of,
    within,
)
from visor_jax.config.values import Field, described

ASSETS = Path(__file__).parents[1] / "data" / "assets"
# Names of the tokenizers that come with the package. The first is that of the generated data set of the same name.
BUILT_IN = tuple(sorted(file.parent.name for file in ASSETS.glob("*/tokenizer.json")))

ASSETS = Path(__file__).parents[1] / "data" / "assets"
# Names of the tokenizers that come with the package. The first is that of the generated data set of the same name.
BUILT_IN = tuple(sorted(file.parent.name for file in ASSETS.glob("*/tokenizer.json")))

STAGES = ("base", "dense", "warmup", "full", "search", "universal", "label", "policy")
OFFLINE_STAGES = ("search", "label")  # passes that evaluate; they train nothing
TRAINED_STAGES = tuple(stage for stage in STAGES if stage not in OFFLINE_STAGES)

DEFAULT_MAX_PIXELS = 89_478_485  # of a picture, unless a configuration says otherwise; Pillow's own bound for a warning
PILLOW_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS  # Pillow opens none that is larger

ValueT = TypeVar("ValueT")


def setting(default: ValueT, meaning: str, rule: Rule | None = None, *, units: str = "") -> ValueT:
    """A dataclass's field with its default and, as metadata, what else there is to say of it."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "rule": rule, "units": units})


@dataclass(frozen=True)
class TextConfig:
    """The text decoder."""

    vocab_size: int = setting(
        0, "rows of the embedding; 0: as many as the tokenizer needs", within(0, most.MAX_VOCABULARY)
    )
    hidden_size: int = setting(64, "width of the residual stream", within(1, most.MAX_WIDTH))
    intermediate_size: int = setting(192, "width inside an MLP", within(1, most.MAX_VOCABULARY))
    num_layers: int = setting(
        9, "in super-blocks of model.pattern; those left over at the end are text-only", within(1, most.MAX_LAYERS)
    )
    num_heads: int = setting(4, "query heads", within(1, most.MAX_HEADS))
    num_kv_heads: int = setting(4, "key and value heads", within(1, most.MAX_HEADS))
    head_dim: int = setting(16, "width of one head", within(2, most.MAX_HEAD_DIM))
    rope_theta: float = setting(1e6, "base of the rotary frequencies", above(0))
    rms_norm_eps: float = setting(1e-6, "added to the mean square before its root", above(0))
    tie_word_embeddings: bool = setting(False, "the output projection is the embedding table")
    embedding_init: float = setting(0.02, "standard deviation of random token embeddings", above(0))
    residual_init: float = setting(1.0, "gain of the projections that end a residual branch, when random", above(0))
    norm_init: float = setting(1.0, "scale of the final norm, when random", above(0))
    recency_init: float = setting(
        0.0, "logit by which random text-only attention begins preferring the nearest", at_least(0)
    )
    max_positions: int = setting(
        0,
        "text tokens and visual positions of the longest prompt with its answer; 0: by the rows of training and the"
        " largest picture (config.default_max_positions)",
        within(0, most.MAX_VOCABULARY),
    )


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower."""

    tile_size: int = setting(72, "side of a square tile", within(1, most.MAX_TILE), units="pixels")
    patch_size: int = setting(8, "side of a square patch", within(1, most.MAX_TILE), units="pixels")
    hidden_size: int = setting(96, "width of the residual stream", within(1, most.MAX_WIDTH))
    intermediate_size: int = setting(192, "width inside an MLP", within(1, most.MAX_VOCABULARY))
    num_layers: int = setting(1, "encoder layers that are run", within(1, most.MAX_LAYERS))
    num_heads: int = setting(4, "query heads", within(1, most.MAX_HEADS))
    layer_norm_eps: float = setting(1e-6, "added to the variance before its root", above(0))
    patch_local: bool = setting(False, "no attention in the tower: no patch sees another")


@dataclass(frozen=True)
class AnyResConfig:
    """How a picture is cut into tiles and its pixels normalized."""

    pinpoints: str = setting("", "grids of tiles a picture may be cut into; empty: one stretched tile", GRIDS)
    max_tiles: int = setting(9, "cap on a picture's visual tokens, in tiles' worth", at_least(1))
    packing: int = setting(1, "neighboring features in one visual token: 1, 2 (1 x 2) or 4 (2 x 2)", PACKINGS)
    image_mean: tuple[float, float, float] = setting((0.5, 0.5, 0.5), "of values in [0, 1]", CHANNELS)
    image_std: tuple[float, float, float] = setting((0.5, 0.5, 0.5), "of values in [0, 1]", DEVIATIONS)


@dataclass(frozen=True)
class CrossAttentionConfig:
    """Cross-attention to the visual tokens."""

    num_kv_heads: int = setting(0, "of cross-attention; 0: as the decoder's own layers", within(0, most.MAX_HEADS))
    init: str = setting("copy", "how cross-attention starts (model/cross_init.py)", one_of("copy", "zero", "match"))
    gate_init: float = setting(1.0, "before tanh, with init='copy'")
    kernel_size: int = setting(7, "of the conditional position's convolution", within(1, most.MAX_KERNEL))


@dataclass(frozen=True)
class PolicyConfig:
    """The routing MLP, which chooses a budget."""

    hidden_size: int = setting(128, "of the routing MLP", within(1, most.MAX_WIDTH))
    max_budgets: int = setting(
        32, "outputs of the routing MLP: most budgets that can be viable", within(1, most.MAX_WIDTH)
    )


@dataclass(frozen=True)
class ModelConfig:
    """The model's shape: `visor_jax.config.architecture` makes an `Architecture` of it."""

    plan: str = setting(
        "visor", "super-blocks with optional self-attention, or every layer dense", one_of("visor", "dense")
    )
    pattern: tuple[str, ...] = setting(
        tuple(kind.value for kind in most.PATTERN),
        "kinds of the layers of a super-block, in order: 'text', 'cross', 'self'; every 'self' is an optional slot",
    )
    head_layers: int = setting(0, "text-only layers before the first super-block", within(0, most.MAX_LAYERS))
    dtype: str = setting("float32", "of activations", one_of("float32", "bfloat16"))
    bidirectional_vision: bool = setting(False, "visual tokens see each other both ways")
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    anyres: AnyResConfig = dataclasses.field(default_factory=AnyResConfig)
    cross: CrossAttentionConfig = dataclasses.field(default_factory=CrossAttentionConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)


@dataclass(frozen=True)
class DataConfig:
    """Where questions come from, and the window that a row of the batch has."""

    source: str = setting(BUILT_IN[0], "a name from the table in visor_jax/data/sources", not_empty())
    root: str = setting("", "source llava: folder under which pictures and the JSON file lie")
    path: str = setting("", "source llava: the JSON or JSON-lines file below data.root; {split} stands for a split")
    test_fraction: float = setting(
        0.1, "source llava: of the records, for each of validation and test", within(0, 0.45)
    )
    scenes: tuple[tuple[str, int], ...] = setting(
        (), "generated data: (scene, whole weight) pairs; empty: all alike", WEIGHTS
    )
    turns_per_picture: int = setting(4, "questions in one conversation", at_least(1))
    batch_size: int = setting(32, "of one step, over all devices", at_least(1), units="conversations")
    tiles: int = setting(1, "window: a row of the batch holds so many", at_least(1), units="tiles")
    visual_length: int = setting(128, "window: a row of the batch holds so many", at_least(1), units="visual tokens")
    text_length: int = setting(128, "window: a row of the batch holds so many", at_least(1), units="text tokens")
    follow_links: bool = setting(False, "source llava: links below data.root may lead out of it")
    max_image_pixels: int = setting(
        DEFAULT_MAX_PIXELS,
        "largest picture in pixels; larger ones are skipped, not decoded",
        within(1, PILLOW_MAX_PIXELS),
    )
    max_skipped_fraction: float = setting(0.05, "of the samples tried; past it training stops", within(0, 1))


@dataclass(frozen=True)
class TrainConfig:
    """Training of one stage; `stage_overrides` says in what a stage differs."""

    steps: int = setting(1000, "of the optimizer", at_least(1), units="steps")
    objective: str = setting("answer", "training objective", one_of("answer", "base", "policy"))
    batch_size: int = setting(0, "of one step; 0: data.batch_size", at_least(0), units="rows")
    learning_rate: float = setting(0.001, "peak of the schedule", above(0))
    schedule: str = setting("cosine", "from the peak to the end", one_of("cosine", "linear", "constant"))
    warmup_fraction: float = setting(0.03, "of the steps, from 0 up to the peak", within(0, 1))
    end_fraction: float = setting(0.0, "of the peak, at the last step", within(0, 1))
    b1: float = setting(0.9, "Adam's decay of the mean", below_one())
    b2: float = setting(0.999, "Adam's decay of the variance", below_one())
    weight_decay: float = setting(0.0, "decoupled from the gradient, as AdamW has it", at_least(0))
    clip_norm: float = setting(1.0, "gradients are scaled down to this global norm", above(0))
    trainable: tuple[str, ...] = setting(
        (".*",), "patterns from the start of parameter paths; the rest is frozen", PATTERNS
    )
    group_rates: tuple[tuple[str, float], ...] = setting(
        (), "(pattern, multiplier of the learning rate), first match counts", RATES
    )
    budgets: str = setting("full", "of each step: full, or drawn from these", one_of("full", "viable", "subsets"))
    init_from: str = setting("", "a stage, or a path to another run's stage folder; empty: random weights")
    hops: tuple[int, ...] = setting(
        (1, 2, 3), "objective base: length of chains to follow with 1, 2, ... slots on", HOPS
    )
    label_balance: float = setting(
        0.0, "objective policy: 0 labels as they are, 1 rare budgets like common ones, above that more", within(0, 4)
    )
    label_caution: float = setting(
        1.0, "objective policy: how much more labels above the cheapest budget weigh than its own", above(0)
    )
    remat: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    checkpoint_every: int = setting(500, "from one checkpoint to the next", at_least(1), units="steps")
    keep: int = setting(2, "checkpoints of a stage that stay on disk", at_least(1))
    max_bad_steps: int = setting(10, "steps in a row with NaN or Inf before the run stops", at_least(1))
    hang_seconds: float = setting(
        1800.0, "without a step until the watchdog aborts the process; 0: never", at_least(0), units="seconds"
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer and the system turn."""

    path: str = setting(BUILT_IN[0], "a built-in tokenizer's name, or the path of a tokenizer.json", not_empty())
    system: str = setting("", "text of the system turn; empty: none")


@dataclass(frozen=True)
class LossConfig:
    """Which tokens are learned."""

    targets: str = setting(
        "answer", "the answer and its end, or what LLaVA's code trains on", one_of("answer", "llava")
    )


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged."""

    replica: int = setting(1, "copies of the parameters", MESH_SIZE)
    fsdp: int = setting(-1, "devices that share the parameters", MESH_SIZE)
    tensor: int = setting(1, "devices that share each matrix product", MESH_SIZE)


@dataclass(frozen=True)
class SearchConfig:
    """The pass that finds the viable budgets."""

    samples: int = setting(1024, "of the validation split", at_least(1))
    max_subsets: int = setting(512, "evaluate all subsets up to this many, else best-first by count", at_least(2))


@dataclass(frozen=True)
class LabelConfig:
    """The pass that finds the cheapest right budget of each question."""

    samples: int = setting(4096, "of the training split", at_least(1))
    tolerance: float = setting(0.01, "share of the full budget's score that a cheaper one may lose", below_one())
    only_right: bool = setting(False, "leave out questions that the full budget does not answer exactly")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on the test split."""

    samples: int = setting(1024, "of the test split", at_least(1))
    batch_size: int = setting(64, "of one batch", at_least(1), units="rows")
    dials: tuple[float, ...] = setting(
        (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0), "positions of the cost/accuracy dial to evaluate", not_empty()
    )


@dataclass(frozen=True)
class ExportConfig:
    """What the model card of an export says."""

    license: str = setting(
        "",
        "of the weights, as the Hugging Face hub spells it; empty: the base model's, or apache-2.0 without one",
        LICENSE,
    )
    base_model: str = setting("", "id on the hub of the model that the weights come from; empty: as imported")
    languages: tuple[str, ...] = setting(
        ("en",), "two-letter codes of the languages that the model was trained on", not_empty()
    )


_ALL_BUT_ROUTING = ("(?!routing/)",)


@dataclass(frozen=True)
class StageOverrides:
    """What each trained stage has otherwise than `train`: one field a stage."""

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
        """The overrides of a trained stage."""
        return getattr(self, stage)


@dataclass(frozen=True)
class Config:
    """A checked configuration, as `validate` returns it."""

    name: str = setting("visor", "of the run, for people")
    seed: int = setting(0, "of weights, data order and drawn budgets", SEED)
    stage: str = setting("", "the stage that `train` runs", one_of("", *STAGES))
    stages: tuple[str, ...] = setting(
        ("base", "warmup", "full", "search", "universal", "label", "policy"),
        "the stages that `run` runs",
        some_of(STAGES),
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
        """The configuration as nested dicts, sorted by name; tuples stay tuples."""
        return _tree(self)


def _tree(node: Any) -> dict[str, Any]:
    names = [*node] if isinstance(node, TrainOverrides) else [field.name for field in dataclasses.fields(node)]
    values = {name: getattr(node, name) for name in sorted(names)}
    return {name: _tree(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def _described(kind: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """(dotted name, field) of every field below a dataclass, in the order of their statement."""
    annotations = get_type_hints(kind)
    for stated in dataclasses.fields(kind):
        annotation: Any = annotations[stated.name]
        if annotation is StageOverrides:
            continue
        if dataclasses.is_dataclass(annotation):
            yield from _described(annotations[stated.name], f"{prefix}{stated.name}.")
        else:
            yield f"{prefix}{stated.name}", described(stated, annotation)


SCHEMA: dict[str, Field] = dict(_described(Config))


def field_of(name: str) -> Field | None:
    """The field called `name`, also where it is a stage's override of a field of `train`; None if there is none."""
    parts = name.split(".")
    if parts[0] == "stage_overrides" and len(parts) == 3 and parts[1] in TRAINED_STAGES:
        return SCHEMA.get(f"train.{parts[2]}")
    return SCHEMA.get(name)


def all_names() -> list[str]:
    """Every name that `field_of` knows."""
    of_train = [name.removeprefix("train.") for name in SCHEMA if name.startswith("train.")]
    return [*SCHEMA, *(f"stage_overrides.{stage}.{name}" for stage in TRAINED_STAGES for name in of_train)]


def built(values: Mapping[str, Any]) -> Config:
    """The `Config` of {dotted name: value}: every name of `SCHEMA`, and the stages' overrides."""
    return _built(Config, "", values)


def _built(kind: type[ValueT], prefix: str, values: Mapping[str, Any]) -> ValueT:
    parts: dict[str, Any] = {}
    annotations: dict[str, Any] = get_type_hints(kind)
    for name, annotation in annotations.items():
        full = f"{prefix}{name}"
        if annotation is TrainOverrides:
            own = {key.removeprefix(f"{full}."): values[key] for key in values if key.startswith(f"{full}.")}
            parts[name] = TrainOverrides.of(**own)
        else:
            nested = dataclasses.is_dataclass(annotation)
            parts[name] = _built(annotations[name], f"{full}.", values) if nested else values[full]
    return kind(**parts)
