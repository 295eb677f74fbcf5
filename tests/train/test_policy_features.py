"""The policy's training reads stored visual tokens instead of running the tower, with the same losses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visor_jax.adapt.label import label_stage
from visor_jax.config import Config, as_config
from visor_jax.errors import RunError
from visor_jax.evaluate import features
from visor_jax.evaluate.features import VISUAL
from visor_jax.loading import load_stage
from visor_jax.scale.mesh import build_mesh
from visor_jax.testing import tiny_config
from visor_jax.train.loop import train
from visor_jax.train.objectives import policy
from visor_jax.train.objectives.policy import LabeledExamples, store_features
from visor_jax.tree import flatten
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.metrics_log import read_rows
from visor_jax.workdir.results import Labels


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "policy" / "metrics.jsonl")]


@pytest.mark.usefixtures("quick")
def test_the_policy_trains_on_features_that_label_stored(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, workdir = tiny_config({"evaluate.cache_gigabytes": 1.0}), Workdir(tiny_copy)
    expected = losses(tiny_copy)
    label_stage(config, workdir, load_stage(workdir, "universal"))
    shutil.rmtree(tiny_copy / "policy")

    def tower(*arguments: object) -> None:
        raise AssertionError("the tower runs")

    monkeypatch.setattr(features, "visual_tokens", tower)
    monkeypatch.setattr("visor_jax.train.objectives.policy.encode", tower)
    train(config, "policy", workdir)
    assert losses(tiny_copy) == pytest.approx(expected, abs=1e-6) and len(expected) == 4


@pytest.mark.usefixtures("quick")
def test_features_are_stored_chunk_by_chunk(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Interrupted after two of four chunks, the second start runs the tower for the others only."""
    config = as_config(tiny_config({"evaluate.cache_gigabytes": 1.0, "evaluate.batch_size": 12}))
    workdir, rows, visual_tokens = Workdir(tiny_copy), list[int](), features.visual_tokens

    def counting(params: Any, arrays: Any, *others: Any) -> Any:
        rows.append(len(arrays["tiles"]))
        return visual_tokens(params, arrays, *others)

    monkeypatch.setattr(features, "visual_tokens", counting)
    frozen = flatten({name: load_stage(workdir, "universal").params[name] for name in VISUAL})
    mesh = build_mesh(1, -1, 1)

    def interrupt(name: str, number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt(name)

    def start(config: Config = config) -> LabeledExamples:
        examples = LabeledExamples(config, Labels.read(workdir))
        store_features(examples, config, workdir, frozen, mesh)
        return examples

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(policy, "fault_point", interrupt)
        start()
    interrupted = [*rows]
    examples = start()
    both = [*rows]
    assert 0 < len(interrupted) == 2 < len(both) <= 4
    start()
    assert rows == both, "all are stored"
    shutil.rmtree(tiny_copy / "features")
    start()
    assert rows == both + both
    shutil.rmtree(tiny_copy / "features")
    with pytest.raises(RunError, match="features were removed or damaged during training"):
        examples.batch(np.arange(4))
    small = as_config(tiny_config({"evaluate.cache_gigabytes": 1e-5}))
    assert start(small).features is None and "not all visual tokens fit" in caplog.text
    del frozen["connector/linear_1/kernel"]
    assert start().features is None and "connector/linear_1/kernel trains" in caplog.text
