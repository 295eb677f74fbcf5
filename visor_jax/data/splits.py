"""What a configuration's `data` section means: its sources, tokenizer, window, and fixed lists of single questions.

Training streams conversations (`visor_jax.data.pipeline`); search, label and evaluate ask single questions in a fixed
order, one a row, in batches of one shape.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from visor_jax.config import architecture
from visor_jax.data.collate import Batch, Example, Window, encode_example, make_batch
from visor_jax.data.draws import Within, index_range
from visor_jax.data.glyphs import TASKS, Glyphs
from visor_jax.data.llava import LlavaSource
from visor_jax.data.sample import IMAGE_MARKER, Sample, SkipSample, Source
from visor_jax.data.skips import SkipLog
from visor_jax.data.tokenizer import ChatTokenizer, load_tokenizer
from visor_jax.errors import RequestError

log = logging.getLogger(__name__)

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


def single_turn_samples(config: Any, split: str, count: int, skips: SkipLog | None = None) -> list[Sample]:
    """`count` single questions of a split: of the generated data an equal mix of all tasks at the hard end."""
    if config.data.source == "glyphs":
        source = glyphs_source(config, split, tasks=tuple(TASKS), turns_per_picture=1, cards=EVALUATION_CARDS)
        return [source[index] for index in range(count)]
    source, skips = make_source(config, split), skips or SkipLog()
    found: list[Sample] = []
    for index in range(len(source)):
        try:
            found += split_turns(source[index])
        except SkipSample as why:
            log.warning("%s %d skipped: %s", source.name, index, why)
            skips.count_skipped(source.name, index, why)
        if len(found) >= count:
            break
    if not found:
        raise RequestError(f"data: split {split!r} has no usable question")
    return found[:count]


def split_turns(sample: Sample) -> list[Sample]:
    """A conversation as single questions, each about the pictures shown up to it, earlier ones in front."""
    markers = [turn.question.count(IMAGE_MARKER) for turn in sample.turns]
    single = []
    for number, turn in enumerate(sample.turns):
        shown = sum(markers[: number + 1])
        question = f"{IMAGE_MARKER}\n" * (shown - markers[number]) + turn.question
        single.append(
            dataclasses.replace(
                sample,
                id=f"{sample.id}/{number}",
                images=sample.images[:shown] if any(markers) else sample.images,
                turns=(dataclasses.replace(turn, question=question),),
            )
        )
    return single


def single_turn_batches(config: Any, split: str, count: int, batch_size: int, skips: SkipLog) -> Iterator[Batch]:
    """Batches of single questions, the last one padded with empty rows to the common shape."""
    return batched(config, single_turn_samples(config, split, count, skips), batch_size, skips)


def batched(config: Any, samples: Sequence[Sample], batch_size: int, skips: SkipLog | None = None) -> Iterator[Batch]:
    """Samples as batches of `batch_size` rows, one a row; unusable ones are logged, counted and left out."""
    tokenizer, arch, skips = make_tokenizer(config), architecture(config), skips or SkipLog()
    examples = []
    for index, sample in enumerate(samples):
        try:
            examples.append(
                encode_example(
                    sample, tokenizer, arch, system=config.tokenizer.system or None, window=training_window(config)
                )
            )
        except SkipSample as why:
            log.warning("%s skipped: %s", sample.id, why)
            skips.count_skipped(sample.source, index, why)
    longest = max((len(example.text_tokens) for example in examples), default=1)
    window = dataclasses.replace(training_window(config), text=-(-longest // TEXT_BUCKET) * TEXT_BUCKET)
    for start in range(0, len(examples), batch_size):
        rows = [[example] for example in examples[start : start + batch_size]]
        yield make_batch(rows + [[]] * (batch_size - len(rows)), window, arch)


TEXT_BUCKET = 8
