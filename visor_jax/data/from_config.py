"""What a configuration's `data` section means: its sources, tokenizer, window, and fixed lists of single questions.

Training streams conversations (`visor_jax.data.pipeline`); search, label and evaluate ask single questions in a fixed
order (`visor_jax.data.questions`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from visor_jax.config import architecture
from visor_jax.data.collate import Example, Window, encode_example
from visor_jax.data.draws import Within, index_range
from visor_jax.data.glyphs.source import TASKS, Glyphs
from visor_jax.data.sample import Sample, Source
from visor_jax.data.sources.llava import LlavaSource
from visor_jax.data.tokenizer import ChatTokenizer, load_tokenizer

EVALUATION_CARDS = 8  # the most that a picture holds: the hard end of the generated data


def make_tokenizer(config: Any) -> ChatTokenizer:
    return load_tokenizer(config.tokenizer.path)


def training_window(config: Any) -> Window:
    """The fixed shape of a row: `data.tiles`, `data.visual_length`, `data.text_length`."""
    return Window(tiles=config.data.tiles, visual=config.data.visual_length, text=config.data.text_length)


def sample_encoder(config: Any, tokenizer: ChatTokenizer, window: Window) -> Callable[[Sample], Example]:
    """Sample -> Example, as this configuration tokenizes, tiles and masks."""
    return partial(
        encode_example,
        tokenizer=tokenizer,
        architecture=architecture(config),
        system=config.tokenizer.system or None,
        targets=config.loss.targets,
        window=window,
    )


def make_source(config: Any, split: str) -> Source:
    """The configured source of conversations for "train", "validation" or "test"."""
    data = config.data
    if data.source == "glyphs":
        return glyphs_source(config, split, scenes=dict(data.scenes) or None, turns_per_picture=data.turns_per_picture)
    return LlavaSource.from_config(config, split)


def stage_source(config: Any, stage: str) -> Source:
    """What a stage trains on: the training records; of the endless generated data, a range that is this stage's own."""
    source = make_source(config, "train")
    return Within(source, index_range(stage)[1]) if config.data.source == "glyphs" else source


def glyphs_source(config: Any, split: str, **asked: Any) -> Glyphs:
    """Generated pictures of the size that the model takes, asked about as `Glyphs` is told."""
    grid = config.model.vision.tile_size // config.model.vision.patch_size
    return Glyphs(split=split, seed=config.seed, grid=grid, **asked)


def label_source(config: Any) -> Source:
    """What labels are made on: the training records; of the generated data, pictures that ask about one task each."""
    if config.data.source != "glyphs":
        return make_source(config, "train")
    turns = config.data.turns_per_picture
    return glyphs_source(config, "train", tasks=tuple(TASKS), turns_per_picture=turns)
