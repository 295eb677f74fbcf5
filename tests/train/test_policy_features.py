"""The policy's training reads stored visual tokens instead of running the tower, with the same losses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from visor_jax.adapt.label import label_stage
from visor_jax.evaluate import features
from visor_jax.loading import load_stage
from visor_jax.testing import tiny_config
from visor_jax.train.loop import train
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.metrics_log import read_rows


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "policy" / "metrics.jsonl")]


@pytest.mark.usefixtures("quick")
def test_the_policy_trains_on_features_that_label_stored(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, workdir = tiny_config({"evaluate.cache_gigabytes": 1.0}), Workdir(tiny_copy)
    expected = losses(tiny_copy)
    label_stage(config, workdir, load_stage(workdir, "universal"))
    shutil.rmtree(tiny_copy / "policy")

    def tower(*arguments: object) -> None:
        raise AssertionError("the tower runs")

    monkeypatch.setattr(features, "programs", lambda arch: (tower, tower))
    monkeypatch.setattr("visor_jax.train.objectives.policy.encode", tower)
    train(config, "policy", workdir)
    assert losses(tiny_copy) == pytest.approx(expected, abs=1e-6) and len(expected) == 4
    shutil.rmtree(tiny_copy / "policy")
    shutil.rmtree(tiny_copy / "features")
    monkeypatch.undo()
    train(tiny_config({"evaluate.cache_gigabytes": 1e-5}), "policy", workdir)
    assert losses(tiny_copy) == pytest.approx(expected, abs=1e-6)
    assert "not all visual tokens fit" in caplog.text
