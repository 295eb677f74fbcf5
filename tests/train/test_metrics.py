"""Records of a stage in training: metrics.jsonl, TensorBoard events and the progress line."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader as EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

import visor_jax.errors
from visor_jax.errors import RunError
from visor_jax.train.metrics import EventFile, MetricsWriter, StageProgress
from visor_jax.workdir.metrics_log import read_rows

ROOT = Path(visor_jax.errors.__file__).parents[1]


def write(folder: Path, steps: range, **more) -> MetricsWriter:
    with MetricsWriter(folder, first_step=steps.start) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 1.0 / step, "budget": "full", "seconds": 0.5, **more})
    return writer


def test_one_object_per_step(tmp_path):
    write(tmp_path, range(1, 4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 1.0, "budget": "full", "seconds": 0.5}
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_kill_9_loses_no_written_step(tmp_path):
    script = """
        import os, signal, sys
        from pathlib import Path
        from visor_jax.train.metrics import MetricsWriter
        writer = MetricsWriter(Path(sys.argv[1]), first_step=1)
        for step in range(1, 6):
            writer.write({"step": step, "loss": 1.0, "budget": "empty"})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == -9
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    with MetricsWriter(tmp_path, first_step=1) as writer:
        writer.write({"step": 1, "loss": math.nan, "gradient_norm": np.float32(math.inf), "budget": "full"})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["loss"] is None and row["gradient_norm"] is None


@pytest.mark.parametrize("written", [0, 5])
def test_a_full_disk_ends_the_run_and_the_cut_line_is_left_out_later(tmp_path, monkeypatch, written):
    write(tmp_path, range(1, 3))
    real = os.write

    def full(handle: int, data: bytes) -> int:
        if written:
            return real(handle, data[:written])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(RunError, match="No space left on device"):
        patched.setattr(os, "write", full)
        write(tmp_path, range(3, 4))
    write(tmp_path, range(3, 5))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def read_events(folder: Path) -> list[Event]:
    """Reads events with TensorBoard's reader, which verifies checksums."""
    return [
        event for path in sorted(folder.glob("events.out.tfevents.*")) for event in EventFileLoader(str(path)).Load()
    ]


def test_tensorboard_gets_every_scalar(tmp_path):
    write(tmp_path, range(1, 4), accuracy=0.5, finite=True)
    version, session, *rest = read_events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (session.step, session.session_log.status) == (1, 1)
    assert [event.step for event in rest] == [1, 2, 3]
    assert {value.tag: value.simple_value for value in rest[1].summary.value} == {
        "loss": 0.5,
        "seconds": 0.5,
        "accuracy": 0.5,
    }


def test_names_of_tasks_that_no_encoding_has(tmp_path):
    write(tmp_path, range(1, 2), **{"accuracy/\ud800": 0.5, "accuracy/\x1b[31m": 0.25})
    tags = {value.tag for value in read_events(tmp_path)[-1].summary.value}
    assert {"accuracy/\\ud800", "accuracy/\x1b[31m"} <= tags
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["accuracy/\ud800"] == 0.5


def test_large_steps_and_numbers_survive(tmp_path):
    with MetricsWriter(tmp_path, first_step=3_000_000_000) as writer:
        writer.write({"step": 3_000_000_000, "loss": 1e300, "gradient_norm": -1e39, "x": math.nan})
    event = read_events(tmp_path)[-1]
    values = {value.tag: value.simple_value for value in event.summary.value}
    assert event.step == 3_000_000_000
    assert (values["loss"], values["gradient_norm"]) == (math.inf, -math.inf) and math.isnan(values["x"])


def test_tensorboard_forgets_the_steps_that_a_resume_runs_again(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 7), accuracy=0.5)
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_under_the_event_file_ends_the_run(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    with MetricsWriter(tmp_path, first_step=1) as writer:
        monkeypatch.setattr(writer._board, "_records", RecordWriter(Full()))
        monkeypatch.setattr(EventFile, "FLUSH_SECONDS", -1.0)
        with pytest.raises(RunError, match="metrics cannot be written: No space left on device"):
            writer.write({"step": 1, "loss": 1.0})


def test_metrics_import_neither_tensorflow_nor_torch():
    """Where they are installed, too: the event file takes only what TensorBoard brings."""
    script = "import sys, visor_jax.train.metrics; print({'tensorflow', 'torch', 'grpc'} & sys.modules.keys())"
    fakes = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=fakes, timeout=60, check=True, capture_output=True)
    assert done.stdout == b"set()\n"


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_shapes")  # beartype takes no `io.StringIO` for a `TextIO`
def test_without_a_terminal_a_line_now_and_then(monkeypatch):
    clock = iter(float(second) for second in range(1000))
    monkeypatch.setattr("visor_jax.train.metrics.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with StageProgress("warmup", 30, 4, stream=stream) as progress:
        for step in range(5, 31):
            progress.update(step, {"loss": 0.25})
    lines = stream.getvalue().splitlines()
    assert 2 <= len(lines) <= 4
    assert lines[0].startswith("warmup: step ") and "/30" in lines[0] and "loss 0.250" in lines[0]
    assert lines[-1].startswith("warmup: step 30/30")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("unchecked_shapes")  # beartype takes no `io.StringIO` for a `TextIO`
def test_on_a_terminal_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with StageProgress("policy", 3, stream=stream) as progress:
        for step in (1, 2, 3):
            progress.update(step, {"loss": 0.5})
    assert "policy" in stream.getvalue() and "3/3" in stream.getvalue() and "loss 0.500" in stream.getvalue()
