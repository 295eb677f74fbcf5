"""The command line of the entries: lists, tables, collected results, small variants, and the page."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visor_jax.errors import RequestError
from visor_jax.evaluate.benchmarks import named_benchmark

Paper = Callable[[str], types.ModuleType]
ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"


def printed(paper: Paper, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert paper("command_line").main(arguments) == 0
    return capsys.readouterr().out


def cells(text: str, title: str) -> list[str]:
    """Returns the cells of the printed row with this title."""
    (line,) = [line for line in text.splitlines() if line.startswith(title + "  ")]
    return line.split()[len(title.split()) :]


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "paper" / "run.py"), "--entry", "tabel2"]
    wrong = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("paper: --entry=tabel2:") and "table2" in wrong.stderr


def test_all_entries_are_listed(paper: Paper, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(paper, capsys, "--list")
    assert len(text.splitlines()) == 14 and text.startswith("table1 ")


def test_a_table_shows_the_paper_beside_formulas_and_nothing_that_nobody_ran(
    paper: Paper, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = printed(paper, capsys, "--entry", "table2", f"--results={tmp_path}")
    assert "visor import --from=$HF_DIR --workdir=$RUNS/visor_packed_4 $C --config.model.anyres.packing=4" in text
    assert "# HUB: " in text and "HF_1P5B" not in text
    assert cells(text, "VISOR") == ["63.6", "58.4", "8.6-8.9x", "8.7x*"]
    assert cells(text, "VISOR-TR, packed by 4") == ["63.1", "56.2", "35.0x", "34.2x*"]
    assert "PyramidDrop" not in text
    text = printed(paper, capsys, "--entry", "table1", f"--results={tmp_path}")
    assert text.count("not known here") == 6


def evaluated(name: str, scores: dict[str, float], gflops: float, dense: float) -> dict[str, Any]:
    """Returns a result of `visor evaluate --benchmark` with what is read of it."""
    budgets = {budget: {"tasks": {name: score}, "decoder_gflops": gflops} for budget, score in scores.items()}
    return {"budgets": budgets, "dense": {"decoder_gflops": dense}, "routes": {name: {"empty": 0.25, "0b10": 0.75}}}


def write_evaluations(paper: Paper, runs: Path, score: float, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        folder = runs / "visor" / "eval" / f"of_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        result = evaluated(name, {"auto": score + number / 100, "full": 0.5}, 10.0, 100.0 + number)
        (folder / f"{named_benchmark(name).split}.json").write_text(json.dumps(result))


def test_collected_results_fill_the_table_and_stay(
    paper: Paper, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = paper("runs")
    flags = ("--entry", "table2", f"--results={tmp_path / 'results'}")
    write_evaluations(paper, tmp_path / "runs", 0.6, runs.EASY)
    text = printed(paper, capsys, *flags, f"--collect={tmp_path / 'runs'}")
    assert cells(text, "VISOR") == ["63.6", "62.5", "58.4", "8.6-8.9x", "8.7x*"], (
        "hard and the saving need all benchmarks"
    )
    write_evaluations(paper, tmp_path / "runs", 0.4, runs.BENCHMARKS)
    printed(paper, capsys, *flags, f"--collect={tmp_path / 'runs'}")
    text = printed(paper, capsys, *flags)
    assert cells(text, "VISOR") == ["63.6", "42.5", "58.4", "48.0", "8.6-8.9x", "10.5x"]
    text = printed(paper, capsys, "--entry", "table5", flags[2], f"--collect={tmp_path / 'runs'}")
    assert cells(text, "RealWorldQA (easy)") == ["54.0", "54.6", "40.0", "8.4x", "10.0x"]
    text = printed(paper, capsys, "--entry", "figure7", flags[2], f"--collect={tmp_path / 'runs'}")
    assert text.replace("not known here", "").splitlines()[-2].split() == ["hard", "25", "0", "38"]
    with pytest.raises(RequestError, match="no such folder"):
        paper("command_line").main([*flags, f"--collect={tmp_path / 'none'}"])
    kept = tmp_path / "results" / "paper" / "table2.json"
    kept.write_text(json.dumps({"cells": {"visor": {"speed": 1.0}}}))
    with pytest.raises(RequestError, match=r"table2\.json: row 'visor'"):
        paper("command_line").main(flags)


def test_a_folder_without_evaluations_is_refused_by_name(paper: Paper, tmp_path: Path) -> None:
    """The message names the folder, the files that are expected, and the commands that make them."""
    collect, runs = paper("command_line").main, tmp_path / "runs"
    write_evaluations(paper, runs, 0.5, ("gqa",))
    flags = [f"--collect={runs}", f"--results={tmp_path / 'results'}"]
    with pytest.raises(RequestError) as refused:
        collect(["--entry", "table2", *flags])
    message = str(refused.value)
    files = paper("table2").ENTRY.paper.files()
    assert message.startswith(f"--collect={runs}: has no number of table2; 1 of {len(files)} files")
    assert "\n  visor/eval/of_realworldqa/test.json\n" in message and "visor/eval/of_gqa" not in message
    assert not any("of_ai2d" in file for file in files), "it is in no mean of this table"
    assert f"and {len(files) - 1 - paper('collected').SHOWN} more" in message
    assert all(f"\n  {command}" in message for command in paper("table2").ENTRY.paper.commands())
    with pytest.raises(RequestError, match=r"analysis/cka\.csv\n(.*\n)*.*visor analyze .*--only=cka"):
        collect(["--entry", "figure3", *flags])
    (runs / "analysis").mkdir()
    (runs / "analysis" / "cka.csv").write_text("task,level,layer\n")
    with pytest.raises(RequestError, match=r"all files are there, but lack its budgets or levels(.*\n)*.*--only=cka"):
        collect(["--entry", "figure3", *flags])
    with pytest.raises(RequestError, match="figure10 has nothing to collect, its numbers follow from formulas"):
        collect(["--entry", "figure10", *flags])
    assert not (tmp_path / "results").exists()


def test_results_of_a_part_are_named_as_such(paper: Paper, tmp_path: Path) -> None:
    whole = tmp_path / "visor" / "eval" / "of_gqa" / f"{named_benchmark('gqa').split}.json"
    (whole.parent / "partial").mkdir(parents=True)
    (whole.parent / "partial" / whole.name).write_text("{}")
    with pytest.raises(RequestError, match=r"1 of them are in a folder partial/"):
        paper("command_line").main(["--entry", "table5", f"--collect={tmp_path}", f"--results={tmp_path / 'results'}"])


def test_all_entries_collect_what_is_there(paper: Paper, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without names an entry may lack evaluations, but not all of them."""
    runs, results = tmp_path / "runs", tmp_path / "results"
    runs.mkdir()
    with pytest.raises(RequestError, match=r"has no number of table1, table2, .*--entry NAME"):
        paper("command_line").main([f"--collect={runs}", f"--results={results}"])
    write_evaluations(paper, runs, 0.4, ("realworldqa",))
    printed(paper, capsys, f"--collect={runs}", f"--results={results}")
    assert [path.name for path in (results / "paper").iterdir()] == ["table5.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps-scale=nan"], "--steps-scale=nan"),
        (["--samples=0"], "--samples=0"),
        (["--entry", "table9"], "--entry=table9"),
    ],
)
def test_wrong_requests_are_refused(paper: Paper, flags: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        paper("command_line").main(flags)


def test_only_small_takes_fields(paper: Paper, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper("command_line").main(["--entry", "table1", "--config.seed=1"])
    assert "--config.seed=1" in capsys.readouterr().err


# --- the embedded data set --------------------------------------------------------------------------------------------


def test_small_takes_the_results_that_are_there(paper: Paper, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(paper, capsys, "--entry", "table1", "--small", "--dry-run")
    places = paper("table1").ENTRY.small.places
    variants = {place[0] for row in places.values() for place in row.values()}
    seeds = [{path.stem[-1] for path in (RESULTS / "claims").glob(f"{name}_[0-9].json")} for name in variants]
    common = set.intersection(*filter(None, seeds))  # of all variants that were run
    runs = [json.loads((RESULTS / "claims" / f"visor_{seed}.json").read_text()) for seed in sorted(common)]
    easy = sum(run["budgets"]["auto"]["easy"] for run in runs) / len(runs)
    assert cells(text, "VISOR")[2] == f"{100 * easy:.1f}"
    dense = json.loads((RESULTS / "claims" / "dense_1.json").read_text())["dense"]["decoder_gflops"]
    saving = dense / (sum(run["budgets"]["auto"]["decoder_gflops"] for run in runs) / len(runs))
    assert cells(text, "VISOR")[-1] == f"{saving:.1f}x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--small", "--config.data.batch_size=8"], "needs --results=DIR/benchmarks/results of its own"),
        (["--small", "--config.nonsense=8", "--results=x/benchmarks/results"], "nonsense"),
        (["--small", "--results=x/results"], "expected DIR/benchmarks/results"),
        (["--small", "--seeds", "-1"], "expected numbers of at least 0"),
    ],
)
def test_arguments_that_would_mix_or_lose_results_are_refused(paper: Paper, arguments: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        paper("command_line").main(["--entry", "table3", "--dry-run", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--entry", "table3", "--seeds", "2"], "--seeds: has no effect without --small"),
        (["--dry-run"], "--dry-run: has no effect without --small"),
        (["--page", "--entry", "table1"], "--page: writes the page of all entries"),
        (["--collect="], "is empty; expected the folder of the runs"),
    ],
)
def test_arguments_without_effect_are_refused(
    paper: Paper, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper("command_line").main(arguments)
    assert message in capsys.readouterr().err


def test_small_without_training_is_by_formula(paper: Paper, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    text = printed(paper, capsys, "--entry", "figure10", "supplement", "--small", f"--results={results}")
    assert cells(text, "7,290 visual tokens")[-1] == "2.9x"
    assert not any(tmp_path.iterdir())


def test_a_run_that_others_continue_must_be_there(paper: Paper, tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    (results / "claims").mkdir(parents=True)
    for name in ("visor_1.json", "questions.json"):
        (results / "claims" / name).write_text((RESULTS / "claims" / name).read_text())
    settings = paper("base").Settings([1], 1.0, 64, results, tmp_path / "runs")
    assert paper("table8").ENTRY.small.missing(settings) == ["router"]
    with pytest.raises(RequestError, match=r"has no visor_1, which other runs continue"):
        paper("table8").ENTRY.small.run(settings)


def test_tables_of_layers_become_extremes_and_clusters(paper: Paper) -> None:
    analyses = paper("analyses")
    rows = [("a", "easy", 0, 0.5), ("b", "easy", 0, 0.7), ("a", "easy", 1, 0.2), ("b", "easy", 1, 0.2),
            ("c", "hard", 0, 0.1), ("c", "hard", 1, 0.9), ("d", "middle", 0, 0.0)]  # fmt: skip
    lines = [
        {"task": task, "level": level, "layer": str(layer), "share": str(share), "cluster": "robust" if task == "a"
         else "sensitive"} for task, level, layer, share in rows
    ]  # fmt: skip
    found = analyses.over_layers(low=("share", min), high=("share", max))(lines)
    assert {level: {k: round(v, 6) for k, v in row.items()} for level, row in found.items()} == {
        "easy": {"low": 0.2, "high": 0.6}, "hard": {"low": 0.1, "high": 0.9}}  # fmt: skip
    assert analyses.clusters(lines) == {"easy": {"tasks": 2.0, "robust": 50.0}, "hard": {"tasks": 1.0, "robust": 0.0}}


@pytest.mark.slow
def test_small_trains_what_is_missing(paper: Paper, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--entry", "figure6", "--small", "--steps-scale=0.003"]
    flags += [f"--runs={tmp_path / 'runs'}", f"--results={tmp_path / 'benchmarks' / 'results'}"]
    flags += ["--config.evaluate.samples=52", "--config.evaluate.control_samples=26", "--config.search.samples=26",
              "--config.label.samples=52", "--config.label.only_right=False"]  # fmt: skip
    text = printed(paper, capsys, *flags)
    assert "python benchmarks/claims.py --only visor --seeds 1 --steps-scale 0.003" in text
    for title in ("no slot", "all slots", "policy"):
        assert len(cells(text, title)) >= 1, "at least the easy accuracy"
    again = printed(paper, capsys, *flags)
    assert "claims.py" not in again and cells(again, "policy") == cells(text, "policy")


@pytest.mark.slow
def test_small_analyzes_the_base(paper: Paper, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--entry", "figure3", "--small", "--samples=52"]
    flags += [f"--runs={tmp_path / 'runs'}", f"--results={tmp_path / 'benchmarks' / 'results'}"]
    text = printed(paper, capsys, *flags)
    assert "visor analyze --model=almanac-base --samples=52 --only=cka" in text and len(cells(text, "hard")) == 2
    again = printed(paper, capsys, *flags)
    assert "visor analyze" not in again and cells(again, "hard") == cells(text, "hard")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_entries(paper: Paper) -> None:
    """After new results of claims.py, `python benchmarks/paper/run.py --page` writes it again."""
    page = paper("page")
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert text == page.page(RESULTS), "python benchmarks/paper/run.py --page"
    shown = page.unfolded(text.splitlines())
    for entry in paper("entries").ENTRIES:
        assert {*entry.paper.commands()} <= {*shown}, entry.name
    blocks = [line for line in shown if line.startswith(("B=", "visor analyze", "visor evaluate"))]
    last = ""
    for line in blocks:
        last = line if line.startswith("B=") else last
        if "dense_1p5b" in line or "--only=cka" in line:
            assert "ocrbench,ai2d --data" in last, "the questions are set again after a block with others"
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
