"""Questions with replaced pictures: gray ones, and those of other questions of the same task."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.config import as_config
from visor_jax.data.controls import GRAY, ControlQuestions, donors
from visor_jax.data.questions import Facts, Place, single_questions
from visor_jax.data.sample import SkipSample
from visor_jax.testing import tiny_config

SAMPLES = st.lists(st.tuples(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), st.integers(1, 2)), max_size=24)


@given(SAMPLES)
def test_a_question_gets_pictures_of_another_sample_with_the_same_task(samples: list[tuple[list[str], int]]) -> None:
    facts = {
        Place(index, turn): Facts(task, pictures, "", "")
        for index, (tasks, pictures) in enumerate(samples)
        for turn, task in enumerate(tasks)
    }
    chosen = donors(facts)
    for place in facts:
        group = samples[place.index][0][place.turn], samples[place.index][1]
        others = {i for i, (tasks, count) in enumerate(samples) if group[0] in tasks and count == group[1]}
        if len(others) == 1:
            assert place not in chosen
        else:
            donor = chosen[place]
            assert donor.index in others - {place.index}
            assert samples[donor.index][0][donor.turn] == group[0]
    for task in "abc":  # every picture of a task is asked about: those that come and those that go are the same
        pairs = {(p.index, d.index) for p, d in chosen.items() if samples[p.index][0][p.turn] == task}
        assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs)


def test_blind_pictures_are_gray_and_of_the_same_size() -> None:
    config = as_config(tiny_config())
    questions = single_questions(config, "test", 4)
    blind = ControlQuestions(config, questions._source, 4, control="blind")
    for place in blind.plan():
        own, gray = questions.read(place), blind.controlled(blind.read(place))
        assert gray.turns == own.turns and gray.id == own.id
        assert [image.shape for image in gray.images] == [image.shape for image in own.images]
        assert all((image == GRAY).all() for image in gray.images) and len(np.unique(own.images[0])) > 1


def test_shuffled_pictures_belong_to_another_question_of_the_task() -> None:
    config = as_config(tiny_config())
    questions = single_questions(config, "test", 48)
    shuffled = ControlQuestions(config, questions._source, 48, control="shuffled")
    pictures = {place: questions.read(place) for place in questions.plan()}
    for place, own in pictures.items():
        given_to = shuffled.controlled(own)
        assert given_to.turns == own.turns
        (donor,) = [p for p, q in pictures.items() if np.array_equal(q.images[0], given_to.images[0])]
        assert donor != place and pictures[donor].turns[0].task == own.turns[0].task


def test_a_question_without_another_picture_is_skipped() -> None:
    config = as_config(tiny_config())
    questions = single_questions(config, "test", 2)
    shuffled = ControlQuestions(config, questions._source, 2, control="shuffled")
    assert not any(map(shuffled.has_picture, shuffled.plan()))
    with pytest.raises(SkipSample, match="no_other_picture"):
        shuffled.controlled(questions.read(questions.plan()[0]))
