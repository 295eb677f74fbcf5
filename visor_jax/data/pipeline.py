"""The training input: an endless, resumable stream of batches, a pure function of (seed, step).

In: sources with weights, a function that encodes a sample and one that collates examples. Out: an iterator of
batches that can start at any step.

A global sample counter is the position in the data. Batch `s` holds the samples `s * batch_size` to
`(s + 1) * batch_size - 1` of one endless stream. Each sample is a pure function of (seed, counter):

- Source: chosen by weight at fixed positions (`grain.MapDataset.mix`).
- Index: finite sources are reshuffled every epoch by (seed, source, epoch), so an epoch yields every sample once;
  generated sources are read in order.
- Substitute: a sample that cannot be used is counted (`skips.SkipLog`) and replaced by another of the same source,
  whose index is drawn from (seed, counter, attempt); so a bad record moves no other sample.

Each process makes only its rows of every batch. To resume, start at step `s`; no other state is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import grain
import numpy as np
from absl import flags

from visor_jax.data.draws import seed_sequence
from visor_jax.data.sample import Sample, SkipSample, Source
from visor_jax.data.skips import SkipLog, Tally
from visor_jax.errors import RunError

ExampleT = TypeVar("ExampleT")
BatchT = TypeVar("BatchT")

MAX_ATTEMPTS = 1000  # per position of the stream, whatever fraction of skips is allowed
# Otherwise Grain adds a paragraph to error messages. Unparsed flags have their default values.
flags.FLAGS.set_default("grain_py_traceback_filtering", "off")
_FOREVER = 2**62  # larger lengths overflow inside Grain


@dataclass(frozen=True)
class Part:
    """One source of a mixture, its share of the stream, and whether its epochs are shuffled."""

    source: Source
    weight: float = 1.0
    shuffle: bool = True


class ExampleStream(Generic[ExampleT]):
    """The endless stream of examples: `stream[counter]` is a pure function of (seed, counter)."""

    def __init__(
        self, parts: Sequence[Part], encode: Callable[[Sample], ExampleT], seed: int, skips: SkipLog | None = None
    ) -> None:
        """
        Args:
            parts: at least one; every source has samples.
            encode: sample -> example; may raise `SkipSample`.
            seed: 0 or more.
            skips: counts skipped samples.
        """
        self._parts, self._encode, self._seed = tuple(parts), encode, seed
        self._skips = skips or SkipLog()
        # The mixture consists of (part, ordinal) pairs: the ordinal-th sample drawn from this part.
        ordinals = [
            grain.MapDataset.range(_FOREVER).map(functools.partial(_pair, part)) for part in range(len(self._parts))
        ]
        self._mixture = grain.MapDataset.mix(ordinals, weights=[part.weight for part in self._parts])
        self._permutation = functools.lru_cache(maxsize=2 * len(self._parts))(self._make_permutation)

    def __len__(self) -> int:
        return _FOREVER

    def __getitem__(self, counter: int) -> ExampleT:
        """Returns the example at this position of the stream.

        Raises:
            RunError: too many samples were skipped.
        """
        return self.tallied(counter)[0]

    def tallied(self, counter: int) -> tuple[ExampleT, Tally]:
        """Returns the example at this position of the stream, and the tally of samples tried and skipped for it."""
        reasons: list[str] = []
        tally = Tally()
        for attempt in range(MAX_ATTEMPTS):
            part, index = self.reference(counter, attempt)
            source = self._parts[part].source
            self._skips.count_tried()
            tally.tried += 1
            try:
                return self._encode(source[index]), tally
            except SkipSample as why:
                self._skips.count_skipped(source.name, index, why)
                tally.counts[source.name, why.reason] += 1
                reasons.append(f"{source.name} {index}: {why}")
        raise RunError(f"no usable sample in {MAX_ATTEMPTS} attempts at place {counter}; last: {reasons[-1]}")

    def reference(self, counter: int, attempt: int = 0) -> tuple[int, int]:
        """Returns (part, index in its source) of a position in the stream; `attempt` > 0 selects a substitute."""
        pair = self._mixture[counter]
        assert pair is not None  # nothing was filtered out of the mixture
        part, ordinal = pair
        size = len(self._parts[part].source)
        if attempt:
            draw = seed_sequence("substitute", self._seed, counter, attempt).generate_state(1, np.uint64)
            return part, int(draw[0]) % size
        epoch, index = divmod(ordinal, size)
        if self._parts[part].shuffle:
            index = int(self._permutation(part, epoch)[index])
        return part, index

    def _make_permutation(self, part: int, epoch: int) -> np.ndarray:
        # Sorts raw words instead of calling Generator.permutation: NumPy keeps the raw words stable across versions.
        words = np.random.PCG64(seed_sequence("shuffle", self._seed, part, epoch))
        return np.argsort(words.random_raw(len(self._parts[part].source)), kind="stable")


def _pair(part: int, ordinal: int) -> tuple[int, int]:
    return part, ordinal


@dataclass(frozen=True)
class _Rows:
    """Counters of the rows that one process makes, in order of batches: a random-access source for Grain."""

    batch_size: int
    process_index: int
    process_count: int

    @property
    def local_size(self) -> int:
        return self.batch_size // self.process_count

    def __len__(self) -> int:
        return _FOREVER // self.batch_size * self.local_size

    def __getitem__(self, index: int) -> int:
        step, local = divmod(int(index), self.local_size)
        return step * self.batch_size + self.process_index * self.local_size + local


def tallied_batches(
    stream: ExampleStream[ExampleT],
    collate: Callable[[Sequence[ExampleT]], BatchT],
    batch_size: int,
    process_index: int,
    process_count: int,
) -> grain.MapDataset[tuple[BatchT, Tally]]:
    """Returns random access to this process's part of every batch: element `s` is (batch, tally) of step `s`."""
    if batch_size % process_count:
        raise ValueError(f"a batch of {batch_size} does not divide over {process_count} processes")
    rows = _Rows(batch_size, process_index, process_count)

    def batched(pairs: Sequence[tuple[ExampleT, Tally]]) -> tuple[BatchT, Tally]:
        total = Tally()
        for _, tally in pairs:
            total.add(tally)
        return collate([example for example, _ in pairs]), total

    return grain.MapDataset.source(rows).map(stream.tallied).batch(rows.local_size, batch_fn=batched)


class BatchIterator(Iterator[BatchT]):
    """Yields batches from `start_step` on, prefetched by one thread. Close it, or use it in a `with` statement.

    Taking a batch counts its tally as used (`SkipLog.use`).
    """

    def __init__(
        self, dataset: grain.MapDataset[tuple[BatchT, Tally]], start_step: int, prefetch: int, skips: SkipLog
    ) -> None:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        self._batches = iter(dataset.slice(slice(start_step, None)).to_iter_dataset(options))
        self._skips = skips

    def __next__(self) -> BatchT:
        batch, tally = next(self._batches)
        self._skips.use(tally)
        return batch

    def close(self) -> None:
        """Stops the thread; may be called repeatedly."""
        self._batches.close()

    def __enter__(self) -> BatchIterator[BatchT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_pipeline(
    parts: Sequence[Part],
    encode: Callable[[Sample], ExampleT],
    collate: Callable[[Sequence[ExampleT]], BatchT],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    skips: SkipLog | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> BatchIterator[BatchT]:
    """Yields training batches from step `start_step` on.

    Args:
        parts: the sources and their weights.
        encode: sample -> example; may raise `SkipSample`.
        collate: the examples of this process's part of a batch, in order -> batch. It may put several into one row
            (`collate.pack`); the result stays a pure function of (seed, step).
        batch_size: samples per step over all processes, a multiple of `process_count`.
        seed: seeds shuffles and substitutes.
        start_step: the step of the first batch.
        skips: counts and records skipped samples.
        process_index, process_count: select this process's rows.
        prefetch: number of batches to prefetch.

    Raises (while iterating):
        RunError: more samples were skipped than `skips` allows.
    """
    skips = skips or SkipLog()
    dataset = tallied_batches(
        ExampleStream(parts, encode, seed, skips), collate, batch_size, process_index, process_count
    )
    return BatchIterator(dataset, start_step, prefetch, skips)
