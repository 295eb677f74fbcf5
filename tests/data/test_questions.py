"""Single questions, read on demand: the same batches every time, few pictures in memory, skips counted once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visor_jax import testing
from visor_jax.config import architecture
from visor_jax.data.anyres import most_visual_tokens
from visor_jax.data.collate import Batch, count_text, encode_example
from visor_jax.data.questions import READ_THREADS, RECENT, Questions, single_questions
from visor_jax.data.sample import NO_PICTURE, Sample, SkipSample, Turn, outline
from visor_jax.data.skips import SkipLog
from visor_jax.data.sources.llava import LlavaSource
from visor_jax.testing import tiny_config

CONFIG = tiny_config()


class Records:
    """Conversations, some with unreadable pictures; counts how often pictures are read."""

    name = "records"

    def __init__(self, turns: tuple[int, ...], broken: tuple[int, ...] = (), long: tuple[int, ...] = ()) -> None:
        self.turns, self.broken, self.long = turns, broken, long
        self.opened: list[int] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.turns)

    def outline(self, index: int) -> Sample:
        question_ids = "<image>\nWhat is this letter" + " or this letter" * 4 * (index in self.long) + "?"
        turns = (Turn(question_ids, "A"), *[Turn("And?", "B")] * (self.turns[index] - 1))
        return Sample(f"id{index % 2}", (NO_PICTURE,), turns, self.name)

    def __getitem__(self, index: int) -> Sample:
        with self._lock:
            self.opened.append(index)
        if index in self.broken:
            raise SkipSample("broken_image", "no picture")
        outlined = self.outline(index)
        return Sample(outlined.id, (np.full((48, 48, 3), index, np.uint8),), outlined.turns, self.name)


def question_ids(batches: Iterator[Batch]) -> list[str]:
    return [id for batch in batches for id in batch.ids]


def test_batches_are_the_same_each_time_and_the_last_is_filled_up() -> None:
    questions = single_questions(CONFIG, "validation", 11)
    batches = questions.batches(4)
    first, second = list(batches), list(batches)
    assert [len(batch.ids) for batch in first] == [4, 4, 3] and question_ids(iter(first)) == question_ids(iter(second))
    for one, other in zip(first, second, strict=True):
        assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
        assert {name: array.shape for name, array in one.arrays.items()} == {
            name: array.shape for name, array in first[0].arrays.items()
        }
    assert not first[-1].arrays["text_segments"][3].any()


def test_rows_are_what_the_samples_alone_give() -> None:
    questions = single_questions(CONFIG, "test", 7)
    (batch,) = questions.batches(7)
    examples = [encode_example(sample, questions._tokenizer, questions.arch, row_shape=None) for sample in questions]
    assert batch.arrays["text_tokens"].shape[1] == -(-max(e.size.text for e in examples) // 8) * 8
    for row, example in enumerate(examples):
        used = batch.arrays["text_segments"][row] > 0
        assert np.array_equal(batch.arrays["text_tokens"][row][used], example.text_tokens)
        assert np.array_equal(batch.arrays["tiles"][row, :1], example.tiles)


def test_unreadable_samples_are_replaced_and_counted_once() -> None:
    source, skips = Records((1, 3, 1, 2, 1, 1, 1), broken=(1, 4)), SkipLog()
    questions = Questions(CONFIG, source, 5, skips=skips)
    batches = questions.batches(2)
    for _ in range(2):
        assert question_ids(iter(batches)) == ["0/0", "2/0", "3/0", "3/1", "5/0"]
        assert skips.counts == {("records", "broken_image"): 2}
    assert 6 not in source.opened, "five questions came before"
    assert questions.find("3/1").turns[0].answer == "B"


def test_kept_chunks_are_not_read_and_their_skips_are_counted() -> None:
    """A pass that is resumed has the same chunks, skips and replacements as the first one."""
    config = tiny_config({"data.text_length": 24})
    turns, broken, long = (1, 3, 1, 2, 1, 1, 1, 1, 1), (1, 4), (2, 6)
    first_skips, skips = SkipLog(), SkipLog()
    first = list(Questions(config, Records(turns, broken, long), 7, skips=first_skips).chunks(2, lambda places: None))
    kept = {tuple(chunk.places): chunk for chunk in first[:3]}
    source = Records(turns, broken, long)
    again = list(Questions(config, source, 7, skips=skips).chunks(2, lambda places: kept.get(tuple(places))))
    assert [chunk.places for chunk in again] == [chunk.places for chunk in first] and len(first) > 4
    assert [chunk.failures for chunk in again] == [chunk.failures for chunk in first]
    assert [chunk.kept is not None for chunk in again] == [True] * 3 + [False] * (len(first) - 3)
    assert all(chunk.batch is None for chunk in again[:3])
    for one, other in zip(first[3:], again[3:], strict=True):
        assert (one.batch.ids if one.batch else None) == (other.batch.ids if other.batch else None)
    assert skips.counts == first_skips.counts == {("records", "broken_image"): 2, ("records", "too_long"): 2}
    assert not {0, 1, 2} & {*source.opened}


def test_a_random_order_is_the_same_in_every_pass_and_holds_the_same_questions() -> None:
    turns, broken = (1, 3, 1, 2, 1, 1, 1, 1, 1), (1,)
    orders = {}
    for seed in (None, 0, 1):
        questions = Questions(CONFIG, Records(turns, broken), 7)
        orders[seed] = question_ids(iter(questions.batches(2, order=seed)))
        assert question_ids(iter(questions.batches(2, order=seed))) == orders[seed]
        assert sorted(questions.plan(seed)) == questions.plan() == Questions(CONFIG, Records(turns), 7).plan()
    assert sorted(orders[0]) == sorted(orders[1]) == orders[None] and orders[0] != orders[1]


@pytest.mark.parametrize("portion", [0, 1, 3])
def test_a_portion_is_finished_before_the_next_one_is_looked_up(portion: int) -> None:
    events: list[str] = []
    chunks = Questions(CONFIG, Records((1,) * 9), 9).chunks(2, lambda _: events.append("look"), portion=portion)
    for _ in chunks:
        events.append("take")
    many = portion or 5
    parts = [min(many, 5 - start) for start in range(0, 5, many)]
    assert events == [name for part in parts for name in ["look"] * part + ["take"] * part]


def test_a_source_that_is_too_short_gives_what_it_has() -> None:
    assert question_ids(iter(Questions(CONFIG, Records((1, 1, 2)), 9).batches(4))) == ["0/0", "1/0", "2/0", "2/1"]
    assert question_ids(iter(Questions(CONFIG, Records((1, 1), broken=(0, 1)), 9).batches(4))) == []


def test_questions_that_do_not_fit_are_left_out_and_counted_once() -> None:
    skips, short = SkipLog(), tiny_config({"data.text_length": 24})
    batches = Questions(short, Records((1, 1, 1), long=(1,)), 3, skips=skips).batches(4)
    assert [question_ids(iter(batches)) for _ in range(2)] == [["0/0", "2/0"]] * 2
    assert skips.by_reason() == {"records/too_long": 1}
    (batch,) = batches
    assert batch.arrays["text_tokens"].shape[1] <= 24, "skipped questions make no batch longer"


def test_a_longer_question_in_place_of_an_unreadable_one_has_room() -> None:
    batches = list(Questions(CONFIG, Records((1, 1, 1), broken=(0,), long=(2,)), 2).batches(1))
    lengths = [batch.arrays["text_tokens"].shape[1] for batch in batches]
    assert [batch.ids for batch in batches] == [["1/0"], ["2/0"]] and lengths[0] < lengths[1]


def visual_lengths(questions: Questions, batch_size: int) -> list[int]:
    return [batch.arrays["visual_segments"].shape[1] for batch in questions.batches(batch_size)]


def test_rows_are_as_long_as_the_pictures_of_a_question_can_be() -> None:
    """Rows of training hold several samples; a question needs no more than its own pictures."""
    one, most = tiny_config({"data.visual_length": 500}), most_visual_tokens(architecture(CONFIG))
    assert visual_lengths(Questions(one, Records((1, 1, 1)), 3), 2) == [-(-most // 128) * 128] * 2
    assert visual_lengths(Questions(CONFIG, Records((1, 1, 1)), 3), 2) == [CONFIG.data.visual_length] * 2


def test_a_video_with_more_positions_than_a_picture_has_room() -> None:
    class Videos(Records):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            video = np.zeros((40, 48, 48, 3), np.uint8)
            return dataclasses.replace(sample, images=(video,)) if index == 1 else sample

    config = tiny_config({"data.visual_length": 500, "data.tiles": 40})
    assert visual_lengths(Questions(config, Videos((1, 1, 1, 1)), 4), 1) == [128, 500, 500, 500]


def test_no_picture_is_opened_to_plan_and_few_ahead_of_their_batch() -> None:
    source = Records((1,) * 200)
    questions = Questions(CONFIG, source, 200)
    assert len(questions.plan()) == 200 and source.opened == []
    batches = iter(questions.batches(4))
    for number in range(10):
        next(batches)
        assert len(source.opened) <= 4 * (number + 1) + 2 * 4 + 2 * READ_THREADS
    batches.close()


def test_one_picture_is_read_once_for_its_questions_nearly() -> None:
    source = Records((8,) * 10)
    assert len(question_ids(iter(Questions(CONFIG, source, 80).batches(8)))) == 80
    assert len(source.opened) <= 10 * READ_THREADS < 80 and RECENT >= 2


def test_the_outline_of_a_record_opens_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    talk = '[{"from": "human", "value": "<image><image>What?"}, {"from": "gpt", "value": "that"}]'
    records = f'[{{"id": 1, "image": ["a.png", "gone.png"], "conversations": {talk}}}, {{"id": 2}}]'
    (tmp_path / "set.json").write_text(records)
    source = LlavaSource(tmp_path / "set.json", tmp_path, max_image_pixels=100)
    outlined = outline(source, 0)
    assert outlined.images == (NO_PICTURE, NO_PICTURE) and outlined.turns[0].answer == "that"
    with pytest.raises(SkipSample, match="missing_file"):
        source[0]
    with pytest.raises(SkipSample, match="empty_conversation"):
        outline(source, 1)


def test_text_is_counted_as_it_is_encoded() -> None:
    tokenizer, arch = testing.almanac_tokenizer(), testing.tiny_architecture()
    pictures = (np.zeros((8, 8, 3), np.uint8),) * 2
    for turns in ((Turn("Which letter?", "A"),), (Turn("<image>\nA?", "B"), Turn("<image> C?", "D E"))):
        sample = Sample("", pictures[: len(turns)], turns, "")
        for system in (None, "You are"):
            actual = encode_example(sample, tokenizer, arch, system=system).size.text
            assert count_text(sample, tokenizer, system) == actual
