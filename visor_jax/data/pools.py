"""The training input with several samples per row: batches of pools, each filled from its own stream of samples.

In: a stream of examples (`pipeline.ExampleStream`), the shape of a pool, and where to continue. Out: an iterator of
batches. Pool `g` of `num_pools` reads the places g, g + num_pools, g + 2 num_pools, ... of the stream, so each process
makes its own pools without knowing the others. A window of samples waits at every pool; each step fills the pool's rows
from them (`packing.fill_pool`) and draws as many new ones.

What is packed into which row is a pure function of the seed and of a pool's position: how many samples it has drawn
and the places of those that wait. Positions are small, belong to pools and not to processes, and travel with each
checkpoint, so a run resumes bit for bit, also on another number of hosts or workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.data.collate import Batch, Example, make_batch
from visor_jax.data.curriculum import FOREVER
from visor_jax.data.packing import PoolShape, fill_pool
from visor_jax.data.pipeline import BatchIterator, ExampleStream, read_ahead
from visor_jax.data.scales import ScaleLayout
from visor_jax.data.skips import SkipLog, Tally
from visor_jax.errors import RunError

_AHEAD = 4  # examples that a worker makes before its pool takes them


@dataclass(frozen=True)
class PoolPosition:
    """Where one pool is in its stream: samples drawn so far, and the ordinals of those among them that wait."""

    drawn: int = 0
    waiting: tuple[int, ...] = ()

    def state(self) -> dict[str, Any]:
        """As JSON values, of the same structure at every position, as Grain asks of an iterator's state."""
        return {"drawn": self.drawn, "waiting": " ".join(map(str, self.waiting))}

    @classmethod
    def of(cls, state: Any) -> PoolPosition:
        """The position that `state` gave.

        Raises:
            RunError: it is no such position.
        """
        try:
            position = cls(int(state["drawn"]), tuple(map(int, state["waiting"].split())))
        except (TypeError, KeyError, ValueError, AttributeError):
            position = cls(-1)
        waiting = position.waiting
        known = all(0 <= ordinal < position.drawn for ordinal in waiting)
        if position.drawn < 0 or not known or len({*waiting}) < len(waiting):
            raise RunError(f"{state!r:.100} is no position of a pool in the data; is the checkpoint damaged?")
        return position


@dataclass(frozen=True)
class _Places:
    """The places of the stream that one pool reads, in order: a random-access source for Grain."""

    pool: int
    num_pools: int

    def __len__(self) -> int:
        return FOREVER // self.num_pools

    def __getitem__(self, index: int) -> int:
        return int(index) * self.num_pools + self.pool


@dataclass
class _Pool:
    """One pool: its samples made ahead, and those that wait."""

    ahead: grain.DatasetIterator[tuple[Example, Tally]]
    drawn: int
    waiting: list[tuple[int, Example]] = field(default_factory=list)  # (ordinal, example), oldest first

    def rows(self, shape: PoolShape, window: int, tally: Tally) -> list[list[Example]]:
        """The rows of the next step; what was tried and skipped for the samples drawn is added to `tally`."""
        while len(self.waiting) < window:
            example, tried = next(self.ahead)
            tally.add(tried)
            # The copy frees the worker's shared memory, of which a process can hold only so many pieces.
            self.waiting.append((self.drawn, _copied(example)))
            self.drawn += 1
        rows = fill_pool([example.size for _, example in self.waiting], shape)
        taken = {index for row in rows for index in row}
        chosen = [[self.waiting[index][1] for index in row] for row in rows]
        self.waiting = [pair for index, pair in enumerate(self.waiting) if index not in taken]
        return chosen

    def position(self) -> PoolPosition:
        return PoolPosition(self.drawn, tuple(ordinal for ordinal, _ in self.waiting))


def _copied(example: Example) -> Example:
    arrays = {name: np.array(value) for name, value in example._asdict().items() if isinstance(value, np.ndarray)}
    scales = tuple(ScaleLayout(*map(np.array, scale)) for scale in example.scales)
    return example._replace(**arrays, scales=scales)


@dataclass(frozen=True)
class PoolSettings:
    """What is the same for all steps.

    Attributes:
        shape: of each pool.
        num_pools: of one step, over all processes.
        window: samples that wait at each pool before its rows are filled.
        workers: processes that make the samples of each pool; 0: one thread per pool.
        min_taps, independent_turns: `make_batch`'s.
    """

    shape: PoolShape
    num_pools: int
    window: int
    workers: int = 0
    min_taps: int = 0
    independent_turns: bool = False


class PackedBatches(grain.IterDataset):
    """One process's part of every batch: elements (Batch, Tally); its iterator's state is the pools' positions."""

    def __init__(
        self,
        stream: ExampleStream[Example],
        architecture: Architecture,
        settings: PoolSettings,
        pools: Sequence[int],
        positions: Mapping[int, PoolPosition] | None = None,
    ) -> None:
        """
        Args:
            stream: the samples of all pools.
            architecture: its tiles and patches are read.
            settings: of the pools.
            pools: the pools of this process, in the order of its devices.
            positions: where each of `pools` continues; without any they begin.
        """
        super().__init__()
        self.stream, self.architecture, self.settings, self.pools = stream, architecture, settings, tuple(pools)
        self.positions = {pool: PoolPosition() for pool in pools} if positions is None else dict(positions)

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(self)


class _PackedIterator(grain.DatasetIterator):
    def __init__(self, dataset: PackedBatches) -> None:
        super().__init__()
        self._dataset = dataset
        self._positions = {pool: dataset.positions[pool] for pool in dataset.pools}
        self._pools: list[_Pool] | None = None  # started by the first batch

    def __next__(self) -> tuple[Batch, Tally]:
        data, shape, tally = self._dataset, self._dataset.settings.shape, Tally()
        if self._pools is None:
            self._pools = [self._start(pool) for pool in data.pools]
        rows = [row for pool in self._pools for row in pool.rows(shape, data.settings.window, tally)]
        self._positions = {n: pool.position() for n, pool in zip(data.pools, self._pools, strict=True)}
        batch = make_batch(
            rows,
            shape.largest,
            data.architecture,
            shape.rows,
            data.settings.min_taps,
            independent_turns=data.settings.independent_turns,
            all_scales=True,
        )
        return batch, tally

    def _start(self, number: int) -> _Pool:
        """Read ahead for one pool from its position; samples that wait there are made again."""
        data, position = self._dataset, self._positions[number]
        places = _Places(number, data.settings.num_pools)
        examples = grain.MapDataset.source(places).map(data.stream.tallied)
        waiting = [(ordinal, data.stream[places[ordinal]]) for ordinal in position.waiting]
        ahead = read_ahead(examples, position.drawn, workers=data.settings.workers, ahead=_AHEAD)
        return _Pool(ahead, position.drawn, waiting)

    def get_state(self) -> dict[str, Any]:
        return {str(pool): position.state() for pool, position in self._positions.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._positions = {pool: PoolPosition.of(state[str(pool)]) for pool in self._dataset.pools}

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        for pool in self._pools or []:
            pool.ahead.close()
        self._pools = None


def make_packed_pipeline(
    stream: ExampleStream[Example],
    architecture: Architecture,
    settings: PoolSettings,
    *,
    position: Mapping[str, Any] | None = None,
    skips: SkipLog | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> BatchIterator[Batch]:
    """Batches of packed rows.

    Args:
        stream: the samples.
        architecture: its tiles and patches are read.
        settings: of the pools; `process_count` divides their number.
        position: {pool: position} of all pools, as `BatchIterator.position` of each process gave them; None: the start.
        skips: where skipped samples are counted and written down.
        process_index, process_count: which pools to make.
        prefetch: batches made ahead of the step that uses them.

    Raises:
        RunError: `position` lacks a pool or cannot be read; while iterating, also too many skipped samples.
    """
    if settings.num_pools % process_count:
        raise ValueError(f"{settings.num_pools} pools do not divide over {process_count} processes")
    local = settings.num_pools // process_count
    pools = range(process_index * local, (process_index + 1) * local)
    positions = None
    if position is not None:
        if missing := [pool for pool in pools if str(pool) not in position]:
            raise RunError(f"the checkpoint has no position in the data for pools {missing}; is it damaged?")
        positions = {pool: PoolPosition.of(position[str(pool)]) for pool in pools}
    packed = PackedBatches(stream, architecture, settings, pools, positions)
    ahead = grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=prefetch)
    batches = iter(ahead)
    return BatchIterator(batches, skips or SkipLog(), batches.get_state)
