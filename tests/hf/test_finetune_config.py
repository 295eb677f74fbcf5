"""`configs/llava_ov_finetune.py` on a small checkpoint of the hub's format: it starts, saves, is stopped, and resumes.

Every override names the data or shrinks something: steps, lengths of text, samples that wait, questions. What the file
refuses is in `tests/config/test_llava_ov_finetune.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from visor_jax import load, testing
from visor_jax.__main__ import main
from visor_jax.tree import flatten

CONFIG = Path(__file__).parents[2] / "configs" / "llava_ov_finetune.py"
RECORDS = 40
SIZES = ((20, 30), (28, 28), (60, 40), (90, 90))  # height and width: 2, 2, 7 and 10 tiles of 28 pixels
SMALLER = (
    "data.path=train.json",
    "data.text_length=128",
    "data.pack_window=8",
    "data.pool_tiles=16",
    "data.workers=0",
    "train.checkpoint_every=2",
    "stage_overrides.warmup.steps=4",
    "stage_overrides.full.steps=2",
    "stage_overrides.universal.steps=2",
    "stage_overrides.policy.steps=2",
    "stage_overrides.policy.batch_size=4",
    "label.samples=6",
    "evaluate.samples=4",
    "evaluate.batch_size=4",
)

Visor = Callable[..., int]


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures of several sizes, and a JSON file of short conversations about them."""
    root = tmp_path_factory.mktemp("records")
    rows = []
    for number in range(RECORDS):
        size = SIZES[number % len(SIZES)]
        Image.fromarray(testing.random_picture(*size, seed=number)).save(root / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhich digit is shown?"},
            {"from": "gpt", "value": str(number % 10)},
        ]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (root / "train.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def visor(saved: dict[str, Path], records: Path) -> Visor:
    """Runs a command of the docstring in a workdir, with the smaller settings."""
    config = f"--config={CONFIG}:{saved['tied']},records={RECORDS},devices=1,rows=2"
    smaller = [f"--config.{override}" for override in SMALLER]

    def run(command: str, workdir: Path, *arguments: str) -> int:
        where = [f"--workdir={workdir}"] if command != "data" else []
        try:
            return main([command, *arguments, config, *where, f"--config.data.root={records}", *smaller])
        except SystemExit as stopped:  # after SIGTERM
            return int(str(stopped.code))

    return run


def params_of(workdir: Path, stage: str) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten(load(workdir / stage).params).items()}


def steps_of(workdir: Path, stage: str) -> list[dict[str, float]]:
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_training_starts_saves_is_stopped_and_resumes(
    visor: Visor, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that SIGTERM stops after step 3 of 4 ends with the weights of one that nothing stops, bit for bit."""
    assert visor("data", tmp_path, "check") == 0
    assert visor("import", tmp_path / "whole", f"--from={saved['tied']}") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    stage = "--config.stage=warmup"
    assert visor("train", tmp_path / "whole", stage) == 0

    monkeypatch.setenv("VISOR_TEST_KILL_AT", "step:3")
    monkeypatch.setenv("VISOR_TEST_SIGNAL", "SIGTERM")
    assert visor("train", tmp_path / "stopped", stage) == 143
    assert not (tmp_path / "stopped" / "warmup" / "complete.json").exists()
    saves = {file.name for file in (tmp_path / "stopped" / "warmup" / "checkpoints").iterdir() if file.name.isdigit()}
    assert saves == {"2", "3"}, "the save of every second step, and that of the signal"
    monkeypatch.delenv("VISOR_TEST_KILL_AT")
    assert visor("train", tmp_path / "stopped", stage) == 0

    rows = steps_of(tmp_path / "stopped", "warmup")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert min(row["samples"] for row in rows) > 2, "rows hold several samples"
    first, second = (params_of(tmp_path / name, "warmup") for name in ("whole", "stopped"))
    base = params_of(tmp_path / "whole", "base")
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
        if not name.startswith("blocks/cross_attention/"):
            np.testing.assert_array_equal(value, base[name], err_msg=f"{name} is frozen in warmup")
    assert any(np.any(value != base[name]) for name, value in first.items()), "the new layers train"


def test_training_before_the_import_is_refused(
    visor: Visor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert visor("train", tmp_path / "run", "--config.stage=warmup") == 2
    told = capsys.readouterr().err
    assert "init_from='base'" in told and "run that stage first, or write it with `visor import`" in told


def test_more_devices_than_pools_are_refused(
    visor: Visor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices would split the two rows, but not the one pool of tiles that the rows share."""
    mesh = SimpleNamespace(size=2, shape={"replica": 1, "fsdp": 2, "tensor": 1})
    monkeypatch.setattr("visor_jax.train.loop.configured_mesh", lambda config: mesh)
    assert visor("train", tmp_path / "run", "--config.stage=warmup") == 2
    told = capsys.readouterr().err
    assert "batch_size of stage 'warmup'=2: expected a multiple of 4" in told
    assert "split the rows 2 ways, in pools of data.pool_rows=2" in told


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_every_stage_runs_and_the_result_is_evaluated_and_exported(
    visor: Visor, saved: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert visor("import", run, f"--from={saved['tied']}") == 0
    assert visor("run", run) == 0
    evaluation = json.loads((run / "eval" / "test.json").read_text())
    assert evaluation and (run / "export" / "config.json").exists()
    assert load(run).stage == "policy"
    assert visor("run", run) == 0, "a complete run is left as it is"
