"""Which pictures each consumer reads of the endless generated data, and the random numbers of the input side.

In: the name of a consumer, or a purpose and whole numbers. Out: a range of indices, or a NumPy random generator. Both
keep apart what must have nothing in common:

- The generated data set has one endless stream of samples for each split. `index_range` gives every consumer of a
  stream a range of its own, counted in samples, so that ranges are disjoint for any batch size. A consumer that needs
  more than `RANGE` samples begins its own range anew; it never reaches into the next one.
- `seed_sequence` gives every purpose its own random numbers: the words that it seeds with are of fixed width, so that
  no two (purpose, numbers) seed alike.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from visor_jax.config.schema import TRAINED_STAGES
from visor_jax.data.sample import Sample, Source

RANGE: Final = 2**40  # samples that each consumer may draw before it meets one again

_CONSUMERS: Final = {  # name -> (split, number of its range in that split's stream)
    **{stage: ("train", number) for number, stage in enumerate(TRAINED_STAGES)},
    "label": ("train", len(TRAINED_STAGES)),
    "validation": ("validation", 0),
    "test": ("test", 0),
}
STREAM_LENGTH: Final = RANGE * (1 + max(number for _, number in _CONSUMERS.values()))

PURPOSES: Final = ("budget", "shuffle", "substitute", "labelled", "words")


def index_range(consumer: str) -> tuple[str, range]:
    """(split, indices) that a consumer reads: a trained stage, "label", "validation" (the search) or "test"."""
    split, number = _CONSUMERS[consumer]
    return split, range(number * RANGE, (number + 1) * RANGE)


class Within:
    """The samples of a source that lie in a range: sample `i` is the source's `indices[i]`."""

    def __init__(self, source: Source, indices: range) -> None:
        self._source, self._indices = source, indices
        self.name = source.name

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._indices[index]]


def seed_sequence(purpose: str, *numbers: int) -> np.random.SeedSequence:
    """The entropy of one purpose at one place.

    Args:
      purpose: one of `PURPOSES`.
      *numbers: two or more, each from 0 to 2**64 - 1, such as (seed, step); as many for all draws of a purpose.
    """
    # NumPy pads fewer than five words with zeros, and cuts large numbers into words without saying how many: with two
    # words a number no sequence is the beginning of another one, and none is one of the generated data set's own.
    words = [PURPOSES.index(purpose)]
    for number in numbers:
        words += [number % 2**32, number // 2**32]
    return np.random.SeedSequence(words)


def generator(purpose: str, *numbers: int) -> np.random.Generator:
    """A generator seeded by `seed_sequence`; PCG64, whose numbers do not depend on NumPy's default."""
    return np.random.Generator(np.random.PCG64(seed_sequence(purpose, *numbers)))
