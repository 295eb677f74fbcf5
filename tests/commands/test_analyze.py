"""`visor analyze`: tables and pictures of a dense model's layers, and of an evaluated run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.evaluate.benchmarks import hub_tables
from visor_jax.__main__ import main
from visor_jax.analysis.api import LAYER_ANALYSES
from visor_jax.commands.analyze import config_of
from visor_jax.config import as_config, to_json
from visor_jax.config.shipped import shipped_folder
from visor_jax.evaluate.benchmarks import named_benchmark
from visor_jax.files.read_write import read_json
from visor_jax.testing import tiny_config

pytestmark = pytest.mark.usefixtures("quick")


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["analyze", *arguments]) == 2
    return capsys.readouterr().err


def check_files(folder: Path, names: set[str], *tables: str) -> None:
    """Checks that a folder has a table and two pictures of each name, and further tables."""
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.{suffix}" for name in names for suffix in ("csv", "png", "svg")),
        *tables,
    }
    for path in folder.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_layers_of_a_dense_model(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stage of a run is asked the run's own questions; the order of slots fits `search.slots`."""
    arguments = [f"--model={tiny_run / 'base'}", f"--out={tmp_path / 'out'}", "--samples=12"]
    assert main(["analyze", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert {Path(name).parent for name in result["written"]} == {tmp_path / "out"}
    check_files(tmp_path / "out", {*(analysis.name for analysis in LAYER_ANALYSES), "lengths"}, "slots.csv")
    layers = as_config(tiny_config()).model.text.num_layers
    for analysis in LAYER_ANALYSES:
        rows = read(tmp_path / "out" / f"{analysis.name}.csv")
        assert {"task", "level", "samples", "accuracy", "layer", *analysis.columns} <= rows[0].keys()
        assert {row["layer"] for row in rows} == {str(layer) for layer in range(layers)}
        assert sum(int(row["samples"]) for row in rows) == 12 * layers
    assert sorted(result["slots"]) == [0, 1]
    assert [int(row["slot"]) for row in read(tmp_path / "out" / "slots.csv")] == result["slots"]
    order = ",".join(map(str, result["slots"]))
    assert f"--config.search.slots={order}" in captured.err


def test_only_some_analyses(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["analyze", f"--model={tiny_run / 'base'}", f"--out={out}", "--samples=4", "--only=cka"]) == 0
    check_files(out, {"cka"})


@pytest.mark.slow
def test_layers_on_public_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a trained checkpoint without a configuration; its own answers are given."""
    for name in ("docvqa", "mme"):
        folder = tmp_path / "hub" / named_benchmark(name).repo.rpartition("/")[2]
        hub_tables.write(name, folder, hub_tables.rows_of(name, 3))
    model = f"--model={shipped_folder('almanac-base')}"
    arguments = [model, f"--out={tmp_path / 'out'}", "--benchmark=docvqa,mme", "--samples=2"]
    assert main(["analyze", *arguments, f"--data={tmp_path / 'hub'}", "--only=contribution"]) == 0
    rows = read(tmp_path / "out" / "contribution.csv")
    assert {(row["task"], row["level"], row["samples"]) for row in rows} == {
        ("docvqa", "hard", "2"),
        ("mme", "easy", "2"),
    }
    assert "expected no --split" in refusal(capsys, *arguments, f"--data={tmp_path / 'hub'}", "--split=test")
    assert "needs --data=FOLDER" in refusal(capsys, *arguments)


def test_an_evaluated_run(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As --workdir or as --model."""
    assert main(["analyze", f"--workdir={tiny_run}", f"--out={tmp_path / 'out'}"]) == 0
    evaluation = json.loads((tiny_run / "eval" / "test.json").read_text())
    budgets = read(tmp_path / "out" / "budgets.csv")
    assert {row["budget"] for row in budgets} == evaluation["budgets"].keys()
    for row in budgets:
        assert float(row["accuracy"]) == pytest.approx(evaluation["budgets"][row["budget"]]["tasks"][row["task"]])
    routes = read(tmp_path / "out" / "routes.csv")
    for task in {row["task"] for row in routes}:
        assert sum(float(row["share"]) for row in routes if row["task"] == task) == pytest.approx(1, abs=1e-4)
    assert len(read(tmp_path / "out" / "costs.csv")) == len(evaluation["budgets"]) + len(evaluation["dial"]) + 1
    check_files(tmp_path / "out", {"budgets", "costs", "lengths", "routes"})
    assert main(["analyze", f"--model={tiny_run}", f"--out={tmp_path / 'again'}", "--only=budgets"]) == 0
    assert read(tmp_path / "again" / "budgets.csv") == budgets
    assert "expected --model with a dense one" in refusal(
        capsys, f"--workdir={tiny_run}", f"--out={tmp_path / 'x'}", "--data=questions.json"
    )


def test_the_configuration_of_a_model(tiny_run: Path) -> None:
    assert config_of("almanac-base", shipped_folder("almanac-base")).name == "almanac_mini"
    assert to_json(config_of("", tiny_run)) == to_json(config_of("", tiny_run / "base"))
    folder = shipped_folder("almanac-base")  # as any other folder in Hugging Face's format
    config = config_of(str(folder), folder)
    assert config.model.anyres.standardize, "not a field of the hub's checkpoints"
    assert config.model.text.num_layers == read_json(folder / "config.json")["text_config"]["num_hidden_layers"]


def test_wrong_requests(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = f"--workdir={tiny_run}", f"--out={tmp_path / 'out'}"
    assert "--samples=0: expected at least 1" in refusal(capsys, run, out, "--samples=0")
    (tmp_path / "file").write_text("")
    assert "expected a folder" in refusal(capsys, run, f"--out={tmp_path / 'file'}")
    assert "--only=cka: expected some of budgets, routes" in refusal(capsys, run, out, "--only=cka")
    assert "name the checkpoint that it started from with --model" in refusal(
        capsys, run, out, f"--model={tiny_run / 'universal'}"
    )
    assert "--out: is missing" in refusal(capsys, f"--model={tiny_run / 'base'}")
    assert "nope: no such folder" in refusal(capsys, "--model=nope")
    assert "--model: is missing" in refusal(capsys, out)
    assert not (tmp_path / "out").exists()
