"""Examples of benchmarks: which answers are shown, and the maps of what the model looked at for its own answer."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.evaluate.benchmarks import hub_tables
from visor_jax import testing
from visor_jax.budget import Budget, Plan
from visor_jax.config import architecture, as_config
from visor_jax.data.questions import Place, Questions
from visor_jax.data.sample import Sample, SkipSample, Turn
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.evaluate.benchmarks import named_benchmark
from visor_jax.evaluate.benchmarks.examples import maps_of, write_examples
from visor_jax.evaluate.benchmarks.folder import Table
from visor_jax.evaluate.relevance import cross_attention_maps, patch_relevance
from visor_jax.testing import tiny_config

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = as_config(tiny_config({"data.text_length": 128}))
ARCH = architecture(CONFIG)
DOCVQA = named_benchmark("docvqa")


class OneSample:
    """A source of one sample."""

    name = "one"

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return [self.sample][index]


@pytest.fixture(scope="module")
def model() -> Any:
    params = jax.tree.map(jnp.asarray, testing.random_params(ARCH))
    tokenizer = load_tokenizer(CONFIG.tokenizer.path)
    return SimpleNamespace(arch=ARCH, params=params, tokenizer=tokenizer, system=CONFIG.tokenizer.system or None)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    hub_tables.write("docvqa", tmp_path / "hub", hub_tables.rows_of("docvqa", 5))
    return Table(DOCVQA, str(tmp_path / "hub"))


def line(table: Table, row: int, answer: str, score: float, route: str = "full") -> dict[str, Any]:
    item = table.items[row]
    common = {"row": row, "budget": "auto", "route": route, "problem": "", "decoder_flops": 1e6}
    shown = {"question": item.prompt, "reference": item.reference, "answer": answer, "scores": {"anls": score}}
    return {**common, **shown}


@pytest.mark.parametrize("route", ["empty", "full"])
def test_maps_are_those_of_a_question_with_this_answer(model: Any, table: Table, route: str) -> None:
    """They equal the maps of a record whose reference is the model's answer."""
    found = maps_of(model, table.pictures(0), line(table, 0, "seven", 0.0, route))
    turn = Turn(f"<image>\n{table.items[0].prompt}", "seven")
    questions = Questions(CONFIG, OneSample(Sample("0", tuple(table.pictures(0)), (turn,), "one")), 1)
    batch = questions.batch([questions.example(Place(0, 0))], 1)
    bits = Budget.parse(route).resolve(ARCH.num_slots)
    relevance = patch_relevance(model.params, batch, bits, ARCH)
    layers = cross_attention_maps(model.params, batch, bits, ARCH)
    assert [one["layer"] for one in found["attention"]] == [one.layer for one in layers] == list(Plan.of(ARCH).cross)
    assert relevance is not None
    np.testing.assert_allclose(found["relevance"], 100 * np.asarray(relevance), atol=1)
    for one, expected in zip(found["attention"], layers, strict=True):
        np.testing.assert_allclose(one["patches"], 100 * expected.patches, atol=1)
    assert found != maps_of(model, table.pictures(0), line(table, 0, "red", 0.0, route)), "of another answer"


def test_the_first_right_and_the_first_wrong_example_have_maps(model: Any, table: Table, tmp_path: Path) -> None:
    """An answer without text has none, and leaves them to the next one."""
    answers = [("", 0.0), ("No. 1", 1.0), ("nine", 0.25), ("No. 3", 0.5), ("ten", 0.0)]
    examples = write_examples(
        tmp_path, model, table, [line(table, row, *answer) for row, answer in enumerate(answers)], "auto"
    )
    assert [example["right"] for example in examples] == [False, True, False, True, False]
    assert ["attention" in example for example in examples] == [False, True, True, False, False]
    for example in examples:
        with Image.open(tmp_path / example["image"]) as picture:
            assert picture.size == (64, 48)


def test_examples_without_maps(model: Any, table: Table) -> None:
    """Of several pictures or none, and of an answer that holds a picture's marker."""
    picture, asked = table.pictures(0), line(table, 0, "seven", 0.0)
    assert maps_of(model, [], asked) == maps_of(model, picture * 2, asked) == {}
    assert maps_of(model, picture, {**asked, "answer": "an <image>"}) == {}


def test_a_picture_that_cannot_be_read_again_is_left_out(
    model: Any, table: Table, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers of a run that was killed are kept; its pictures may have been damaged since."""
    monkeypatch.setattr("visor_jax.evaluate.benchmarks.folder.decode_embedded", unreadable)
    with caplog.at_level(logging.WARNING):
        (example,) = write_examples(tmp_path, model, table, [line(table, 0, "seven", 0.0)], "auto")
    assert example["image"] == "" and "attention" not in example and "its example has no picture" in caplog.text


def unreadable(*arguments: Any) -> Any:
    raise SkipSample("broken_image", "damaged")
