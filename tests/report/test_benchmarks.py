"""Public benchmarks on the page: reported numbers, costs, comparison, problems; and the caveats that follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.report.conftest import benchmark_result, questions_result, user_benchmark
from tests.report.parsed import report_of
from visor_jax.files.read_write import write_json
from visor_jax.report.caveats import caveats
from visor_jax.report.facts import read_facts
from visor_jax.report.numbers import DASH
from visor_jax.report.results import mean_of_benchmarks
from visor_jax.workdir.folder import Workdir


def test_a_run_with_benchmarks_only_has_a_page(benchmarks_only: Path) -> None:
    html, page = report_of(benchmarks_only)
    header, part = page.section("header"), page.section("benchmarks")
    assert "docvqa, validation split" in header and "Evaluated on benchmarks only" in header and "50.0 %" in header
    assert "docvqa 50.0" in page.section("accuracy") and "mean of hard tasks 50.0" in page.section("accuracy")
    assert "12 questions of lmms-lab-encoder/DocVQA, validation" in part and "12 of 2374 questions" in part
    assert "2 questions could not be asked (embedded) and count as wrong" in part
    # The headline with its interval, the other numbers, and the costs beside them.
    assert "anls 0.500 ±0.100" in part and "mme_perception_score 1250.5 (800.0 to 1200.0)" in part
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
    assert "Headlines as shares of their maximum" in part and "mme 62.5 (40.0 to 60.0)" in part
    assert "mean of easy benchmarks" in part and "mme" not in page.section("accuracy")


def test_a_benchmark_of_a_users_file_is_shown_like_the_others(full_run: Path) -> None:
    """With the name of the file, the number of questions, interval, costs and caveat; what the file says is escaped."""
    for name, result in (("mme", benchmark_result), ("receipts", user_benchmark)):
        folder = full_run / "eval" / f"of_{name}"
        write_json(folder / "test.json", result(folder, name))
    html, page = report_of(full_run)
    part = page.section("benchmarks")
    assert "12 questions of our-shop/<i>receipts</i>, test, as my <receipts>.py defines it" in part
    assert (
        "receipts (hard)" in part and "anls 0.500 ±0.100" in part and "decoder, MFLOP 13.00 31.00 20.00 70.20" in part
    )
    assert part.index("mme (easy)") < part.index("receipts (hard)"), "public ones come first"
    assert "mean of hard benchmarks 50.0" in part, "its level says in which average it counts"
    assert "receipts: is defined by my <receipts>.py, not by this package" in page.section("caveats")
    assert "<i>" not in html and "<receipts>" not in html
    # The example's maps: over the picture, and one for each cross-attention layer.
    assert "the answer depends on" in part and "layer 1: 50.0 % here" in part and "layer 4: 50.0 % here" in part
    assert "Maps are of the answer that the model gave" in part and "for every" not in part


def test_files_of_questions_are_shown_beside_the_runs_own(full_run: Path) -> None:
    folder = full_run / "eval" / "of_mine"
    write_json(folder / "test.json", questions_result(folder))
    html, page = report_of(full_run)
    part = page.section("benchmarks")
    assert "Not run: no benchmark was asked." in part and "Other questions" in part
    assert "1000 questions of the file mine <1>.json, test split; the model of stage policy." in part
    assert "2 records could not be used (missing_file)." in part and "20 example answers of mine <1>.json" in part
    table = "right answers, % empty 0b100 0b110 full auto dense"
    assert (
        table in part
        and "digit 99.0 (85.0 to 95.0)" in part
        and "mean of hard tasks" in part
        and "saving, decoder" in part
    )
    said = page.section("caveats")
    assert "mine <1>.json: 2 records could not be used: 2 missing_file." in said
    assert "mine <1>.json: 1000 questions of 10 tasks, 100 per task on average; the widest interval" in said
    assert "<1>" not in html and "1000 questions." in page.section("header"), "the page is of the run's own questions"


def test_tasks_without_a_level_have_one_mean(full_run: Path) -> None:
    folder = full_run / "eval" / "of_mine"
    value = questions_result(folder) | {"levels": {}}
    for row in value["budgets"].values():
        row |= {"easy": None, "hard": None, "tasks": {"a": 0.25, "b": 0.75}}
    write_json(folder / "test.json", value)
    part = report_of(full_run)[1].section("benchmarks")
    assert "mean of tasks 50.0 50.0 50.0 50.0 50.0 not run" in part and "mean of easy" not in part


def test_a_dense_model_that_answered_other_questions_is_shown(full_run: Path) -> None:
    folder = full_run / "eval" / "of_mine"
    value = questions_result(folder)
    first = next(iter(value["budgets"].values()))
    value["dense"] |= {"tasks": dict.fromkeys(first["tasks"], 0.875), "easy": 0.875, "hard": 0.875}
    value["intervals"]["dense"] = {"tasks": {}}
    write_json(folder / "test.json", value)
    part = report_of(full_run)[1].section("benchmarks")
    assert part.count("87.5") == len(first["tasks"]) + 2 and "not run" not in part.rpartition("Other questions")[2]


def test_a_run_with_other_questions_only_has_a_page(tmp_path: Path) -> None:
    """Its first figures are of these; a whole result comes before one of an earlier stage."""
    for name, place in (("first", "partial"), ("second", "")):
        folder = tmp_path / "eval" / f"of_{name}" / place
        write_json(folder / "validation.json", questions_result(folder, "validation") | {"file": f"{name}.json"})
    _, page = report_of(tmp_path)
    assert "llava, validation split, 1000 questions." in page.section("header")
    assert len(page.pictures("png")) > 20, "the examples' pictures"
    part = page.section("benchmarks")
    assert "first.json" in part and "Not a whole result" in part and "second.json" not in part
    assert "first.json: of chosen budgets, an earlier stage" in page.section("caveats")


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
        "Of the test split 3 records could not be used: 3 missing_file.",
        "One run with seed 0.",
        "local changes",
        "No time was measured",
        "accuracy is not known.",
        "With a gray picture, auto still answers 25.0 % of easy tasks, 12.5 % of hard tasks right",
        "Stage full is not complete.",
        "had a loss that was not finite",
    ):
        assert text in said, text
