"""Every field of a configuration: the frozen dataclasses that `visor_jax.config.validate` returns. No JAX import.

These classes and those of the sections in `model_fields`, `data_fields` and `train_fields` are the only declaration of
the fields: name, type, default, and as metadata the meaning, rule and units. `SCHEMA` holds the same fields by dotted
name; `default_config` and the parsing of files and overrides use it. `visor_jax.config.checks` checks rules that span
several fields.

Messages write a field as `train.steps`; the command line sets it with `--config.train.steps=100`. A setting for one
stage only is `stage_overrides.<stage>.<field of train>`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from visor_jax.config.data_fields import DataConfig, LossConfig, TokenizerConfig
from visor_jax.config.model_fields import ModelConfig
from visor_jax.config.overrides import TrainOverrides
from visor_jax.config.rules import LICENSE, SEED, at_least, below_one, not_empty, one_of, ordered_subset, within
from visor_jax.config.train_fields import MeshConfig, TrainConfig
from visor_jax.config.values import Field, describe_field, setting

SectionT = TypeVar("SectionT")

BASE_STAGES = ("base_words", "base_lists", "base_pages")  # a dense model from random weights, in steps
STAGES = (*BASE_STAGES, "base", "dense", "warmup", "full", "search", "universal", "label", "policy")
DENSE_STAGES = (*BASE_STAGES, "base", "dense")  # have the dense plan whatever model.plan is
OFFLINE_STAGES = ("search", "label")  # evaluate only, without training
TRAINED_STAGES = tuple(stage for stage in STAGES if stage not in OFFLINE_STAGES)
# Random numbers and ranges of generated data are counted by these numbers, so a stage keeps its number for good: new
# stages are appended here, wherever they stand in STAGES.
_NUMBERED = ("base", "dense", "warmup", "full", "search", "universal", "label", "policy", *BASE_STAGES)
STAGE_NUMBERS = {stage: number for number, stage in enumerate(_NUMBERED)}


@dataclass(frozen=True)
class SearchConfig:
    """The pass that finds the viable budgets."""

    samples: int = setting(1024, "questions of the validation split", at_least(1))
    max_subsets: int = setting(512, "evaluate all subsets up to this many, else best-first by count", at_least(2))
    slots: tuple[int, ...] = setting(
        (),
        "slots to search, the most promising first, as `visor analyze` orders them; the others are on in `full` only",
    )
    early_stopping: float = setting(
        0.0,
        "stop asking a subset once another one of its cost is surely better; the probability that the viable budgets"
        " differ from those of a search that asks everything; 0: ask everything",
        within(0, 0.5),
    )
    look_every: int = setting(
        64, "questions, in whole batches, after which subsets may be stopped", at_least(1), units="questions"
    )


@dataclass(frozen=True)
class LabelConfig:
    """The pass that finds the cheapest correct budget of each question."""

    samples: int = setting(4096, "questions of the training split", at_least(1))
    tolerance: float = setting(0.01, "fraction of the full budget's score that a cheaper budget may lose", below_one())
    only_right: bool = setting(False, "skip questions that the full budget does not answer exactly")
    without: tuple[str, ...] = setting((), "tasks whose questions are not labeled, so that the policy never sees them")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on the test split."""

    samples: int = setting(1024, "questions of the test split", at_least(1))
    control_samples: int = setting(
        256, "of these, asked again about a gray and about another picture, where the source has controls", at_least(1)
    )
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
    dense_start: bool = setting(False, "also ask the dense model that the run started from the same questions")
    timing_rounds: int = setting(
        5, "rounds in which every budget answers one question, timed after a warm-up; 0: no times", at_least(0)
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

    base_words: TrainOverrides = dataclasses.field(default=TrainOverrides.of(init_from="", trainable=_ALL_BUT_ROUTING))
    base_lists: TrainOverrides = dataclasses.field(
        default=TrainOverrides.of(init_from="base_words", trainable=_ALL_BUT_ROUTING)
    )
    base_pages: TrainOverrides = dataclasses.field(
        default=TrainOverrides.of(init_from="base_lists", trainable=_ALL_BUT_ROUTING)
    )
    base: TrainOverrides = dataclasses.field(default=TrainOverrides.of(init_from="", trainable=_ALL_BUT_ROUTING))
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


def _build_section(kind: type[SectionT], prefix: str, values: Mapping[str, Any]) -> SectionT:
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
