"""Builds the objects that the `data` section configures: sources, tokenizer, row shape and sample encoder.

In: a configuration. Out: the parts of the training stream (`visor_jax.data.pipeline`) and of the fixed lists of single
questions that search, label and evaluate ask (`visor_jax.data.questions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from visor_jax.config import ConfigLike, architecture, as_config, stage_config
from visor_jax.config.mixture import generated_parts
from visor_jax.data.anyres import video_taps
from visor_jax.data.collate import Example, RowShape
from visor_jax.data.curriculum import Phase, phases_of
from visor_jax.data.draws import Within, index_range
from visor_jax.data.sample import Part, Sample, Sheet, Source
from visor_jax.data.sheets import encode_record
from visor_jax.data.sources import source_kind
from visor_jax.data.tokenizer import ChatTokenizer, load_tokenizer


def make_tokenizer(config: ConfigLike) -> ChatTokenizer:
    """Loads the tokenizer that `tokenizer.path` names."""
    return load_tokenizer(as_config(config).tokenizer.path)


def training_row_shape(config: ConfigLike) -> RowShape:
    """Returns the fixed shape of a row: `data.tiles`, `data.visual_length`, `data.text_length`."""
    data = as_config(config).data
    return RowShape(tiles=data.tiles, visual=data.visual_length, text=data.text_length)


def agreed_taps(config: ConfigLike, process_count: int) -> int:
    """Returns the smallest K of the batches: that of videos where several processes must make arrays of one shape.

    A single process gives each batch the K that it needs, and so does a source without records.
    """
    config = as_config(config)
    data = config.data
    stored = len(generated_parts(vars(data))) < len(data.parts) if data.parts else not source_kind(config).endless
    return video_taps(architecture(config)) if stored and process_count > 1 else 0


def sample_encoder(
    config: ConfigLike, tokenizer: ChatTokenizer, row_shape: RowShape
) -> Callable[[Sample | Sheet], Example]:
    """Returns a function Sample or Sheet -> Example that tokenizes, tiles and masks as configured, for training."""
    config = as_config(config)
    return partial(
        encode_record,
        tokenizer=tokenizer,
        architecture=architecture(config),
        system=config.tokenizer.system or None,
        targets=config.loss.targets,
        row_shape=row_shape,
        independent_turns=config.data.independent_turns,
        all_scales=True,
    )


def make_source(config: ConfigLike, split: str) -> Source:
    """Opens the configured source of conversations for "train", "validation" or "test"."""
    config = as_config(config)
    return source_kind(config).open(config, split)


def stage_source(config: ConfigLike, stage: str) -> Source:
    """Returns the source that a stage trains on: the training records, or for an endless source the stage's range."""
    config = as_config(config)
    source = make_source(config, "train")
    return Within(source, index_range(stage)[1]) if source_kind(config).endless else source


def stage_parts(config: ConfigLike, stage: str) -> list[Part]:
    """Returns the parts of the stream that a stage trains on: the configured source, or those of a mixture."""
    config = as_config(config)
    kind = source_kind(config)
    if kind.parts is not None:
        return kind.parts(config, stage)
    return [Part(stage_source(config, stage), shuffle=not kind.endless)]


def stage_phases(config: ConfigLike, stage: str, parts: Sequence[Part]) -> list[Phase]:
    """Returns the weights of a stage's parts by phase (`train.curriculum`).

    Raises:
      RequestError: the curriculum names a part that does not exist.
    """
    return phases_of(stage_config(config, stage), parts, f"curriculum of stage {stage!r}")


def held_out_parts(config: ConfigLike, stage: str) -> list[tuple[str, Source]]:
    """Returns (name, source) of each part of the data that a stage is validated on; the name of a single one is ""."""
    config = as_config(config)
    held_out = source_kind(config).held_out
    return [("", make_source(config, "validation"))] if held_out is None else held_out(config, stage)


def label_source(config: ConfigLike) -> Source:
    """Returns the source whose questions are labeled."""
    config = as_config(config)
    for_labels = source_kind(config).for_labels
    return make_source(config, "train") if for_labels is None else for_labels(config)


def evaluation_source(config: ConfigLike, split: str) -> Source:
    """Returns the source whose questions search and evaluate ask."""
    config = as_config(config)
    for_evaluation = source_kind(config).for_evaluation
    return make_source(config, split) if for_evaluation is None else for_evaluation(config, split)
