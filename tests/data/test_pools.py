"""Packed batches: a pure function of seed and position, on any number of processes and workers."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from typing import Any

import grain
import numpy as np
import pytest

from visor_jax import testing
from visor_jax.data.collate import Batch, Example
from visor_jax.data.packing import PoolShape
from visor_jax.data.pipeline import ExampleStream
from visor_jax.data.pools import PackedBatches, PoolSettings, make_packed_pipeline
from visor_jax.data.sample import Part, Sample, SkipSample
from visor_jax.data.skips import SkipLog
from visor_jax.errors import RunError

ARCH = testing.tiny_architecture(7)
SETTINGS = PoolSettings(PoolShape(rows=2, tiles=6, visual=20, text=24), num_pools=4, window=5)


class Texts:
    """A source whose sample i has i % 3 pictures and 3 to 9 text tokens; every seventh cannot be used."""

    name = "texts"

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Sample:
        if index % 7 == 3:
            raise SkipSample("broken_image", f"number {index}")
        return Sample(str(index), (), (), self.name)


def encode(sample: Sample) -> Example:
    number = int(sample.id)
    texts = (2,) * (number % 3) + (1 + number % 7,)
    return testing.random_example(ARCH, texts, seed=number, num_targets=1)._replace(id=sample.id)


def stream(seed: int = 3) -> ExampleStream[Example]:
    return ExampleStream([Part(Texts())], encode, seed)


def take(count: int, settings: PoolSettings = SETTINGS, **options: Any) -> tuple[list[Batch], list[Any], dict]:
    """`count` batches, the position after each of them, and the counts in the end."""
    skips, positions, batches = SkipLog(), [], []
    with make_packed_pipeline(stream(), ARCH, settings, skips=skips, **options) as pipeline:
        for _ in range(count):
            batches.append(next(pipeline))
            positions.append(json.loads(json.dumps(pipeline.position())))
    return batches, positions, skips.state()


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.ids == other.ids and one.tasks == other.tasks and one.contents == other.contents
        for name, array in other.arrays.items():
            np.testing.assert_array_equal(one.arrays[name], array)


def joined(parts: list[Batch]) -> Batch:
    """The processes' parts of one step, as one batch."""
    names = parts[0].arrays
    return Batch(
        {name: np.concatenate([part.arrays[name] for part in parts]) for name in names},
        [id for part in parts for id in part.ids],
        [tasks for part in parts for tasks in part.tasks],
        [contents for part in parts for contents in part.contents],
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_another_number_of_processes_continues_where_a_run_was_stopped(processes: int) -> None:
    whole, positions, _ = take(5)
    for stop in (0, 1, 3):
        position = positions[stop - 1] if stop else None
        parts = [take(5 - stop, position=position, process_index=i, process_count=processes) for i in range(processes)]
        assert_same([joined(list(step)) for step in zip(*(p[0] for p in parts), strict=True)], whole[stop:])
        assert {pool: place for part in parts for pool, place in part[1][-1].items()} == positions[-1]


def test_every_sample_of_an_epoch_is_used_once_and_none_waits_forever() -> None:
    settings = dataclasses.replace(SETTINGS, num_pools=1)
    batches, positions, counts = take(30, settings)
    seen: set[str] = set()
    for batch, position in zip(batches, positions, strict=True):
        drawn = position["0"]["drawn"]
        assert drawn - min([*map(int, position["0"]["waiting"].split()), drawn]) < 10 * settings.window
        seen |= {*batch.ids}
    assert {str(i) for i in range(60) if i % 7 != 3} <= seen  # the skipped ones' places were taken by others
    assert counts["skipped"] and counts["tried"] == positions[-1]["0"]["drawn"] + counts["skipped"][0][2]


def test_worker_processes_change_nothing() -> None:
    whole, positions, counts = take(3, dataclasses.replace(SETTINGS, num_pools=1))
    with_workers, again, same_counts = take(3, dataclasses.replace(SETTINGS, num_pools=1, workers=2))
    assert_same(with_workers, whole)
    assert again == positions and same_counts == counts


def test_a_worker_that_dies_ends_the_run_with_one_message() -> None:
    settings = dataclasses.replace(SETTINGS, num_pools=1, workers=1)
    with make_packed_pipeline(stream(), ARCH, settings) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(RunError, match=r"prepares samples died .*exit code -9\), .* fewer data\.workers"):
            for _ in range(200):
                next(batches)


def test_grains_own_check_of_saved_positions_passes() -> None:
    dataset = PackedBatches(stream(), ARCH, SETTINGS, range(4))
    counted = dataset.map(lambda pair: {"tokens": pair[0].arrays["text_tokens"], "tiles": pair[0].arrays["tiles"]})
    limited = grain.experimental.LimitIterDataset(counted, 4)
    grain.experimental.assert_equal_output_after_checkpoint(limited)


@pytest.mark.parametrize(
    "position",
    [
        {},
        {str(pool): {} for pool in range(4)},
        {str(pool): {"drawn": 3, "waiting": "3"} for pool in range(4)},
        {str(pool): {"drawn": 3, "waiting": "1 1"} for pool in range(4)},
        {str(pool): {"drawn": "three", "waiting": ""} for pool in range(4)},
        {str(pool): None for pool in range(4)},
    ],
)
def test_a_position_that_no_checkpoint_wrote_is_refused(position: dict) -> None:
    with pytest.raises(RunError, match=r"damaged\?"):
        make_packed_pipeline(stream(), ARCH, SETTINGS, position=position)


def test_pools_divide_over_processes() -> None:
    with pytest.raises(ValueError, match="4 pools do not divide over 3 processes"):
        make_packed_pipeline(stream(), ARCH, SETTINGS, process_count=3)


def test_rows_hold_several_samples_and_stay_isolated() -> None:
    for batch in take(3)[0]:
        segments = batch.arrays["text_segments"].max(axis=1)
        assert segments.sum() == len(batch.ids) > len(segments)
        assert batch.arrays["tiles"].shape[:2] == (4, 6)
        newline = 6 * ARCH.vision.patches_per_tile
        assert batch.arrays["visual_gather"].max() == newline
