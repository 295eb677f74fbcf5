"""The dense model that a run started from: which one it is, its accuracy, and when it is not asked."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from visor_jax.config import from_dict, load_config
from visor_jax.evaluate.dense_start import dense_start
from visor_jax.evaluate.runner import evaluate
from visor_jax.evaluate.tables import print_budgets
from visor_jax.files.read_write import read_json, write_json
from visor_jax.loading import Visor, load, load_stage
from visor_jax.report.page import write_report
from visor_jax.testing import tiny_config
from visor_jax.workdir.folder import Workdir

pytestmark = pytest.mark.usefixtures("quick")


def test_its_accuracy_is_that_of_the_dense_stage(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row "dense" has what an evaluation of the stage itself has; a report shows it."""
    copy = Workdir(Path(shutil.copytree(tiny_run, tmp_path / "run")))
    record = read_json(copy.path / "config.json")
    record["config"]["evaluate"]["dense_start"] = True
    write_json(copy.path / "config.json", record)
    config = from_dict(copy.config())
    result = evaluate(config, load(copy.path), copy)
    own = evaluate(config, load_stage(copy, "base"), copy, name="own")
    assert result["dense"]["tasks"] == own["budgets"]["full"]["tasks"]
    assert result["dense"]["hard"] == own["budgets"]["full"]["hard"]
    assert result["intervals"]["dense"] == own["intervals"]["budgets"]["full"]
    assert result["dense"]["decoder_gflops"] == pytest.approx(own["budgets"]["full"]["decoder_gflops"])
    assert not list((copy.path / "eval").rglob("chunks*")), "its scored chunks are removed too"
    print_budgets(result)
    assert "│ dense" in capsys.readouterr().out.rpartition("│ full")[2], "below the budgets"
    page = write_report(copy).read_text()
    assert "the model that the run started from" in page and "no dense decoder was run" not in page


def test_a_shipped_checkpoint_is_the_start(tmp_path: Path) -> None:
    config, model = load_config("almanac_mini"), load_start("visor")
    start = dense_start(config, model, Workdir(tmp_path))
    assert start is not None and start.arch.plan == "dense"
    embeddings = [one.params["embed_tokens"]["embedding"] for one in (start, model)]
    assert np.array_equal(*embeddings)
    assert dense_start(config, load_start("dense"), Workdir(tmp_path)) is None, "the model is dense itself"


def load_start(plan: str) -> Visor:
    return load("almanac-base", plan=plan)


@pytest.mark.parametrize("stages", [("warmup", "full"), ("base", "warmup")])
def test_a_start_that_is_not_there_is_named(
    stages: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert dense_start(tiny_config({"stages": stages}), load_start("visor"), Workdir(tmp_path)) is None
    assert "the run did not start from a dense model that is still there" in caplog.text


def test_a_model_that_reads_fewer_tokens_is_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_start("visor")
    anyres = dataclasses.replace(model.arch.anyres, packing=4)
    model.arch = dataclasses.replace(model.arch, anyres=anyres)
    with caplog.at_level(logging.WARNING):
        assert dense_start(load_config("almanac_mini"), model, Workdir(tmp_path)) is None
    assert "fewer visual tokens" in caplog.text
