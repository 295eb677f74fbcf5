"""`visor analyze`: tables and pictures of a dense model's layers, and of an evaluated run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from visor_jax.__main__ import main
from visor_jax.analysis.dense import MEASURES
from visor_jax.config import to_json
from visor_jax.testing import tiny_config

pytestmark = pytest.mark.usefixtures("quick")


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["analyze", *arguments]) == 2
    return capsys.readouterr().err


def check_pictures(folder: Path, names: set[str]) -> None:
    assert {path.stem for path in folder.glob("*.png")} == {path.stem for path in folder.glob("*.svg")} == names
    for path in folder.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_layers_of_a_dense_model(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(to_json(tiny_config({"evaluate.batch_size": 8})))
    arguments = [f"--config={path}", f"--model={tiny_run / 'base'}", f"--out={tmp_path / 'out'}", "--samples=12"]
    assert main(["analyze", *arguments, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert {Path(name).parent for name in written} == {tmp_path / "out"}
    rows = read(tmp_path / "out" / "layers.csv")
    assert {"task", "level", "cluster", "samples", "layer", "accuracy", *MEASURES} == rows[0].keys()
    layers = tiny_config().model.text.num_layers
    assert {row["layer"] for row in rows} == {str(layer) for layer in range(layers)}
    assert sum(int(row["samples"]) for row in rows) == 12 * layers
    assert all(0 <= float(row["attention_share"]) <= 1 for row in rows)
    check_pictures(tmp_path / "out", {"attention_share", "cka", "contribution", "vision_drop"})


def test_an_evaluated_run(tiny_run: Path, tmp_path: Path) -> None:
    assert main(["analyze", f"--workdir={tiny_run}", f"--out={tmp_path / 'out'}"]) == 0
    evaluation = json.loads((tiny_run / "eval" / "test.json").read_text())
    budgets = read(tmp_path / "out" / "budgets.csv")
    assert {row["budget"] for row in budgets} == evaluation["budgets"].keys()
    for row in budgets:
        assert float(row["accuracy"]) == pytest.approx(evaluation["budgets"][row["budget"]]["tasks"][row["task"]])
    for task in {row["task"] for row in budgets}:
        shares = [float(row["route_share"]) for row in budgets if row["task"] == task and row["route_share"]]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
    costs = read(tmp_path / "out" / "costs.csv")
    assert len(costs) == len(evaluation["budgets"]) + len(evaluation["dial"])
    dense = [float(row["decoder_gflops"]) for row in read(tmp_path / "out" / "lengths.csv") if row["budget"] == "dense"]
    assert dense == sorted(dense) and len(set(dense)) == len(dense)
    check_pictures(tmp_path / "out", {"budgets", "costs", "lengths", "routes"})


def test_wrong_requests(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = f"--workdir={tiny_run}", f"--out={tmp_path / 'out'}"
    assert "--samples=0: expected at least 1" in refusal(capsys, run, out, "--samples=0")
    assert "expected --model" in refusal(capsys, run, out, "--data=questions.json")
    (tmp_path / "file").write_text("")
    assert "expected a folder" in refusal(capsys, run, f"--out={tmp_path / 'file'}")
    assert "name the checkpoint that it started from with --model" in refusal(
        capsys, run, out, f"--model={tiny_run / 'universal'}"
    )
    path = tmp_path / "config.json"
    path.write_text(to_json(tiny_config()))
    assert "--out: is missing" in refusal(capsys, f"--config={path}", f"--model={tiny_run / 'base'}")
    assert "--model: is missing" in refusal(capsys, f"--config={path}", out)
    assert not (tmp_path / "out").exists()
