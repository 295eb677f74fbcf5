"""Public benchmarks on the page: reported numbers, costs, comparison, problems; and the caveats that follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.report.conftest import benchmark_result
from tests.report.parsed import report_of
from visor_jax.errors import RequestError
from visor_jax.files.read_write import write_json
from visor_jax.report.caveats import caveats
from visor_jax.report.facts import mean_of_benchmarks, read_facts
from visor_jax.report.numbers import DASH
from visor_jax.report.page import write_report
from visor_jax.workdir.folder import Workdir


def test_a_run_with_benchmarks_only_has_a_page(benchmarks_only: Path) -> None:
    html, page = report_of(benchmarks_only)
    header, part = page.section("header"), page.section("benchmarks")
    assert "docvqa, validation split" in header and "public benchmarks only" in header and "50.0 %" in header
    assert "docvqa 50.0" in page.section("accuracy") and "mean of hard tasks 50.0" in page.section("accuracy")
    assert "12 questions of lmms-lab-encoder/DocVQA, validation" in part and "12 of 2374 questions" in part
    assert "2 questions could not be asked (embedded) and count as wrong" in part
    # The headline with its interval, the other numbers, and the costs beside them.
    assert "anls 0.500 ±0.100" in part and "mme_perception_score 1250.5 ±200.0" in part
    assert "4 more numbers of mme" in part and "mme_cognition_score 300.0" in part
    for text in (
        "decoder, MFLOP 13.00 31.00 20.00 70.20",
        "cache after the prompt, MB 2.00",
        f"time to the first token, ms 12.5 (10.0{DASH}20.0)",
        f"new tokens per second 50.0 (40.0{DASH}60.0)",
        "65 visual and 11 text tokens",
        "chosen by auto, % of questions 25.0 75.0",
        "other/validation.predictions.jsonl",
        "full dense docvqa 50.0 75.0 -25.0 (-40.0 to -10.0) 0.0120*",
    ):
        assert text in part, text
    assert (
        "other/validation.predictions.jsonl" in part
        and "full dense docvqa 50.0 75.0 -25.0 (-40.0 to -10.0) 0.0120*" in part
    )
    assert "✗ wrong: red expected: blue | navy · score 0.25" in part and len(page.pictures("png")) == 2
    assert "<script" not in html and "<script>What?</script>" in part and "<b>Which?</b>" in part
    assert len({id for _, given in page.elements if (id := given.get("id"))}) == 11


def test_benchmarks_beside_own_data_have_an_overview(full_run: Path) -> None:
    for metrics in full_run.glob("*/metrics.jsonl"):
        shutil.rmtree(metrics.parent)
    folder = full_run / "eval" / "of_mme"
    write_json(folder / "test.json", benchmark_result(folder, "mme"))
    _, page = report_of(full_run)
    assert "almanac, test split, 1000 questions" in page.section("header")
    part = page.section("benchmarks")
    assert "Headlines as shares of their maximum" in part and "mme 62.5 ±10.0" in part
    assert "mean of easy benchmarks" in part and "mme" not in page.section("accuracy")


def test_means_are_of_complete_benchmarks_under_their_common_budgets(benchmarks_only: Path) -> None:
    facts = read_facts(Workdir(benchmarks_only))
    assert [(one.name, one.partial) for one in facts.benchmarks] == [("docvqa", False), ("mme", True)]
    assert facts.evaluation["benchmark"] == "docvqa" and not facts.on_own_data
    folder = benchmarks_only / "eval" / "of_mme"
    whole = benchmark_result(folder, "mme")
    del whole["budgets"]["empty"]
    write_json(folder / "test.json", whole)
    facts = read_facts(Workdir(benchmarks_only))
    assert not facts.benchmarks[1].partial, "a complete result comes first"
    assert list(facts.evaluation["budgets"]) == ["full", "auto"] and facts.evaluation["levels"].keys() == {
        "docvqa",
        "mme",
    }
    whole["budgets"] = {"0b100": whole["budgets"]["full"]}
    write_json(folder / "test.json", whole)
    assert mean_of_benchmarks(read_facts(Workdir(benchmarks_only)).benchmarks)["benchmark"] == "docvqa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": None}, r"field questions is null; expected an object"),
        ({"budgets": {}}, r"field budgets is empty"),
        ({"budgets": {"full": {"tasks": {}}}}, r"field budgets\.full\.metrics is missing"),
        ({"timing": {"device": 3}}, r"field timing\.device is 3; expected text"),
        ({"against": {"files": "x"}}, r"field against\.files is \"?'?x"),
    ],
)
def test_damaged_results_are_named(benchmarks_only: Path, change: dict, message: str) -> None:
    path = benchmarks_only / "eval" / "of_docvqa" / "validation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RequestError, match=message) as caught:
        write_report(Workdir(benchmarks_only))
    assert str(path) in str(caught.value)


def test_caveats_follow_from_what_is_stored(benchmarks_only: Path) -> None:
    said = " ".join(caveats(read_facts(Workdir(benchmarks_only))))
    assert "no config.json" in said and "mme: only the first 12 of 2374 questions were asked." in said
    assert "docvqa: 2 questions could not be asked and count as wrong: 2 embedded." in said
    assert "Times were measured on cpu" in said and "gray" not in said and "except where another run" in said


def test_caveats_of_own_data(full_run: Path) -> None:
    path = full_run / "eval" / "test.json"
    evaluation = json.loads(path.read_text())
    row = evaluation["budgets"]["auto"]
    evaluation |= {
        "blind": {"auto": row | {"easy": 0.25, "hard": 0.125}},
        "skipped": {"missing_file": 3},
        "stage": "policy",
    }
    evaluation["intervals"] = {"budgets": {"auto": {"tasks": {"bg": [0.9, 1.0], "far": [0.2, 0.5]}}}}
    write_json(path, evaluation)
    (full_run / "full" / "complete.json").unlink()
    said = " ".join(caveats(read_facts(Workdir(full_run))))
    for text in (
        "1000 questions of 10 tasks, 100 per task on average; the widest interval",
        "of a task under auto is ±15.0 points (far).",
        "3 records of the test split could not be used: 3 missing_file.",
        "One run with seed 0.",
        "local changes",
        "No time was measured",
        "accuracy is not known.",
        "With a gray picture, auto still answers 25.0 % of easy tasks, 12.5 % of hard tasks right",
        "Stage full is not complete.",
        "had a loss that was not finite",
    ):
        assert text in said, text
