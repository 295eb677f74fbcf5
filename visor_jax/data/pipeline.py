"""The training input: an endless, resumable stream of batches, a pure function of (seed, step).

In: sources with weights, a function that encodes a sample and one that collates examples. Out: an iterator of
batches that can start at any step.

A global sample counter is the position in the data. Batch `s` holds the samples `s * batch_size` to
`(s + 1) * batch_size - 1` of one endless stream. Each sample is a pure function of (seed, counter):

- Source: chosen by weight at fixed positions, by weights that may change at given counters (`curriculum`).
- Index: finite sources are reshuffled every epoch by (seed, source, epoch), so an epoch yields every sample once;
  generated sources are read in order.
- Substitute: a sample that cannot be used is counted (`skips.Tally`) and replaced by another of the same source, whose
  index is drawn from (seed, counter, attempt); so a bad record moves no other sample.

Each process makes only its rows of every batch. To resume, start at step `s`; no other state is stored.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Generic, TypeVar

import grain
import numpy as np
from absl import flags

from visor_jax.data.curriculum import FOREVER, Phase, PhasedMixture
from visor_jax.data.draws import seed_sequence
from visor_jax.data.sample import Part, Sample, Sheet, SkipSample
from visor_jax.data.skips import SkipLog, Tally
from visor_jax.errors import RunError

ExampleT = TypeVar("ExampleT")
BatchT = TypeVar("BatchT")
ElementT = TypeVar("ElementT")

MAX_ATTEMPTS = 1000  # per position of the stream, whatever fraction of skips is allowed
# Otherwise Grain adds a paragraph to error messages. Unparsed flags have their default values.
flags.FLAGS.set_default("grain_py_traceback_filtering", "off")
_WORKER_DIED = "Worker process was terminated"  # how Grain's message begins


class ExampleStream(Generic[ExampleT]):
    """The endless stream of examples: `stream[counter]` is a pure function of (seed, counter)."""

    def __init__(
        self,
        parts: Sequence[Part],
        encode: Callable[[Sample | Sheet], ExampleT],
        seed: int,
        phases: Sequence[Phase] = (),
    ) -> None:
        """
        Args:
            parts: at least one; every source has samples.
            encode: sample or sheet -> example; may raise `SkipSample`.
            seed: 0 or more.
            phases: the weights of the parts, from position to position; empty: the parts' own.
        """
        self._parts, self._encode, self._seed = tuple(parts), encode, seed
        self._mixture = PhasedMixture(phases or [Phase(0, tuple(part.weight for part in self._parts))])
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, counter: int) -> ExampleT:
        """Returns the example at this position of the stream.

        Raises:
            RunError: no sample could be used.
        """
        return self.tallied(counter)[0]

    def tallied(self, counter: int) -> tuple[ExampleT, Tally]:
        """Returns the example at this position of the stream, and the tally of samples tried and skipped for it."""
        tally = Tally()
        for attempt in range(MAX_ATTEMPTS):
            part, index = self.reference(counter, attempt)
            source = self._parts[part].source
            tally.tried += 1
            try:
                return self._encode(source[index]), tally
            except SkipSample as why:
                tally.skip(source.name, index, why)
        last = tally.skips[-1]
        raise RunError(
            f"no usable sample in {MAX_ATTEMPTS} attempts at place {counter};"
            f" last: {last.source} {last.index}: {last.reason}: {last.detail}"
        )

    def reference(self, counter: int, attempt: int = 0) -> tuple[int, int]:
        """Returns (part, index in its source) of a position in the stream; `attempt` > 0 selects a substitute."""
        part, ordinal = self._mixture[counter]
        size = len(self._parts[part].source)
        if attempt:
            draw = seed_sequence("substitute", self._seed, counter, attempt).generate_state(1, np.uint64)
            return part, int(draw[0]) % size
        epoch, index = divmod(ordinal, size)
        if self._parts[part].shuffle:
            index = int(self._permutation(part, epoch)[index])
        return part, index

    def _permutation(self, part: int, epoch: int) -> np.ndarray:
        order = self._permutations.get((part, epoch))
        if order is None:
            while len(self._permutations) >= 2 * len(self._parts):
                self._permutations.pop(next(iter(self._permutations)), None)
            order = self._permutations[part, epoch] = self._make_permutation(part, epoch)
        return order

    def _make_permutation(self, part: int, epoch: int) -> np.ndarray:
        # Sorts raw words instead of calling Generator.permutation: NumPy keeps the raw words stable across versions.
        words = np.random.PCG64(seed_sequence("shuffle", self._seed, part, epoch))
        return np.argsort(words.random_raw(len(self._parts[part].source)), kind="stable")


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
        return FOREVER // self.batch_size * self.local_size

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


def read_ahead(
    dataset: grain.MapDataset[ElementT], start: int, *, workers: int, ahead: int
) -> grain.DatasetIterator[ElementT]:
    """The elements from `start` on, in order, made ahead by `workers` processes, or by one thread without any.

    Each worker makes whole elements, every `workers`-th of them, and passes their arrays through shared memory; `ahead`
    is the number of elements that each of them, or the thread, makes before they are taken.
    """
    elements = dataset.slice(slice(start, None)).to_iter_dataset(
        grain.ReadOptions(num_threads=0 if workers else 1, prefetch_buffer_size=0 if workers else ahead)
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags' values, also in programs that parse none
            flags.FLAGS.mark_as_parsed()
        elements = elements.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(ahead, 1)), prepare_worker
        )
    return iter(elements)


def prepare_worker(index: int, count: int) -> None:
    """Makes a worker process leave signals to its parent, and end with it, also if the parent is killed.

    Schedulers and terminals send SIGTERM and SIGINT to every process of a run: a worker that died of one would fail the
    step that the run still has to finish.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class BatchIterator(Iterator[BatchT]):
    """Batches made ahead of time. Close it, or use it in a `with` statement.

    What was tried for a batch is counted (`SkipLog.use`) when the batch is taken.

    Attributes:
        tally: what was tried for the last batch taken.
    """

    def __init__(
        self,
        batches: grain.DatasetIterator[tuple[BatchT, Tally]],
        skips: SkipLog,
        position: Callable[[], Any] = lambda: None,
    ) -> None:
        self._batches, self._skips, self._position = batches, skips, position
        self.tally = Tally()

    def __next__(self) -> BatchT:
        try:
            batch, self.tally = next(self._batches)
        except RuntimeError as error:
            if not str(error).startswith(_WORKER_DIED):
                raise
            raise RunError(
                f"a process that prepares samples died ({str(error).split('.')[0]}), perhaps for want of memory; resume"
                " with fewer data.workers or a smaller data.pack_window"
            ) from error
        self._skips.use(self.tally)
        return batch

    def position(self) -> Any:
        """What a checkpoint has to keep besides the number of steps, as JSON values; None where that number is all."""
        return self._position()

    def close(self) -> None:
        """Stops threads and workers; harmless when repeated."""
        self._batches.close()

    def __enter__(self) -> BatchIterator[BatchT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_pipeline(
    stream: ExampleStream[ExampleT],
    collate: Callable[[Sequence[ExampleT]], BatchT],
    *,
    batch_size: int,
    start_step: int = 0,
    skips: SkipLog | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 2,
) -> BatchIterator[BatchT]:
    """Batches of `batch_size` samples, from step `start_step` on (`visor_jax.data.pools` packs several into a row).

    Args:
        stream: the samples.
        collate: the examples of this process's part of a batch, in order -> batch.
        batch_size: samples per step over all processes; `process_count` divides it.
        start_step: the first batch to give.
        skips: where skipped samples are counted and written down.
        process_index, process_count: which rows to make.
        workers: processes that make batches; 0 makes them in a thread.
        prefetch: how many batches the thread or each worker makes ahead.

    Raises (while iterating):
        RunError: more samples were skipped than `skips` allows.
    """
    dataset = tallied_batches(stream, collate, batch_size, process_index, process_count)
    return BatchIterator(read_ahead(dataset, start_step, workers=workers, ahead=prefetch), skips or SkipLog())
