"""The stream of batches is a pure function of (seed, step) on any number of processes, also with bad samples."""

import itertools
import json
import operator
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import grain
import hypothesis
import hypothesis.strategies as st
import pytest

from visor_jax.data.pipeline import MAX_ATTEMPTS, BatchIterator, ExampleStream, make_pipeline, tallied_batches
from visor_jax.data.sample import Part, Sample, SkipSample
from visor_jax.data.skips import SkipLog
from visor_jax.errors import RequestError, RunError


class Numbers:
    """A source whose sample i is named "<name>/<i>"; every `bad_every`-th is unusable."""

    def __init__(self, name: str, size: int, bad_every: int = 0):
        self.name, self._size, self._bad_every = name, size, bad_every

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._size:
            raise IndexError(index)
        if self._bad_every and index % self._bad_every == 0:
            raise SkipSample("broken_image", f"number {index}")
        return Sample(id=f"{self.name}/{index}", images=(), turns=(), source=self.name)


def name_of(sample: Sample) -> str:
    return sample.id


def pipeline(parts: Sequence[Part], batch_size: int = 4, seed: int = 0, **options) -> BatchIterator[list[str]]:
    return make_pipeline(ExampleStream(parts, name_of, seed), list, batch_size=batch_size, **options)


def take(count: int, parts: Sequence[Part], **options) -> list[list[str]]:
    with pipeline(parts, **options) as batches:
        return list(itertools.islice(batches, count))


MIXED = [
    Part(Numbers("a", 13, bad_every=5), weight=3),
    Part(Numbers("b", 2**31), shuffle=False),
    Part(Numbers("c", 7, bad_every=3), weight=2),
]


@hypothesis.given(st.integers(0, 30), st.integers(0, 2**40), st.integers(1, 6))
@hypothesis.settings(max_examples=20, deadline=None)
def test_a_resumed_stream_equals_the_uninterrupted_one(step: int, seed: int, batch_size: int) -> None:
    straight = take(step + 4, MIXED, seed=seed, batch_size=batch_size)
    assert take(4, MIXED, seed=seed, batch_size=batch_size, start_step=step) == straight[step:]


def test_grain_state_also_resumes() -> None:
    dataset = tallied_batches(ExampleStream(MIXED, name_of, seed=5), list, 4, 0, 1).map(operator.itemgetter(0))
    dataset = dataset.slice(slice(0, 12))
    grain.experimental.assert_equal_output_after_checkpoint(dataset.to_iter_dataset())


def test_worker_processes_change_nothing() -> None:
    assert take(5, MIXED, seed=3, start_step=2, workers=1) == take(5, MIXED, seed=3, start_step=2)


@pytest.mark.parametrize("process_count", [2, 3])
def test_the_processes_rows_make_up_the_batch(process_count: int) -> None:
    whole = take(6, MIXED, batch_size=6)
    shards = [take(6, MIXED, batch_size=6, process_index=i, process_count=process_count) for i in range(process_count)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shards, strict=True)] == whole
    with pytest.raises(ValueError, match="does not divide"):
        pipeline(MIXED, batch_size=4, process_count=3)


def test_an_epoch_has_every_sample_once_in_a_different_order() -> None:
    def epochs(seed: int) -> list[list[str]]:
        return take(3, [Part(Numbers("a", 50))], batch_size=50, seed=seed)

    everything = sorted(f"a/{i}" for i in range(50))
    assert [sorted(epoch) for epoch in epochs(0)] == [everything] * 3
    assert len({tuple(epoch) for epoch in epochs(0) + epochs(1)}) == 6


def test_generated_sources_are_read_in_order() -> None:
    assert take(2, [Part(Numbers("a", 2**31), shuffle=False)], start_step=10) == [
        ["a/40", "a/41", "a/42", "a/43"],
        ["a/44", "a/45", "a/46", "a/47"],
    ]


def test_a_mixture_follows_its_weights() -> None:
    parts = [Part(Numbers("a", 10**4), weight=3), Part(Numbers("b", 10**4), weight=1)]
    names = list(itertools.chain(*take(10, parts, batch_size=40)))
    counts = Counter(name[0] for name in names)
    assert counts == {"a": 300, "b": 100} and len(set(names)) == 400


def test_a_bad_sample_moves_no_other_and_its_place_is_taken_from_the_same_source() -> None:
    skips = SkipLog()
    good_parts, holed_parts = ([Part(Numbers("a", 40, bad)), Part(Numbers("b", 40))] for bad in (0, 4))
    good = itertools.chain(*take(10, good_parts, batch_size=8))
    holed = itertools.chain(*take(10, holed_parts, batch_size=8, skips=skips))
    changed = [(before, after) for before, after in zip(good, holed, strict=True) if before != after]
    assert changed and all(int(before[2:]) % 4 == 0 for before, _ in changed)
    assert all(after[0] == "a" and int(after[2:]) % 4 for _, after in changed)
    assert skips.counts["a", "broken_image"] >= len(changed) and skips.by_reason().keys() == {"a/broken_image"}
    assert skips.tried >= 80 + skips.skipped


@hypothesis.given(st.integers(0, 20), st.integers(0, 2**40))
@hypothesis.settings(max_examples=10, deadline=None)
def test_counts_of_a_resumed_run_equal_the_uninterrupted_ones(stop: int, seed: int) -> None:
    """A batch's tally counts when a step takes the batch, however many were made ahead."""

    def used(start: int, count: int, state: dict | None = None) -> list[dict]:
        skips, states = SkipLog(), []
        if state is not None:
            skips.restore(json.loads(json.dumps(state)))
        with pipeline(MIXED, seed=seed, start_step=start, skips=skips) as batches:
            for _ in range(count):
                next(batches)
                states.append(skips.state())
        return states

    whole = used(0, 24)
    assert used(stop, 24 - stop, whole[stop - 1] if stop else None) == whole[stop:]
    assert whole[-1]["tried"] > 96 and whole[-1]["skipped"]


def test_the_allowed_fraction_holds_over_all_starts() -> None:
    """A run that is restarted often has tried few samples each time."""
    parts, state = [Part(Numbers("a", 40, bad_every=4))], {}
    with pytest.raises(RunError, match=r"of \d\d+ samples could not be used"):
        for start in range(100):
            skips = SkipLog(max_fraction=0.1)
            skips.restore(state)
            take(1, parts, start_step=start, skips=skips)
            state = skips.state()
    assert 25 <= state["tried"] < 60


@pytest.mark.parametrize("state", [None, [], {}, {"tried": -1, "skipped": []}, {"tried": 1, "skipped": [["a", "b"]]}])
def test_counts_that_no_checkpoint_wrote_are_ignored(state: object) -> None:
    skips = SkipLog()
    skips.restore(state)
    assert skips.state() == {"tried": 0, "skipped": []}


def test_what_the_encoder_refuses_is_skipped_too() -> None:
    def encode(sample: Sample) -> str:
        if sample.id.endswith("3"):
            raise SkipSample("too_long", "no room")
        return sample.id

    skips = SkipLog()
    with make_pipeline(ExampleStream([Part(Numbers("a", 10))], encode, 0), list, batch_size=10, skips=skips) as batches:
        assert "a/3" not in next(batches)
    assert skips.by_reason()["a/too_long"] >= 1


def test_too_many_skips_end_the_run() -> None:
    skips = SkipLog(max_fraction=0.1)
    with pytest.raises(
        RunError, match=r"of \d+ samples could not be used \(a/broken_image \d+\).*max_skipped_fraction"
    ):
        take(100, [Part(Numbers("a", 1000, bad_every=2))], skips=skips)
    assert skips.tried >= 50
    assert take(100, [Part(Numbers("a", 1000, bad_every=20))], skips=SkipLog(max_fraction=0.1))


def test_nothing_usable_ends_the_run_even_if_every_skip_is_allowed() -> None:
    with pytest.raises(RunError, match=f"in {MAX_ATTEMPTS} attempts"):
        take(1, [Part(Numbers("a", 5, bad_every=1))])


def test_skipped_records_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "data" / "skipped.jsonl"
    parts = [Part(Numbers("a", 10, bad_every=5))]
    take(10, parts, skips=SkipLog(path))
    with path.open("a") as file:
        file.write('{"source": "a", "ind')  # killed while writing
    take(30, parts, skips=SkipLog(path))
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    assert sorted(row["index"] for row in rows) == [0, 5] and len(lines) == 3
    assert rows[0] == {"source": "a", "index": rows[0]["index"], "reason": "broken_image", "detail": rows[0]["detail"]}


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        take(5, [Part(Numbers("a", 10, bad_every=5))], skips=SkipLog(tmp_path))  # a folder


def test_closing_stops_the_thread_at_once() -> None:
    before = threading.active_count()
    with pipeline(MIXED) as batches:
        next(batches)
    batches.close()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and threading.active_count() > before:
            thread.join(2)
    assert threading.active_count() <= before
