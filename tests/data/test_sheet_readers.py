"""Everything that reads a source takes sheets: the stream, packing, questions, the check, the preview."""

from functools import partial

import numpy as np
import pytest

from tests.data.test_sheets import sample
from tests.data.test_tiles import picture
from visor_jax.config import Config, architecture, as_config
from visor_jax.data.check_records import RecordChecker
from visor_jax.data.collate import RowShape
from visor_jax.data.from_config import make_tokenizer, sample_encoder, training_row_shape
from visor_jax.data.packing import PoolShape
from visor_jax.data.pipeline import ExampleStream, make_pipeline
from visor_jax.data.pools import PoolSettings, make_packed_pipeline
from visor_jax.data.preview_tokens import in_its_window
from visor_jax.data.questions import Place, Questions
from visor_jax.data.sample import Part, Sheet
from visor_jax.data.source_kind import as_records
from visor_jax.testing import tiny_config
from visor_jax.train.objectives.answers import one_per_row


class Sheets:
    """Every third record is a sheet of two small pictures, one is a whole picture, one a sheet that does not fit."""

    name = "sheets"

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        if index >= len(self):
            raise IndexError(index)
        small = sample(10 * index, 1, 2, (0, 1), turns=2), sample(10 * index + 1, 2, 2, (2, 2))
        broken = small[0], sample(10 * index + 1, 1, 3, (0, 2))
        return (Sheet(small), sample(10 * index, 4, 4, None), Sheet(broken))[index % 3]


@pytest.fixture(scope="module")
def config() -> Config:
    fields = {"vision.tile_size": 16, "vision.patch_size": 4, "anyres.standardize": True, "anyres.pinpoints": ""}
    data = {"data.small_pictures": True, "data.visual_length": 24, "data.text_length": 96, "data.tiles": 1}
    return as_config(tiny_config({**{f"model.{name}": value for name, value in fields.items()}, **data}))


def stream(config: Config) -> ExampleStream:
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    return ExampleStream([Part(Sheets(), shuffle=False)], encode, seed=0)


def test_a_row_of_the_stream_holds_the_samples_of_a_sheet(config: Config) -> None:
    arch = architecture(config)
    example, tally = stream(config).tallied(2)
    assert tally.tried > 1 and {skip.reason for skip in tally.skips} == {"small_picture"}
    assert example.id.startswith("s")
    collate = partial(one_per_row, training_row_shape(config), arch, 0, independent_turns=False)
    with make_pipeline(stream(config), collate, batch_size=2) as batches:
        batch = next(batches)
    assert batch.ids == ["s0", "s1", "s10"]
    assert [len(row) for row in batch.contents] == [2, 1] and [len(row) for row in batch.tasks] == [3, 1]
    assert batch.arrays["tile_segments"][:, 0].tolist() == [[1, 1, 2, 2, 2, 2] + [0] * 10, [1] * 16]


def test_packed_rows_hold_several_sheets(config: Config) -> None:
    arch, settings = architecture(config), PoolSettings(PoolShape(1, 4, 60, 300), num_pools=1, window=4)
    with make_packed_pipeline(stream(config), arch, settings) as batches:
        batch = next(batches)
    arrays = batch.arrays
    assert len(batch.ids) == arrays["text_segments"].max() == arrays["visual_segments"].max() > 3
    assert arrays["tile_segments"].shape == (1, 4, 16)
    read = arrays["visual_gather"][arrays["visual_weights"] > 0]
    patches = read[read < 4 * 16]
    assert len({*patches.tolist()}) == len(patches) and (arrays["tile_segments"].reshape(-1)[patches] > 0).all()


def test_questions_of_a_sheet_are_asked_one_by_one(config: Config) -> None:
    questions = Questions(config, Sheets(), 4)
    assert questions.plan() == [Place(0, 0), Place(0, 1), Place(0, 2), Place(1, 0)]
    assert [questions.sample_id(place) for place in questions.plan()] == ["s0", "s0", "s1", "s10"]
    third = questions.find("0/2")
    assert third.id == "0/2" and third.origin == (2, 2) and third.turns[0].answer == "1"
    batch = next(iter(questions.batches(4)))
    assert (batch.arrays["tile_segments"] > 0).sum(axis=(1, 2)).tolist() == [2, 2, 4, 16]
    assert batch.arrays["tile_positions"][2, 0, :4].tolist() == [10, 11, 14, 15]
    assert all(len(row) == 1 for row in batch.contents)


def test_the_check_counts_sheets(config: Config) -> None:
    findings = RecordChecker(config, "train", as_records(Sheets(), "train"), listing=True).check(range(6))
    assert (findings.tried["train"], findings.usable["train"]) == (6, 4)
    assert {reason: named.count for reason, named in findings.skipped.items()} == {"small_picture": 2}
    assert [entry["pictures"] for entry in findings.entries if entry["usable"]] == [2, 1, 2, 1]


def test_the_check_says_how_large_a_sheet_is(config: Config) -> None:
    checker = RecordChecker(config, "train", as_records(Sheets(), "train"), listing=False)
    checker._encode = sample_encoder(config, make_tokenizer(config), RowShape(1, 6, 96))
    assert {reason: named.count for reason, named in checker.check([0]).skipped.items()} == {"too_long": 1}


def test_the_preview_shows_a_small_picture_where_it_stands(config: Config) -> None:
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    shown = in_its_window(encode(sample(1, 2, 2, (2, 1))), architecture(config))
    expected = np.zeros((16, 16, 3), np.uint8)
    expected[8:16, 4:12] = picture(8, 8, 1)
    np.testing.assert_array_equal(shown.tiles[0], expected)
    assert shown.visual_gather[:, 0].tolist() == [9, 10, 13, 14, 16]
