"""What a stage shows while it trains, beyond its losses: validation, a profile, Weights & Biases; losses stay."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.faults.whole_run import environment, visor
from visor_jax.config import as_config, from_dict, stage_config
from visor_jax.data.questions import label_questions
from visor_jax.errors import RequestError
from visor_jax.loading import load_stage
from visor_jax.scale.mesh import configured_mesh
from visor_jax.testing import tiny_architecture
from visor_jax.testing.processes import Processes
from visor_jax.train import wandb_run as wandb_module
from visor_jax.train.loop import train
from visor_jax.train.objectives import held_out as held_out_module
from visor_jax.train.objectives.policy import balance
from visor_jax.train.observer import MEASURED
from visor_jax.train.profile import StepProfiler
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.metrics_log import read_rows
from visor_jax.workdir.results import Labels

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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 7), "the profile of steps 5 to 6 is in"),
        (range(1, 4), "train.profile=5:9 wrote no profile: step 5 was not"),
        (range(6, 9), "train.profile=5:9 wrote no profile: step 5 was not"),
    ],
)
def test_a_window_past_the_steps_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, steps: range, expected: str
) -> None:
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *folder: None)
    caplog.set_level("INFO")
    with StepProfiler("5:9", tmp_path) as profiler:
        for number in steps:
            with profiler.step(number):
                pass
            profiler.dispatched(number, ())
    assert [record.getMessage() for record in caplog.records if expected in record.getMessage()]
    assert len(caplog.records) == 1


def test_wandb_that_is_not_installed_is_a_wrong_request(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"train.wandb_project='visor': .*visor_jax\[wandb\]"):
        again(tiny_copy, "full", wandb_project="visor")


@pytest.mark.slow
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


def test_the_policy_is_validated_on_questions_it_is_not_trained_on(tiny_run: Path, tiny_copy: Path) -> None:
    rows = again(tiny_copy, "policy", validate_every=2, validate_samples=6)
    before = read_rows(tiny_run / "policy" / "metrics.jsonl")
    assert without(rows, "validation/") == without(before)
    first, last = (row for row in rows if "validation/samples" in row)
    assert (first["step"], last["step"]) == (2, 4)
    for row in (first, last):
        assert row["validation/samples"] == 6 and row["validation/loss"] > 0 and 0 <= row["validation/accuracy"] <= 1
    assert first["validation/loss"] != last["validation/loss"], "the routing parameters train"


def test_held_out_questions_get_the_labels_of_the_stage_label(
    tiny_run: Path, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validated on the questions that are trained on, in their order: the same labels and weights."""
    workdir, config = Workdir(tiny_run), from_dict(Workdir(tiny_run).config())
    labels = Labels.read(workdir)
    monkeypatch.setattr(held_out_module, "single_questions", lambda config, split, count: label_questions(config))
    config = as_config(ConfigDict(config.to_dict()))
    params, mesh = load_stage(workdir, "universal").params, configured_mesh(config)
    with jax.set_mesh(mesh):
        batches = held_out_module.held_out_questions(config, "policy", workdir, mesh).batches(params)
        arrays = [measured.arrays for measured in batches]
    found = np.concatenate([x["label"] for x in arrays])[: len(labels.label)]
    np.testing.assert_array_equal(found, labels.label)
    settings = stage_config(config, "policy")
    weights = balance(labels.label, len(labels.budgets), settings.label_balance)
    np.testing.assert_allclose(np.concatenate([x["label_weight"] for x in arrays])[: len(found)], weights, rtol=1e-6)


def test_a_policy_whose_decoder_trains_is_not_validated() -> None:
    held_out_module.check_frozen(tiny_architecture(), ("routing/",))
    with pytest.raises(
        RequestError, match=r"validate_every: stage policy trains blocks/.* depend; expected stage_over"
    ):
        held_out_module.check_frozen(tiny_architecture(), ("routing/", "blocks/"))


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


MIXED = """
from visor_jax.testing import tiny_architecture, tiny_config
def get_config():
    parts = (("llava", "short.json", "", 1.0), ("llava", "long.json", "", 1.0))
    return tiny_config({{"data.root": {root!r}, "data.parts": parts, "stages": ("full",), "data.batch_size": 8,
                        "evaluate.batch_size": 4, "stage_overrides.full.init_from": "", "train.validate_every": 2,
                        "train.validate_samples": 10, "data.test_fraction": 0.2, "train.learning_rate": 1e-4,
                        "train.accumulate": 2, "train.ema_decay": 0.9, "train.profile": "2:1"}}, steps=3)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_write_the_figures_of_the_whole_batch(tmp_path: Path, compiled: str) -> None:
    for name, answer in (("short", "red"), ("long", "a red square that fills the picture")):
        records = []
        for i in range(20):
            Image.new("RGB", (48, 48 + i), "red").save(tmp_path / f"{name}{i}.png")
            talk = [{"from": "human", "value": "<image>\nColor?"}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{name}{i}", "image": f"{name}{i}.png", "conversations": talk})
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "mixed.py").write_text(MIXED.format(root=str(tmp_path)))
    arguments = ["train", f"--config={tmp_path}/mixed.py", "--config.stage=full"]
    with Processes([*arguments, f"--workdir={tmp_path}/two"], environment=environment(compiled)) as processes:
        ended = processes.wait(400)
    assert [process.status for process in ended] == [0, 0], ended
    status, errors = visor(*arguments, f"--workdir={tmp_path}/one", compiled=compiled)
    assert status == 0, errors
    two, one = (read_rows(tmp_path / name / "full" / "metrics.jsonl") for name in ("two", "one"))
    sources = set()
    for row, other in zip(two, one, strict=True):
        assert row.keys() == other.keys()
        sources |= {key for key in row if key.startswith("loss/source=")}
        for key in [key for key in row if key.startswith(("loss", "validation/", "samples", "target_tokens"))]:
            if not key.endswith("_per_second"):
                assert row[key] == pytest.approx(other[key], rel=1e-5), key
        per_sample = [r["tokens_per_second"] / r["samples_per_second"] for r in (row, other)]
        assert per_sample[0] == pytest.approx(per_sample[1], rel=1e-5), "counts of all processes"
    assert sources == {"loss/source=short", "loss/source=long"}
    assert [row["step"] for row in two if "validation/samples" in row] == [2, 3]
    assert [*(tmp_path / "two" / "full" / "profile").rglob("*.xplane.pb")]
