"""Whole evaluations of a tiny model on benchmarks: files, figures, problems, and runs that are killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.benchmarks import hub_rows, hub_tables
from visor_jax.budget import Budget
from visor_jax.config import as_config
from visor_jax.cost import cache_bytes, decoder_flops, dense_cache_bytes, dense_decoder_flops, route_flops
from visor_jax.errors import RequestError
from visor_jax.evaluate.against import open_predictions
from visor_jax.evaluate.benchmarks import named_benchmark, predictions
from visor_jax.evaluate.benchmarks.run import evaluate_benchmarks, open_tables
from visor_jax.evaluate.tables import print_benchmarks
from visor_jax.files.read_write import read_json
from visor_jax.loading import Visor, load
from visor_jax.testing import tiny_config
from visor_jax.testing.processes import Processes
from visor_jax.workdir.folder import Workdir

pytestmark = pytest.mark.usefixtures("quick")
ROOT = Path(__file__).parents[3]
NAMES = ["docvqa", "mme"]
NAMED = [named_benchmark(name) for name in NAMES]
# Six questions of each in chunks of four: two chunks.
CONFIG = as_config(tiny_config({"evaluate.batch_size": 4}))

PROGRAM = """
import sys
from visor_jax.scale.compiler_options import QUICK
import functools, jax
import visor_jax.evaluate.benchmarks.run
jax.jit = functools.partial(jax.jit, compiler_options=QUICK)
from tests.evaluate.benchmarks.test_run import evaluated
from pathlib import Path

evaluated(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the repositories of two benchmarks, six questions each."""
    for name in NAMES:
        folder = tmp_path / "hub" / named_benchmark(name).repo.rpartition("/")[2]
        hub_tables.write(name, folder, hub_tables.rows_of(name, 6))
    return tmp_path / "hub"


def evaluated(run: Path, data: Path, **settings: Any) -> dict[str, Any]:
    return evaluate_benchmarks(CONFIG, load(run), Workdir(run), open_tables(NAMED, str(data)), **settings)


def lines_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(model: Visor, row: int, budget: str) -> str:
    """Returns the model's answer to a question of DocVQA, asked by itself."""
    benchmark, of_row = named_benchmark("docvqa"), hub_rows.docvqa(row)
    prompt = benchmark.item(of_row).prompt
    return model.answer(of_row["image"]["bytes"], prompt, budget, benchmark.max_new_tokens).text


def test_two_benchmarks(tiny_copy: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, result = load(tiny_copy), evaluated(tiny_copy, data)
    budgets = [*map(str, map(Budget.of, model.viable_budgets)), "auto"]
    assert list(result["budgets"]) == budgets and result["levels"] == {"docvqa": "hard", "mme": "easy"}
    for name, split in (("docvqa", "validation"), ("mme", "test")):
        folder = tiny_copy / "eval" / f"of_{name}"
        assert read_json(folder / f"{split}.json") == json.loads(json.dumps(result["benchmarks"][name]))
        lines = lines_in(folder / f"{split}.predictions.jsonl")
        assert [(line["row"], line["budget"]) for line in lines] == [(row, b) for row in range(6) for b in budgets]
        assert not (folder / "chunks").exists()
        for budget, row in result["benchmarks"][name]["budgets"].items():
            of_budget = [line for line in lines if line["budget"] == budget]
            assert row["metrics"] == named_benchmark(name).report(of_budget) and row["samples"] == 6
            assert row["tasks"] == {name: named_benchmark(name).accuracy(row["metrics"])}
    for budget, row in result["budgets"].items():
        parts = [result["benchmarks"][name]["budgets"][budget] for name in NAMES]
        assert row["tasks"] == {"docvqa": parts[0]["hard"], "mme": parts[1]["easy"]} and row["samples"] == 12
        assert row["decoder_gflops"] == pytest.approx(sum(part["decoder_gflops"] for part in parts) / 2)
        assert 0 < row["decoder_gflops"] < row["end_to_end_gflops"] and row["cache_bytes"] > 0
        assert row["cache_bytes"] < result["dense"]["cache_bytes"]
        low, high = result["intervals"]["budgets"][budget]["hard"]
        assert low <= row["hard"] <= high and low < high
    assert sum(result["benchmarks"]["mme"]["routes"]["mme"].values()) == pytest.approx(1)
    assert result["benchmarks"]["mme"]["shares"] == result["routes"]["mme"]
    harness = result["benchmarks"]["mme"]["harness"]
    assert harness["name"] == "visor_jax" and {"jax", "python"} <= harness["versions"].keys()
    question = named_benchmark("mme").item(hub_rows.mme(0)).prompt
    assert f"user\n<image>\n{question}<|im_end|>" in harness["first_prompt"] and harness["max_new_tokens"] == 16
    print_benchmarks(result)
    output = capsys.readouterr().out
    assert all(text in output for text in ("mme_cognition_score", "chosen by auto", "cache kB", "harness: visor_jax"))


def test_times_and_another_run_beside_the_scores(
    tiny_copy: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a stage's own answers there is no difference; times are of the question of median length."""
    stage, tables = load(tiny_copy / "full"), open_tables(NAMED, str(data))
    config = as_config(tiny_config({"evaluate.timing_rounds": 1}))
    evaluate_benchmarks(CONFIG, stage, Workdir(tiny_copy), tables, budgets=["full"])
    others = open_predictions(str(tiny_copy), tables, None)
    settings: dict[str, Any] = {"budgets": ["full", "empty"], "name": "partial", "against": others}
    result = evaluate_benchmarks(config, stage, Workdir(tiny_copy), tables, **settings)
    timing, lines = result["benchmarks"]["docvqa"]["timing"], lines_in(others["docvqa"].path)
    line = lines[timing["question"]["row"]]
    assert {line[name] for name in ("text_tokens",)} == {timing["question"]["text_tokens"]}
    for name, row in timing["budgets"].items():
        assert row["route"] == name and min(*row["seconds_to_first_token"], *row["tokens_per_second"]) > 0
    for of_one, level in ((result, "hard"), (result, "easy"), (result["benchmarks"]["docvqa"], "hard")):
        same, other = of_one["against"]["budgets"]["full"], of_one["against"]["budgets"]["empty"]
        assert same[level]["difference"] == 0 and same[level]["p"] == 1 and same["budget"] == other["budget"] == "full"
        assert other[level]["accuracy"] == pytest.approx(of_one["budgets"]["empty"][level])
        assert other[level]["other"] == pytest.approx(of_one["budgets"]["full"][level])
    print_benchmarks(result)
    output = capsys.readouterr().out
    assert "first token, ms" in output and "on cpu, float32" in output and "paired differences" in output


def test_predictions_are_the_models_answers_with_their_cost(tiny_copy: Path, data: Path) -> None:
    model = load(tiny_copy)
    evaluated(tiny_copy, data)
    lines = lines_in(tiny_copy / "eval" / "of_docvqa" / "validation.predictions.jsonl")
    for line in lines[-8:]:
        assert line["answer"] == answers(model, line["row"], line["budget"])
        assert line["question"].startswith(f"What is the number on page {line['row']}?")
        assert line["id"] == str(49153 + line["row"]) and line["reference"] == [str(line["row"]), f"No. {line['row']}"]
        route = Budget.parse(line["route"]).resolve(model.arch.num_slots, model.viable_budgets)
        assert route in model.viable_budgets and (line["route"] == line["budget"] or line["budget"] == "auto")
        sizes = line["visual_tokens"], line["text_tokens"]
        routing = route_flops(model.arch, *sizes) if line["budget"] == "auto" else 0
        assert line["prompt_decoder_flops"] == decoder_flops(model.arch, route, *sizes) + routing
        assert line["prompt_decoder_flops"] <= line["decoder_flops"] < line["flops"]
        assert line["prompt_cache_bytes"] == cache_bytes(model.arch, route, *sizes, 4) <= line["cache_bytes"]
    dense = [dense_decoder_flops(model.arch, line["visual_tokens"], line["text_tokens"]) for line in lines]
    result = read_json(tiny_copy / "eval" / "of_docvqa" / "validation.json")
    assert result["dense"]["decoder_gflops"] == pytest.approx(sum(dense) / len(dense) / 1e9)
    cached = [dense_cache_bytes(model.arch, line["visual_tokens"], line["text_tokens"], 4) for line in lines]
    assert result["dense"]["cache_bytes"] == pytest.approx(sum(cached) / len(cached))


@pytest.mark.slow
def test_a_killed_run_answers_only_what_is_missing(
    tiny_copy: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first chunk of the second benchmark; the results are those of an uninterrupted run."""
    whole = Path(shutil.copytree(tiny_copy, tmp_path / "whole"))
    expected = evaluated(whole, data)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VISOR_TEST_KILL_AT": "chunk:1>chunk:0"}
    command = [sys.executable, "-c", PROGRAM, str(tiny_copy), str(data)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert ended.returncode == -9, ended.stderr[-2000:]
    assert len(list((tiny_copy / "eval").glob("of_*/chunks/*/*.jsonl"))) == 3
    asked, answered = [], predictions.answered

    def counted(*arguments: Any) -> Any:
        asked.append([question.row for question in arguments[-1]])
        return answered(*arguments)

    monkeypatch.setattr(predictions, "answered", counted)
    assert evaluated(tiny_copy, data) == expected and asked == [[4, 5]]
    for path in filter(Path.is_file, whole.rglob("eval/of_*/**/*")):
        assert (tiny_copy / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert not list((tiny_copy / "eval").glob("of_*/chunks"))


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(tiny_copy: Path, data: Path, tmp_path: Path) -> None:
    runs = {1: tiny_copy, 2: Path(shutil.copytree(tiny_copy, tmp_path / "two"))}
    environment = {"PYTHONPATH": str(ROOT)}
    for count, run in runs.items():
        asked = ["evaluate", f"--workdir={run}", f"--benchmark={','.join(NAMES)}", f"--data={data}"]
        asked += ["--config.evaluate.batch_size=2"]
        with Processes(asked, count=count, environment=environment) as processes:
            ended = processes.wait(600)
        assert [process.status for process in ended] == [0] * count, ended
    written = [path.relative_to(tiny_copy) for path in tiny_copy.glob("eval/of_*/partial/*")]
    assert len(written) == 4
    for path in written:
        assert (runs[2] / path).read_bytes() == (runs[1] / path).read_bytes()


def test_a_damaged_or_foreign_chunk_is_computed_again(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = predictions.PredictionStore(Workdir(tiny_run), str(tmp_path), {"seed": 0}, "full")
    budgets: dict[str, Any] = {"full": (True, True), "auto": None}
    benchmark, rows = named_benchmark("docvqa"), hub_tables.rows_of("docvqa", 5)
    opened = [predictions.Opened(row, benchmark.item(rows[row]), [], "broken_image: \u00e9") for row in (3, 4)]
    lines = [predictions.problem_line(benchmark, question, name, "\u00e9") for question in opened for name in budgets]
    store.save([3, 4], budgets, lines)
    assert store.load([3, 4], budgets) == lines
    assert store.load([3], budgets) is None and store.load([3, 4], {"full": (True, True)}) is None
    (path,) = tmp_path.glob("chunks/*/*.jsonl")
    lacking = [{key: value for key, value in line.items() if key != "scores"} for line in lines]
    for content in (path.read_bytes()[:-30], b"", b"[1]\n", predictions.pack(lines[:2]), predictions.pack(lacking)):
        path.write_bytes(content)
        assert store.load([3, 4], budgets) is None
    assert caplog.text.count("is computed again") == 5


def test_questions_that_cannot_be_asked_are_wrong_and_counted(tiny_copy: Path, tmp_path: Path) -> None:
    rows = hub_tables.rows_of("chartqa", 3)
    rows[1]["image"] = {"bytes": b"no picture", "path": None}
    rows[2]["question"] = "why " * 100_000
    hub_tables.write("chartqa", tmp_path / "hub", rows)
    model, workdir = load(tiny_copy), Workdir(tiny_copy)
    tables = open_tables([named_benchmark("chartqa")], str(tmp_path / "hub"))
    result = evaluate_benchmarks(CONFIG, model, workdir, tables, budgets=["full"])["benchmarks"]["chartqa"]
    assert result["problems"] == {"image_format": 1, "not_askable": 1} and result["budgets"]["full"]["samples"] == 3
    lines = lines_in(tiny_copy / "eval" / "of_chartqa" / "test.predictions.jsonl")
    assert [line["problem"].partition(":")[0] for line in lines] == ["", "image_format", "not_askable"]
    assert "question: 40" in lines[2]["problem"] and lines[1]["scores"] == {"relaxed": 0.0}
    flops = result["budgets"]["full"]["decoder_gflops"] * 1e9
    assert flops == pytest.approx(lines[0]["prompt_decoder_flops"]), "the mean is over those that were answered"
    hub_tables.write("chartqa", tmp_path / "bad", rows[1:])
    with pytest.raises(RequestError, match="no question of chartqa can be asked; the first: image_format: "):
        evaluate_benchmarks(
            CONFIG, model, workdir, open_tables([named_benchmark("chartqa")], str(tmp_path / "bad")), budgets=["full"]
        )


def test_limits_and_budgets_go_to_a_folder_of_their_own(tiny_copy: Path, data: Path) -> None:
    result = evaluated(tiny_copy, data, budgets=["auto"], limit=3, name="partial")
    assert list(result["budgets"]) == ["auto"] and result["benchmarks"]["mme"]["questions"] == {"asked": 3, "of": 6}
    lines = lines_in(tiny_copy / "eval" / "of_mme" / "partial" / "test.predictions.jsonl")
    assert [line["row"] for line in lines] == [0, 1, 2] and not (tiny_copy / "eval" / "of_mme" / "test.json").exists()
    with pytest.raises(RequestError, match="no trained policy"):
        tables = open_tables(NAMED, str(data))
        evaluate_benchmarks(CONFIG, load(tiny_copy / "full"), Workdir(tiny_copy), tables, budgets=["auto"])
