"""The generated pages: reproducible, inside their pictures, answered by their facts, and within a row's text."""

from __future__ import annotations

import re
import string
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest

from visor_jax import testing
from visor_jax.config import as_config
from visor_jax.data.almanac.exercises import EXERCISES
from visor_jax.data.almanac.kind import answered_tasks
from visor_jax.data.almanac.questions import TASKS
from visor_jax.data.almanac.source import Almanac, Row, check_kinds
from visor_jax.data.almanac.tables import all_tables, tables_of
from visor_jax.data.almanac.words import content_words
from visor_jax.data.chat import encode_prompt
from visor_jax.data.from_config import (
    evaluation_source,
    label_source,
    make_source,
    make_tokenizer,
    sample_encoder,
    training_row_shape,
)
from visor_jax.data.sample import Sample, samples_of
from visor_jax.data.sources import source_kind
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.errors import RequestError

DRAWN_HERE = [name for name in EXERCISES if name != "pages_vega"]  # without the optional renderer
ROW = Row(text=128, visual=72, grid=8, patch=12)


def almanac(exercise: str = "pages", split: str = "train", seed: int = 0, **settings) -> Almanac:
    return Almanac(split, seed, load_tokenizer("almanac"), ROW, exercise=exercise, **settings)


def same(a: Sample, b: Sample) -> bool:
    return a.turns == b.turns and a.origin == b.origin and np.array_equal(a.images[0], b.images[0])


@pytest.mark.parametrize("exercise", DRAWN_HERE)
def test_samples_are_a_function_of_seed_split_exercise_and_index(exercise):
    first, again = (samples_of(almanac(exercise)[7]) for _ in range(2))
    assert len(first) == len(again) and all(map(same, first, again))
    for other in (almanac(exercise, seed=1)[7], almanac(exercise, split="test")[7], almanac(exercise)[8]):
        assert not same(samples_of(other)[0], first[0])


@pytest.mark.parametrize("exercise", [name for name in DRAWN_HERE if name != "pages_480"])  # it takes several tiles
def test_a_row_fits_into_one_tile_and_its_text(exercise):
    tokenizer = load_tokenizer("almanac")
    source = almanac(exercise)
    for index in range(20):
        samples = samples_of(source[index])
        assert samples and all(sample.turns for sample in samples)
        patches = [(s.images[0].shape[0] // 12, s.images[0].shape[1] // 12) for s in samples]
        assert sum(h * w for h, w in patches) <= 64 and sum(h * w + 1 for h, w in patches) <= 72
        shared = 1 + len(tokenizer.encode("user\n")) + len(tokenizer.encode("\n"))
        text = 0
        for sample, (height, width) in zip(samples, patches, strict=True):
            assert sample.images[0].dtype == np.uint8
            if EXERCISES[exercise].small:
                row, column = sample.origin
                assert 0 <= row <= 8 - height and 0 <= column <= 8 - width
            else:
                assert sample.origin is None and (height, width) == (8, 8)
            text += shared
            for turn in sample.turns:
                prompt = encode_prompt(tokenizer, turn.question)
                text += len(prompt) - shared - 1 + len(tokenizer.encode(turn.answer)) + 1
            assert len({(turn.task, turn.question, turn.answer) for turn in sample.turns}) == len(sample.turns)
        assert text <= 128


def test_evaluation_asks_each_task_equally_often_on_single_questions():
    expected = (*EXERCISES["pages"].weights, "read")
    source = almanac(tasks=expected, turns=1)
    tasks = [turn.task for index in range(2 * len(expected)) for turn in source[index].turns]
    assert tasks == [*expected, *expected]
    assert {TASKS[task].level for task in tasks} == {"easy", "middle", "hard"}


def test_a_kind_that_is_named_twice_is_refused():
    with pytest.raises(RequestError, match=r"data\.kinds has 'bars' twice"):
        check_kinds(EXERCISES["pages"], ("bars", "table1", "bars"))


@pytest.mark.parametrize(
    ("path", "kinds", "mixed", "missing"),
    [
        ("pages", (), 0.3, set()),
        ("pages", (), 0.0, {"cell3"}),
        ("pages", ("bars",), 0.3, {"right", "cell1", "cell2", "cell3", "line", "column", "two_step"}),
        ("pages_72", (), 0.3, {"cell3"}),
    ],
)
def test_tasks_that_no_page_answers_are_named_and_left_out(path, kinds, mixed, missing, caplog):
    config = testing.tiny_config()
    config.tokenizer.path = "almanac"
    config.data.update(source="almanac", path=path, kinds=kinds, mixed_share=mixed, visual_length=72, text_length=128)
    config.model.vision.update(tile_size=96, patch_size=12)
    config, kind = as_config(config), source_kind(config)
    answered_tasks.cache_clear()
    tasks = kind.tasks(config)
    assert {*EXERCISES[path].weights, "read"} - {*tasks} == missing
    assert {*caplog.text.rpartition(": ")[2].strip().split(", ")} - {""} == missing
    for source in (label_source(config), evaluation_source(config, "test")):
        assert [samples_of(source[index])[0].turns[0].task for index in range(len(tasks))] == [*tasks]


def test_no_answer_of_a_task_is_a_safe_guess():
    tasks = tuple(EXERCISES["pages"].weights)
    source = almanac(tasks=tasks, turns=1, split="test")
    answers = [
        Counter(source[index].turns[0].answer for index in range(i, 60 * len(tasks), len(tasks)))
        for i in range(len(tasks))
    ]
    for task, counted in zip(tasks, answers, strict=True):
        share = counted.most_common(1)[0][1] / 60
        assert share <= (0.4 if TASKS[task].level == "hard" else 0.7), (task, counted.most_common(3))


def test_every_word_and_digit_is_one_token():
    tokenizer = load_tokenizer("almanac")
    assert tokenizer.vocab_size <= 700
    for word in (*content_words(), *"0123456789", "user\n", "assistant\n", "none"):
        assert len(tokenizer.encode(word)) == 1, word
    assert len(tokenizer.encode("Value of Brazil?")) == 4


def test_no_question_or_answer_falls_back_to_bytes():
    tokenizer = load_tokenizer("almanac")
    letters = {tokenizer.encode(letter)[0] for letter in string.ascii_letters}
    for exercise in DRAWN_HERE:
        for turn in (turn for i in range(12) for s in samples_of(almanac(exercise)[i]) for turn in s.turns):
            for text in (f"\n{turn.question}", turn.answer):
                ids = tokenizer.encode(text)
                assert not letters & set(ids) and tokenizer.decode(ids) == text, text


def test_splits_share_no_table_and_every_word_is_drawn_in_training():
    names = [{table.name for table in tables_of(split)} for split in ("train", "validation", "test")]
    assert all(names) and sum(map(len, names)) == len(set.union(*names)) == len(all_tables())
    drawn = {turn.answer for i in range(900) for s in samples_of(almanac("crops")[i]) for turn in s.turns}
    assert set(content_words()) <= drawn


def test_every_table_has_a_license_that_may_be_passed_on_and_the_notice_names_it():
    notice = (files("visor_jax.data.almanac") / "NOTICE").read_text(encoding="utf-8")
    for table in all_tables():
        assert not re.search("SA|share|GPL|NC|ND", table.license), table.name
        assert f"License: {table.license}\n" in notice and table.package in notice


def test_wrong_settings_are_refused():
    with pytest.raises(RequestError, match=r"unknown data.path 'pagse'.*pages"):
        almanac("pagse")
    with pytest.raises(RequestError, match="no picture with a question of task 'cell3'"):
        _ = almanac("lists", tasks=("cell3",))[0]


@pytest.mark.parametrize("exercise", ["crops", "lists", "tables_one_row", "pages"])
def test_the_encoder_takes_every_row_and_counts_its_tokens_as_the_source_did(exercise):
    config = testing.tiny_config()
    config.tokenizer.path = "almanac"
    config.data.update(source="almanac", path=exercise, visual_length=72, text_length=128, turns_per_picture=100)
    config.data.update(independent_turns=True, small_pictures=True)
    config.model.vision.update(tile_size=96, patch_size=12)
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    source = make_source(config, "train")
    sizes = [encode(source[index]).size.text for index in range(25)]
    assert max(sizes) <= 128 and np.mean(sizes) > 110, sizes
