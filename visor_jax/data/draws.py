"""Separates consumers of generated data and purposes of random numbers, so that none share samples or draws.

In: the name of a consumer, or a purpose and whole numbers. Out: a range of indices, or a NumPy random generator.

- The generated data set has one endless stream of samples per split. `index_range` gives every consumer of a stream a
  separate range, counted in samples, so ranges are disjoint for any batch size. A consumer that needs more than `RANGE`
  samples starts its range again; it never reads the next one.
- `seed_sequence` gives every purpose separate random numbers. Its seed words have a fixed width, so no two (purpose,
  numbers) have the same seed.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from visor_jax.config.schema import BASE_STAGES, TRAINED_STAGES
from visor_jax.data.sample import Sample, Sheet, Source

RANGE: Final = 2**40  # samples that each consumer may draw before they repeat

# In the order of their ranges in the stream of the training split; new consumers are appended, so that none moves.
_LEARNING: Final = (*(stage for stage in TRAINED_STAGES if stage not in BASE_STAGES), "label", *BASE_STAGES)
_CONSUMERS: Final = {  # name -> (split, number of its range in that split's stream)
    **{consumer: ("train", number) for number, consumer in enumerate(_LEARNING)},
    "validation": ("validation", 0),
    "test": ("test", 0),
}
STREAM_LENGTH: Final = RANGE * (1 + max(number for _, number in _CONSUMERS.values()))

PURPOSES: Final = ("budget", "shuffle", "substitute", "labeled", "words", "subset")


def index_range(consumer: str) -> tuple[str, range]:
    """Returns (split, indices) of a consumer: a trained stage, "label", "validation" (the search) or "test"."""
    split, number = _CONSUMERS[consumer]
    return split, range(number * RANGE, (number + 1) * RANGE)


class Within:
    """A range of a source's samples: sample `i` is the source's sample `indices[i]`."""

    def __init__(self, source: Source, indices: range) -> None:
        self._source, self._indices = source, indices
        self.name = source.name

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample | Sheet:
        return self._source[self._indices[index]]


def seed_sequence(purpose: str, *numbers: int) -> np.random.SeedSequence:
    """Returns the seed of a purpose at one position.

    Args:
      purpose: one of `PURPOSES`.
      *numbers: two or more, each from 0 to 2**64 - 1, such as (seed, step); the same count for all draws of a purpose.
    """
    # NumPy pads fewer than five words with zeros and splits large numbers into words of unknown count. With two words
    # per number, no sequence is a prefix of another, and none equals one of the generated data set.
    words = [PURPOSES.index(purpose)]
    for number in numbers:
        words += [number % 2**32, number // 2**32]
    return np.random.SeedSequence(words)


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """Returns a generator seeded by `seed_sequence`; PCG64, so the numbers do not depend on NumPy's default."""
    return np.random.Generator(np.random.PCG64(seed_sequence(purpose, *numbers)))
