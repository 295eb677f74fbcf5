"""Builds what the `data` section configures: sources, tokenizer, row shape, and fixed lists of single questions.

Training streams conversations (`visor_jax.data.pipeline`); search, label and evaluate ask single questions in a fixed
order (`visor_jax.data.questions`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from visor_jax.config import architecture
from visor_jax.data.collate import Example, RowShape, encode_example
from visor_jax.data.draws import Within, index_range
from visor_jax.data.sample import Sample, Source
from visor_jax.data.sources import source_kind
from visor_jax.data.tokenizer import ChatTokenizer, load_tokenizer


def make_tokenizer(config: Any) -> ChatTokenizer:
    return load_tokenizer(config.tokenizer.path)


def training_row_shape(config: Any) -> RowShape:
    """The fixed shape of a row: `data.tiles`, `data.visual_length`, `data.text_length`."""
    return RowShape(tiles=config.data.tiles, visual=config.data.visual_length, text=config.data.text_length)


def sample_encoder(config: Any, tokenizer: ChatTokenizer, row_shape: RowShape) -> Callable[[Sample], Example]:
    """Sample -> Example, as this configuration tokenizes, tiles and masks."""
    return partial(
        encode_example,
        tokenizer=tokenizer,
        architecture=architecture(config),
        system=config.tokenizer.system or None,
        targets=config.loss.targets,
        row_shape=row_shape,
    )


def make_source(config: Any, split: str) -> Source:
    """The configured source of conversations for "train", "validation" or "test"."""
    return source_kind(config).open(config, split)


def stage_source(config: Any, stage: str) -> Source:
    """Returns the source a stage trains on: the training records, or for an endless source the stage's own range."""
    source = make_source(config, "train")
    return Within(source, index_range(stage)[1]) if source_kind(config).endless else source


def label_source(config: Any) -> Source:
    """Returns the source whose questions are labeled."""
    for_labels = source_kind(config).for_labels
    return make_source(config, "train") if for_labels is None else for_labels(config)


def evaluation_source(config: Any, split: str) -> Source:
    """Returns the source whose questions search and evaluate ask."""
    for_evaluation = source_kind(config).for_evaluation
    return make_source(config, split) if for_evaluation is None else for_evaluation(config, split)
