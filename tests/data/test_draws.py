"""Consumers of the endless generated data read disjoint ranges of pictures for any batch size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.config.schema import TRAINED_STAGES
from visor_jax.data.draws import PURPOSES, RANGE, STREAM_LENGTH, Within, generator, index_range, seed_sequence
from visor_jax.data.from_config import label_source, stage_source
from visor_jax.data.pipeline import ExampleStream
from visor_jax.data.sample import Part, Sample, SkipSample
from visor_jax.testing import almanac_source, tiny_config

CONSUMERS = (*TRAINED_STAGES, "label", "validation", "test")
LEARNING = (*TRAINED_STAGES, "label")


class Indices:
    """A source of samples that only hold their index, some of them unusable."""

    name = "indices"

    def __init__(self, bad: int = 0) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return STREAM_LENGTH

    def __getitem__(self, index: int) -> Sample:
        if self.bad and index % self.bad == 0:
            raise SkipSample("bad")
        return Sample(str(index), (), (), self.name)


def drawn(consumer: str, batch_size: int, step: int, bad: int) -> list[int]:
    """Returns the pictures of one step of a consumer's stream, at most three."""
    stream = ExampleStream(
        [Part(Within(Indices(bad), index_range(consumer)[1]), shuffle=False)], lambda s: int(s.id), seed=0
    )
    return [stream[step * batch_size + row] for row in range(min(batch_size, 3))]


@given(
    st.tuples(st.sampled_from(LEARNING), st.sampled_from(LEARNING)).filter(lambda pair: pair[0] != pair[1]),
    st.tuples(st.integers(1, 2**24), st.integers(1, 2**24)),
    st.tuples(st.integers(0, 2**34), st.integers(0, 2**34)),
    st.sampled_from([0, 2, 3]),
)
def test_no_batch_size_and_no_step_lets_two_stages_share_a_picture(
    consumers: tuple[str, str], batch_sizes: tuple[int, int], steps: tuple[int, int], bad: int
) -> None:
    one, other = (set(drawn(*arguments, bad)) for arguments in zip(consumers, batch_sizes, steps, strict=True))
    assert not one & other
    for actual, consumer in ((one, consumers[0]), (other, consumers[1])):
        assert all(index in index_range(consumer)[1] for index in actual), "not even past the end of the range"


def test_the_same_pictures_come_in_the_same_order_for_every_batch_size() -> None:
    stream = ExampleStream(
        [Part(Within(Indices(), index_range("full")[1]), shuffle=False)], lambda s: int(s.id), seed=0
    )
    start = index_range("full")[1].start
    assert [stream[counter] for counter in range(24)] == list(range(start, start + 24))


def test_ranges_of_one_split_are_disjoint_and_the_stream_holds_them() -> None:
    actual = sorted((split, indices.start, indices.stop) for split, indices in map(index_range, CONSUMERS))
    for (split, _, stop), (next_split, start, _) in itertools.pairwise(actual):
        assert split != next_split or stop <= start
    assert {split for split, _, _ in actual} == {"train", "validation", "test"}
    assert all(
        stop - start == RANGE >= 2**40 and stop <= STREAM_LENGTH <= len(almanac_source()) for _, start, stop in actual
    )


def test_stages_and_labels_read_the_ranges_that_are_theirs() -> None:
    config = tiny_config()
    ids = {stage: stage_source(config, stage)[0].id for stage in TRAINED_STAGES}
    assert ids == {stage: f"almanac/pages/train/0/{index_range(stage)[1].start}" for stage in TRAINED_STAGES}
    label_source(config)[index_range("label")[1].stop - 1]


def test_pictures_differ_past_2_to_the_32_too() -> None:
    source = almanac_source()
    images = {source[index].images[0].tobytes() for index in (5, 5 + 2**31, 5 + 2**32, 5 + 2**40)}
    assert len(images) == 4


words = st.integers(0, 2**40)


@given(st.lists(st.tuples(st.sampled_from(PURPOSES), words, words), min_size=2, max_size=8, unique=True))
def test_no_two_purposes_or_places_draw_the_same_numbers(places: list[tuple[str, int, int]]) -> None:
    entropies = {tuple(seed_sequence(*place).generate_state(4)) for place in places}
    assert len(entropies) == len(places)


@pytest.mark.parametrize("split", range(4))
def test_other_random_numbers_differ_from_those_of_pictures(split: int) -> None:
    """NumPy pads short seeds with zeros, so that those of (1, 0, 7) and (1, 0, 7, 0) are the same."""
    pictures = {tuple(np.random.SeedSequence((seed, split, 7)).generate_state(4)) for seed in range(6)}
    others = {
        tuple(seed_sequence(purpose, *numbers).generate_state(4))
        for purpose in PURPOSES
        for numbers in ((split, 7), (7, split), (0, 7), (split, 7, 0), (7, 0, 0))
    }
    assert not pictures & others


def test_a_generator_is_a_pure_function() -> None:
    assert generator("words", 3, 2**33).integers(100, size=5).tolist() == [
        *generator("words", 3, 2**33).integers(100, size=5)
    ]
