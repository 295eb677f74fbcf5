"""Random examples and batches, and the tokenizer of the generated data.

From an `Architecture` and the numbers of text tokens around each picture, `visor_jax.data.collate` makes `Example`s
and `Batch`es as in training; `decoder_inputs` returns the decoder's inputs for them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.config import ConfigLike, as_config
from visor_jax.data.almanac.source import Almanac, Row
from visor_jax.data.collate import Batch, Example, RowShape, encode_tokens, make_batch, make_prompt_batch
from visor_jax.data.questions import Questions
from visor_jax.data.sample import Sample
from visor_jax.data.tokenizer import ChatTokenizer, load_tokenizer
from visor_jax.model.decoder import TokenStream
from visor_jax.model.visor import stream_of

IMAGE_TOKEN = 1  # the placeholder id in token lists; never a text token of an example

Texts = Sequence[int]
"""Numbers of text tokens before, between and after the pictures of one example.

(3, 5) is a picture after three of eight tokens, (2, 4, 1) has two pictures, and (6,) has none.
"""


def random_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Returns uint8 [height, width, 3]: a smooth random color field with a little noise, so that patches differ."""
    rng = np.random.default_rng([seed, height, width])
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    phase, slope = rng.uniform(0, 6, 3), rng.uniform(-6, 6, (2, 3))
    field = 0.5 + 0.4 * np.sin(phase + slope[0] * y + slope[1] * x) + rng.normal(0, 0.05, (height, width, 3))
    return np.round(255 * np.clip(field, 0, 1)).astype(np.uint8)


def random_example(
    arch: Architecture, texts: Texts = (3, 5), size: tuple[int, int] = (8, 16), seed: int = 0, num_targets: int = 2
) -> Example:
    """Returns an example of random tokens and random pictures of `size` (height, width); its last tokens are targets.

    Args:
      num_targets: how many of the last tokens are targets.
    """
    rng = np.random.default_rng([seed, zlib.crc32(repr(tuple(texts)).encode())])
    tokens: list[int] = []
    for index, count in enumerate(texts):
        tokens += [IMAGE_TOKEN] * (index > 0) + rng.integers(2, arch.text.vocab_size, count).tolist()
    pictures = [random_picture(*size, seed=seed + index) for index in range(len(texts) - 1)]
    targets = [index >= len(tokens) - num_targets for index in range(len(tokens))]
    turns = [0 if target else -1 for target in targets]
    return encode_tokens(
        tokens,
        pictures,
        IMAGE_TOKEN,
        arch,
        target_mask=targets,
        turn_index=turns,
        id=f"random-{seed}",
        tasks=("random",),
        scales=arch.other_scales,
    )


def row_shape_of(rows: Sequence[Sequence[Example]], spare: int = 0) -> RowShape:
    """Returns the smallest row shape that holds every row, with `spare` positions of padding in each stream."""
    sizes = [sum((example.size for example in row), RowShape(0, 0, 0)) for row in rows]
    return RowShape(
        tiles=max(max(size.tiles for size in sizes), 1),
        visual=max(size.visual for size in sizes) + max(spare, 1),
        text=max(size.text for size in sizes) + spare,
    )


def random_batch(
    arch: Architecture,
    rows: Sequence[Sequence[Texts]] = (((3, 4), (2, 3)), ((2, 2, 3),), ((7,),)),
    spare: int = 2,
    seed: int = 0,
) -> Batch:
    """Returns a training batch; each row holds one example (segment) per `Texts`.

    The default has a row of two examples with a picture each, a row of one example with two pictures, and a row of text
    only. Every row ends in padding in both the visual and the text stream.
    """
    examples = [
        [random_example(arch, texts, seed=seed + 100 * row + column) for column, texts in enumerate(row_texts)]
        for row, row_texts in enumerate(rows)
    ]
    return make_batch(examples, row_shape_of(examples, spare), arch)


def random_prompts(
    arch: Architecture, rows: Sequence[Texts] = ((3, 5), (2, 1, 4), (6,)), spare: int = 2, seed: int = 0
) -> Batch:
    """Returns a batch of prompts of different lengths, one per row, with the positions of their routing tokens."""
    examples = [random_example(arch, texts, seed=seed + 100 * row, num_targets=0) for row, texts in enumerate(rows)]
    return make_prompt_batch(examples, row_shape_of([[example] for example in examples], spare), arch)


def decoder_inputs(arch: Architecture, batch: Batch, seed: int = 0) -> tuple[jax.Array, jax.Array, TokenStream]:
    """Returns arguments of `visor_jax.model.decoder.forward`: random V [B, Nv, D], T [B, Nt, D] and the stream."""
    rng, size = np.random.default_rng(seed), arch.text.hidden_size
    visual = rng.standard_normal((*batch.arrays["visual_segments"].shape, size), np.float32)
    text = rng.standard_normal((*batch.arrays["text_segments"].shape, size), np.float32)
    return jax.tree.map(jnp.asarray, (visual, text, stream_of(batch.arrays)))


@cache
def almanac_tokenizer() -> ChatTokenizer:
    """Returns the generated data set's tokenizer, `load_tokenizer("almanac")`, loaded once."""
    return load_tokenizer("almanac")


def almanac_source(split: str = "train", seed: int = 0, **settings: Any) -> Almanac:
    """Returns the generated data set: pages of 96 pixels whose conversations fit 128 text tokens.

    Args:
      settings: other arguments of `Almanac`.
    """
    row = Row(text=128, visual=72, grid=8, patch=12)
    return Almanac(split, seed, almanac_tokenizer(), row, **{"independent": False, **settings})


class InMemorySource:
    """A data source of the given samples."""

    name = "held"

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def questions_of(config: ConfigLike, samples: Sequence[Sample]) -> Questions:
    """Returns the questions that search, label and evaluate ask about the samples; question i has the id "i/0"."""
    config = as_config(config)
    return Questions(config, InMemorySource(samples), len(samples))
