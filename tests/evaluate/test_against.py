"""Comparisons with another run's answers: pairing, budgets, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.benchmarks import hub_tables
from visor_jax.errors import RequestError
from visor_jax.evaluate.against import OtherAnswers, open_answers, open_predictions
from visor_jax.evaluate.benchmarks import named_benchmark
from visor_jax.evaluate.benchmarks.folder import Table
from visor_jax.evaluate.benchmarks.predictions import Opened, common, pack
from visor_jax.evaluate.tables import print_against

LEVELS = {"color": "easy", "value": "hard", "cell": "hard"}
ANSWERS = {
    "ids": ["0/0", "0/1", "1/0", "1/1"],
    "tasks": ["color", "value", "cell", "value"],
    "digests": ["aa", "bb", "cc", "dd"],
    "right": {"full": "1101", "empty": "1000"},
}


def written(folder: Path, content: Any, name: str = "test.questions.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(content))
    return path


# --- own data ---------------------------------------------------------------------------------------------------------


def test_answers_are_paired_by_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In another order, with further questions; a level is the mean over its tasks."""
    order = [3, 0, 2, 1]
    theirs = {name: [*(ANSWERS[name][i] for i in order), "new"] for name in ("ids", "tasks", "digests")}
    written(tmp_path / "B" / "eval", {"budgets": {**theirs, "right": {"full": "01001"}}})
    found = open_answers(str(tmp_path / "B"), "", "test").compared(ANSWERS, LEVELS)
    full, empty = found["budgets"]["full"], found["budgets"]["empty"]
    assert full["budget"] == empty["budget"] == "full", "a single budget is compared with all"
    assert full["tasks"]["value"]["accuracy"] == 1 and full["tasks"]["value"]["other"] == 0
    assert full["tasks"]["color"]["difference"] == 0 == full["tasks"]["cell"]["difference"]
    assert full["hard"]["difference"] == 0.5 and full["hard"]["questions"] == 3
    assert empty["tasks"]["value"]["difference"] == 0 and empty["easy"]["accuracy"] == 1
    print_against({"against": found})
    output = capsys.readouterr().out
    assert "+50.0" in output and str(tmp_path / "B" / "eval" / "test.questions.json") in output.replace("\n", "")


def test_which_budget_is_compared(tmp_path: Path) -> None:
    path = written(tmp_path, {"budgets": ANSWERS})
    assert OtherAnswers(path).paired_with(["empty", "full"]) == {"empty": "empty", "full": "full"}
    assert OtherAnswers(path, "full").paired_with(["empty", "0b10"]) == {"empty": "full", "0b10": "full"}
    with pytest.raises(RequestError, match=r"under full, empty, not under auto; expected --against-budget=NAME"):
        OtherAnswers(path).paired_with(["full", "auto"])
    with pytest.raises(RequestError, match=r"--against-budget=ful: .*has no answers under it; .*full"):
        OtherAnswers(path, "ful")


def test_the_places_of_another_runs_answers(tmp_path: Path) -> None:
    path = written(tmp_path / "B" / "eval" / "of_mine", {"budgets": ANSWERS})
    for against in (tmp_path / "B", path.parent, path):
        assert open_answers(str(against), "of_mine", "test").path == path
    with pytest.raises(RequestError, match=r"has no eval/test.questions.json; expected a workdir in which `visor eval"):
        open_answers(str(tmp_path / "B"), "", "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"holds \[\]; expected an object"),
        ({"budgets": {name: value for name, value in ANSWERS.items() if name != "digests"}}, "evaluate that run again"),
        ({"budgets": {**ANSWERS, "tasks": None}}, "field budgets.tasks is .*; expected a list"),
        ({"budgets": {**ANSWERS, "right": {"full": "1"}}}, "as many digests and right as ids, 4"),
    ],
)
def test_damaged_answers_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        OtherAnswers(written(tmp_path, content))


@pytest.mark.parametrize("change", [{"ids": ["9/9", "0/1", "1/0", "1/1"]}, {"digests": ["ff", "bb", "cc", "dd"]}])
def test_other_questions_are_refused(tmp_path: Path, change: dict[str, list[str]]) -> None:
    other = OtherAnswers(written(tmp_path, {"budgets": {**ANSWERS, **change}}))
    with pytest.raises(RequestError, match=r"no answer to 1 of 4 questions, such as '0/0'.*same data, split"):
        other.compared(ANSWERS, LEVELS)


def test_questions_are_compared_before_they_are_answered(tmp_path: Path) -> None:
    """One that the other run could not read is missing there, and that alone refuses nothing."""
    other, asked = OtherAnswers(written(tmp_path, {"budgets": ANSWERS})), {"0/0": "aa", "1/1": "dd", "2/0": "ee"}
    other.check_questions(asked)
    with pytest.raises(RequestError, match=r"no or another question in 1 of 3 places, such as '1/1'"):
        other.check_questions(asked | {"1/1": "ff"})
    with pytest.raises(RequestError, match=r"no or another question in 1 of 1 places, such as '7/0'"):
        other.check_questions({"7/0": "aa"})


# --- benchmarks -------------------------------------------------------------------------------------------------------


def table_of(name: str, folder: Path, count: int) -> Table:
    hub_tables.write(name, folder, hub_tables.rows_of(name, count))
    return Table(named_benchmark(name), str(folder))


def lines_of(table: Table, answers: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Returns the predictions of answers, by budget."""
    lines = []
    for row, item in enumerate(table.items):
        for budget, texts in answers.items():
            scores = table.benchmark.score(texts[row], item)
            lines.append({**common(Opened(row, item, []), budget), "answer": texts[row], "scores": scores})
    return lines


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return table_of("docvqa", tmp_path / "hub", 6)


def test_predictions_are_compared_by_the_headline(table: Table, tmp_path: Path) -> None:
    right, none = [item.reference[0] for item in table.items], [""] * 6
    path = tmp_path / "B" / "eval" / "of_docvqa" / "validation.predictions.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pack(lines_of(table, {"dense": [*right[:3], *none[:3]]})))
    other = open_predictions(str(tmp_path / "B"), [table], None)["docvqa"]
    found = {
        name: one.figures() for name, one in other.compared(lines_of(table, {"full": right, "0b01": none})).items()
    }
    assert (found["full"]["accuracy"], found["full"]["other"], found["full"]["questions"]) == (1.0, 0.5, 6)
    assert found["0b01"]["difference"] == -0.5 and found["0b01"]["low"] <= -0.5 <= found["0b01"]["high"]
    first = open_predictions(str(path), [table], 3)["docvqa"]  # a limit: the first questions only
    mine = [line for line in lines_of(table, {"full": right}) if line["row"] < 3]
    assert first.compared(mine)["full"].figures()["difference"] == 0


def test_pictures_of_mme_are_the_pairs(tmp_path: Path) -> None:
    table = table_of("mme", tmp_path / "hub", 8)
    right = [str(item.reference) for item in table.items]
    (tmp_path / "B.jsonl").write_bytes(pack(lines_of(table, {"full": ["?", *right[1:]]})))
    found = open_predictions(str(tmp_path / "B.jsonl"), [table], None)["mme"].compared(lines_of(table, {"full": right}))
    lines = {"mine": lines_of(table, {"full": right}), "theirs": lines_of(table, {"full": ["?", *right[1:]]})}
    accuracy = {name: table.benchmark.accuracy(table.benchmark.report(of_one)) for name, of_one in lines.items()}
    assert found["full"].first == pytest.approx(accuracy["mine"]) and accuracy["theirs"] < accuracy["mine"]
    assert found["full"].second == pytest.approx(accuracy["theirs"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "predictions of 5 of the first 6 questions under budget full"),
        (lambda lines: [], "has no prediction"),
        (lambda lines: [{**lines[0], "question": "?"}, *lines[1:]], r"row 0: question is .\?. there and .What is"),
        (lambda lines: [{**lines[0], "reference": ["1"]}, *lines[1:]], "row 0: reference is"),
        (
            lambda lines: [{**lines[0], "scores": {"anls": 2}}, *lines[1:]],
            r"scores.anls is 2; expected a number from 0",
        ),
    ],
)
def test_predictions_that_do_not_fit_are_refused(
    table: Table, tmp_path: Path, change: Callable[[list[Any]], list[Any]], message: str
) -> None:
    path = tmp_path / "B.jsonl"
    path.write_bytes(pack(change(lines_of(table, {"full": [""] * 6}))))
    with pytest.raises(RequestError, match=message):
        open_predictions(str(path), [table], None)
    path.write_text("no JSON")
    with pytest.raises(RequestError, match=r"B.jsonl: .*; expected lines of JSON"):
        open_predictions(str(path), [table], None)
