"""Questions of benchmarks with a model's own answers, as samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.evaluate.benchmarks import hub_tables
from visor_jax.data.collate import encode_example
from visor_jax.data.sample import NO_PICTURE, Sample, outline
from visor_jax.errors import RequestError
from visor_jax.evaluate.benchmarks import named_benchmark, samples
from visor_jax.evaluate.benchmarks.folder import Table
from visor_jax.evaluate.benchmarks.samples import AnsweredBenchmarks
from visor_jax.generate.request import prompt_of
from visor_jax.testing import almanac_tokenizer, tiny_architecture

MODEL: Any = SimpleNamespace(arch=tiny_architecture(4, plan="dense"))


def tables(tmp_path: Path, *names: str, count: int = 4) -> list[Table]:
    for name in names:
        folder = tmp_path / named_benchmark(name).repo.rpartition("/")[2]
        hub_tables.write(name, folder, hub_tables.rows_of(name, count))
    return [Table(named_benchmark(name), str(tmp_path)) for name in names]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], str]:
    """What the stand-in of a model answers, by benchmark and row; "1" elsewhere."""
    said: dict[tuple[str, int], str] = {}

    def answered(benchmark: Any, model: Any, budgets: Mapping[str, Any], opened: Sequence[Any]) -> list[dict[str, Any]]:
        assert budgets == {"dense": ()}
        lines = []
        for question in opened:
            answer = "" if question.problem else said.get((benchmark.name, question.row), "1")
            scores = benchmark.score(answer, question.item)
            line = {"row": question.row, "question": question.item.prompt, "answer": answer, "scores": scores}
            lines.append({**line, "complete": not answer.endswith("...")})
        return lines

    monkeypatch.setattr(samples, "answered", answered)
    return said


def test_the_models_answers_are_targets_with_the_benchmarks_scores(
    tmp_path: Path, answers: dict[tuple[str, int], str]
) -> None:
    answers |= {("docvqa", 0): "0", ("mme", 0): "Yes.", ("mme", 1): "  "}
    opened = tables(tmp_path, "docvqa", "mme")
    source = AnsweredBenchmarks(opened, MODEL, limit=3, batch_size=2)
    assert source.levels == {"docvqa": "hard", "mme": "easy"}
    assert [sample.id for sample in map(source.__getitem__, range(len(source)))] == [
        "docvqa/0", "docvqa/1", "docvqa/2", "mme/0", "mme/2",
    ]  # fmt: skip
    first, later = source[0], source[3]
    assert (first.turns[0].task, first.turns[0].answer, first.level) == ("docvqa", "0", "hard")
    assert (later.turns[0].task, later.turns[0].answer) == ("mme", "Yes.")
    benchmark = named_benchmark("docvqa")
    expected = [benchmark.score(answer, opened[0].items[row])["anls"] for row, answer in enumerate(["0", "1", "1"])]
    assert source.scores[:3] == expected and expected[0] == 1.0


@pytest.mark.parametrize("name", ["docvqa", "seedbench", "mmmu"])
def test_a_sample_is_asked_as_the_model_is(tmp_path: Path, answers: dict[tuple[str, int], str], name: str) -> None:
    """Its token ids begin with those of the prompt of `Visor.answer`, also with several pictures."""
    [table] = tables(tmp_path, name)
    source, tokenizer = AnsweredBenchmarks([table], MODEL, limit=4, batch_size=8), almanac_tokenizer()
    for index in range(len(source)):
        sample = source[index]
        found = encode_example(sample, tokenizer, MODEL.arch)
        prompt = prompt_of(list(sample.images), table.items[index].prompt, tokenizer, MODEL.arch, None)
        length = len(prompt.text_tokens)
        np.testing.assert_array_equal(found.text_tokens[:length], prompt.text_tokens)
        np.testing.assert_array_equal(found.text_positions[:length], prompt.text_positions)
        assert not found.loss_mask[:length].any() and found.loss_mask[length]
        short = outline(source, index)
        assert isinstance(short, Sample)
        assert [turn.question for turn in short.turns] == [turn.question for turn in sample.turns]
        assert len(short.images) == len(sample.images)
        assert all(x is NO_PICTURE for x in short.images) or name == "seedbench"


def test_answers_that_were_cut_off_are_left_out(
    tmp_path: Path, answers: dict[tuple[str, int], str], caplog: pytest.LogCaptureFixture
) -> None:
    """No pass could end its answer there, so even the unchanged model would be wrong."""
    answers |= {("docvqa", 1): "0 0 0 ...", ("docvqa", 2): ""}
    source = AnsweredBenchmarks(tables(tmp_path, "docvqa"), MODEL, limit=4, batch_size=8)
    assert [source[index].id for index in range(len(source))] == ["docvqa/0", "docvqa/3"]
    assert "1 questions have no answer" in caplog.text and "1 questions have an answer that was cut off" in caplog.text


def test_a_model_that_answers_nothing_is_refused(tmp_path: Path, answers: dict[tuple[str, int], str]) -> None:
    answers |= {("docvqa", row): "" for row in range(4)}
    with pytest.raises(RequestError, match="--benchmark=docvqa: the model answers none of the questions"):
        AnsweredBenchmarks(tables(tmp_path, "docvqa"), MODEL, limit=4, batch_size=8)
