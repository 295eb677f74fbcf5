"""Results that a page cannot show: damaged ones, those of another model, and results without their answers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.conftest import benchmark_result, questions_result, user_benchmark
from tests.report.parsed import report_of
from visor_jax.errors import RequestError
from visor_jax.files.read_write import write_json
from visor_jax.report.page import write_report
from visor_jax.workdir.folder import Workdir


def change_result(run: Path, change: dict[str, Any]) -> Path:
    path = run / "eval" / "of_docvqa" / "validation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": None}, "field questions is null; expected an object"),
        ({"budgets": {}}, "field budgets is empty"),
        ({"budgets": {"full": {"tasks": {}}}}, "field budgets.full.metrics is missing"),
        ({"timing": {"device": 3}}, "field timing.device is 3; expected text"),
        ({"against": {"files": "x"}}, 'field against.files is "x"'),
        ({"intervals": {"budgets": {}}}, "field budgets.empty: expected an accuracy of docvqa and its interval"),
        ({"intervals": {"budgets": {"full": {"tasks": {"docvqa": [0.5]}}}}}, "is [0.5]; expected two numbers"),
        ({"benchmark": "mme"}, "is of 'mme'; expected 'docvqa', as its folder is named"),
        ({"harness": None}, "field harness is null"),
    ],
)
def test_a_damaged_result_is_named_among_the_caveats(benchmarks_only: Path, change: dict, message: str) -> None:
    change_result(benchmarks_only, change)
    html, page = report_of(benchmarks_only)
    _, caveat = page.section("caveats").split("Not on this page: ")
    assert caveat.startswith("eval/of_docvqa/validation.json: ") and message in caveat
    assert "1 result is not shown" in page.section("benchmarks") and str(benchmarks_only) not in html
    assert "docvqa (hard)" not in page.section("benchmarks") and "mme (easy)" in page.section("benchmarks")


@pytest.mark.parametrize("content", [b"", b'{"problems": ', b"\xff\xfe", b"[]", b'{"problems": {}}', b"{}"])
def test_a_file_that_is_no_result_is_named(benchmarks_only: Path, content: bytes) -> None:
    (benchmarks_only / "eval" / "of_docvqa" / "validation.json").write_bytes(content)
    assert "Not on this page: eval/of_docvqa/validation.json: " in report_of(benchmarks_only)[1].section("caveats")


def test_the_partial_result_stands_in_for_a_damaged_whole_one(benchmarks_only: Path) -> None:
    path = change_result(benchmarks_only, {"budgets": {}})
    write_json(path.parent / "partial" / path.name, benchmark_result(path.parent / "partial", "docvqa"))
    _, page = report_of(benchmarks_only)
    assert "Not on this page: eval/of_docvqa/validation.json" in page.section("caveats")
    assert "docvqa (hard)" in page.section("benchmarks") and "docvqa: of chosen budgets" in page.section("caveats")


def test_a_page_needs_a_usable_result(tmp_path: Path) -> None:
    write_json(tmp_path / "eval" / "of_docvqa" / "validation.json", {"problems": {}})
    with pytest.raises(RequestError, match=r"no result of an evaluation can be used: eval/of_docvqa/validation\.json"):
        write_report(Workdir(tmp_path))


def test_results_of_another_model_are_named(full_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result records the model's fingerprint; the model that the stage has now is another one."""
    monkeypatch.setattr("visor_jax.workdir.folder.StageFolder.fingerprint", lambda stage: f"now of {stage.path.name}")
    for name, result, made_of in (
        ("mme", benchmark_result, {"model": "earlier"}),
        ("receipts", user_benchmark, {"model": "now of policy"}),
    ):
        folder = full_run / "eval" / f"of_{name}"
        write_json(folder / "test.json", result(folder, name) | made_of)
    for name, start in (("old", "earlier"), ("new", "now of policy")):
        folder = full_run / "eval" / f"of_{name}"
        identity = {"config": {}, "inputs": {"start": start}}
        write_json(folder / "test.json", questions_result(folder) | {"file": f"{name}.json", "identity": identity})
    _, page = report_of(full_run)
    said, part = page.section("caveats"), page.section("benchmarks")
    for name in ("mme", "old"):
        assert f"Not on this page: eval/of_{name}/test.json: is of another model than the one that stage policy" in said
    assert "2 results are not shown" in part and "receipts (hard)" in part and "new.json" in part
    assert "mme (easy)" not in part and "old.json" not in part


def test_a_users_benchmark_without_its_headline_is_named(full_run: Path) -> None:
    """As earlier versions wrote it: the file that defines the benchmark is not executed for the page."""
    folder = full_run / "eval" / "of_receipts"
    write_json(folder / "test.json", user_benchmark(folder) | {"headline": None})
    said = report_of(full_run)[1].section("caveats")
    assert "Not on this page: eval/of_receipts/test.json: has no level or headline of receipts" in said


@pytest.mark.parametrize("damage", ["", "missing", "changed"])
def test_answers_that_are_not_those_of_a_result_are_named(benchmarks_only: Path, damage: str) -> None:
    file = "validation.predictions.jsonl"
    record = {"file": file, "sha256": hashlib.sha256(b"answers\n").hexdigest()}
    path = change_result(benchmarks_only, {"answers": record})
    if damage != "missing":
        path.with_name(file).write_bytes(b"answers\n" if not damage else b"answ")
    _, page = report_of(benchmarks_only)
    said = page.section("caveats")
    assert ("eval/of_docvqa/validation.json: its answers, validation.predictions.jsonl, are missing" in said) == (
        damage == "missing"
    )
    assert ("validation.predictions.jsonl beside it was changed or is of another" in said) == (damage == "changed")
    assert "docvqa (hard)" in page.section("benchmarks")


def test_answers_of_the_runs_own_questions_are_checked_too(full_run: Path) -> None:
    path = full_run / "eval" / "test.json"
    record = {"file": "../test.questions.json", "sha256": "0" * 64}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"answers": record}))
    assert "eval/test.json: its answers, test.questions.json, are missing" in report_of(full_run)[1].section("caveats")
