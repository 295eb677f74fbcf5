"""What a stage shows while it trains, beyond its losses: validation, a profile, Weights & Biases; losses stay."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ml_collections import ConfigDict

from visor_jax.config import from_dict
from visor_jax.errors import RequestError
from visor_jax.train import wandb_run as wandb_module
from visor_jax.train.loop import train
from visor_jax.train.observer import MEASURED
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.metrics_log import read_rows

pytestmark = pytest.mark.usefixtures("quick")


class Recorder:
    """Stands in for the package wandb and for its run."""

    def __init__(self) -> None:
        self.started: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.exit_code: int | None = None

    def init(self, **arguments: Any) -> Recorder:
        self.started = arguments
        return self

    def log(self, row: dict[str, Any], *, step: int) -> None:
        self.rows.append({"step": step, **row})

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code


def again(run: Path, stage: str, **changes: Any) -> list[dict[str, Any]]:
    """Runs a stage again with other free fields; returns its rows."""
    shutil.rmtree(run / stage)
    config: Any = ConfigDict(from_dict(Workdir(run).config()).to_dict(), type_safe=False)
    config.train.update(changes)
    train(config, stage, Workdir(run))
    return read_rows(run / stage / "metrics.jsonl")


def without(rows: list[dict[str, Any]], *prefixes: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in MEASURED and not k.startswith(prefixes)} for row in rows]


def test_validation_a_profile_and_wandb_leave_the_losses_as_they_are(
    tiny_run: Path, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)  # type: ignore[arg-type]
    monkeypatch.setattr(wandb_module.importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    changes = {"validate_every": 3, "validate_samples": 6, "profile": "2:2", "wandb_project": "visor"}
    rows = again(tiny_copy, "full", **changes)
    before = read_rows(tiny_run / "full" / "metrics.jsonl")
    assert without(rows, "validation/") == without(before)

    validated = [row for row in rows if "validation/samples" in row]
    assert [row["step"] for row in validated] == [3, 4], "every third step and the last one"
    for row in validated:
        assert row["validation/samples"] == 6
        for budget in ("empty", "full"):
            assert row[f"validation/loss/budget={budget}"] > 0
            assert 0 <= row[f"validation/accuracy/budget={budget}"] <= 1
    assert validated[0]["validation/loss/budget=full"] != validated[1]["validation/loss/budget=full"]

    (trace,) = (tiny_copy / "full" / "profile").rglob("*.trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {"2", "3"}

    assert recorder.started["project"] == "visor" and recorder.started["resume"] == "allow"
    assert [row["step"] for row in recorder.rows] == [1, 2, 3, 4] and recorder.exit_code == 0
    assert [row["loss"] for row in recorder.rows] == [row["loss"] for row in rows]
    assert "secret-key" not in json.dumps(recorder.started)
    assert not [f for f in tiny_copy.rglob("*.json") if "secret-key" in f.read_text()]


def test_wandb_that_is_not_installed_is_a_wrong_request(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"train.wandb_project='visor': .*visor_jax\[wandb\]"):
        again(tiny_copy, "full", wandb_project="visor")


def test_a_validation_reads_the_same_records_after_a_resume(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"validate_every": 2, "validate_samples": 4, "checkpoint_every": 1}
    whole = without(again(tiny_copy, "universal", **changes))
    monkeypatch.setenv("VISOR_TEST_KILL_AT", "dispatched:2")
    monkeypatch.setenv("VISOR_TEST_SIGNAL", "SIGTERM")
    with pytest.raises(SystemExit):
        again(tiny_copy, "universal", **changes)
    monkeypatch.delenv("VISOR_TEST_KILL_AT")
    config: Any = ConfigDict(from_dict(Workdir(tiny_copy).config()).to_dict(), type_safe=False)
    config.train.update(changes)
    train(config, "universal", Workdir(tiny_copy))
    assert without(read_rows(tiny_copy / "universal" / "metrics.jsonl")) == whole
    names = [key for key in whole[1] if key.startswith("validation/loss/")]
    assert len(names) >= 2, "each viable budget"


def test_every_key_of_a_row_is_documented(tiny_run: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    documented = {
        name for line in page.splitlines() if line.startswith("| `") for name in line.split("|")[1].split("`")
    }
    families = {name.rsplit("B", 1)[0].replace("TASK", "").replace("NAME", "") for name in documented}
    rows = [row for stage in ("full", "universal", "policy") for row in read_rows(tiny_run / stage / "metrics.jsonl")]
    keys = {key for row in rows for key in row}
    prefixes = ("loss/budget=", "loss/source=", "accuracy/")
    plain = {next((prefix for prefix in prefixes if key.startswith(prefix)), key) for key in keys}
    assert plain <= families, plain - families
