"""A workdir in a bucket: its lock, claims, metrics and logs, against a stand-in of Google Cloud Storage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

import visor_jax.errors
from visor_jax.data.skips import SkipLog, SkipSample
from visor_jax.errors import ABORTED, RequestError
from visor_jax.files.bucket import SharedObject, names_below
from visor_jax.files.read_write import write_json
from visor_jax.testing import tiny_config
from visor_jax.train.metrics import MetricsWriter
from visor_jax.workdir import lock as lock_module
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.goodput import Goodput
from visor_jax.workdir.lock import WorkdirLock, this_process
from visor_jax.workdir.metrics_log import read_rows

ROOT = Path(visor_jax.errors.__file__).parents[1]

# --- the lock ---------------------------------------------------------------------------------------------------------


def lock_in(folder: Path, **changes) -> WorkdirLock:
    return WorkdirLock(folder / "lock.json", **{"beat_seconds": 0.05, "watch_seconds": 0.5, **changes})


def leave(folder: Path, **changes) -> None:
    write_json(folder / "lock.json", {**this_process(), "token": "x", "beat": 0, **changes})


def test_two_runs_cannot_share_a_workdir(bucket):
    with lock_in(bucket):
        with pytest.raises(RequestError, match=rf"in use by another run \(host .*, process {os.getpid()}\)"):
            lock_in(bucket).__enter__()
        time.sleep(0.3)
        assert json.loads((bucket / "lock.json").read_text())["beat"] > 0
    assert names_below(bucket) == []
    with lock_in(bucket):
        pass


def test_a_killed_run_does_not_keep_the_lock(bucket, caplog):
    script = """
        import os, signal, sys
        from visor_jax.files.read_write import as_path
        from visor_jax.workdir.lock import WorkdirLock
        with WorkdirLock(as_path(sys.argv[1]) / "lock.json"):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script), str(bucket)]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == -9
    assert (bucket / "lock.json").exists()
    with lock_in(bucket):
        assert "taken over from a dead run" in caplog.text


def test_only_the_heartbeat_tells_whether_another_machine_is_alive(bucket):
    leave(bucket, host="elsewhere")
    with lock_in(bucket):
        assert json.loads((bucket / "lock.json").read_text())["pid"] == os.getpid()
    leave(bucket, host="elsewhere")
    beat = threading.Timer(0.2, leave, (bucket,), {"host": "elsewhere", "beat": 1})
    beat.start()
    with pytest.raises(RequestError, match="host elsewhere"):
        lock_in(bucket).__enter__()
    beat.join()


@pytest.mark.parametrize("dead", [False, True])
def test_only_one_of_many_gets_it(bucket, race, dead):
    if dead:
        leave(bucket, pid=2**22 + 1)
    got, refused = race(lambda: lock_in(bucket), 4)
    assert (len(got), len(refused)) == (1, 3)
    got[0].__exit__(None, None, None)
    assert names_below(bucket) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_that_lost_its_lock_aborts(bucket, monkeypatch):
    aborted = threading.Event()

    def leave_now(status: int) -> None:
        assert status == ABORTED
        aborted.set()
        raise SystemExit  # ends the thread

    monkeypatch.setattr(lock_module.os, "_exit", leave_now)
    with lock_in(bucket):
        leave(bucket, host="elsewhere")
        assert aborted.wait(20)
    assert json.loads((bucket / "lock.json").read_text())["host"] == "elsewhere"  # not ours to remove


def test_a_write_whose_answer_is_lost_counts(bucket, monkeypatch):
    write = SharedObject.write
    monkeypatch.setattr(SharedObject, "write", lambda *arguments: write(*arguments) and False)
    with lock_in(bucket):
        time.sleep(0.3)
        assert json.loads((bucket / "lock.json").read_text())["beat"] > 1
    assert names_below(bucket) == []


def test_a_lock_that_cannot_be_released_is_a_warning(bucket, bucket_server, caplog):
    with lock_in(bucket, beat_seconds=60):
        bucket_server.refused = (403, "outage")
    assert "lock.json: cannot be released" in caplog.text


def test_a_heartbeat_survives_an_outage(bucket, bucket_server, caplog):
    with lock_in(bucket):
        bucket_server.refused = (403, "outage")
        deadline = time.monotonic() + 20
        while "heartbeat not written" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        bucket_server.refused = None
        assert "PERMISSION_DENIED" in caplog.text
    assert names_below(bucket) == []


# --- claims and small files -------------------------------------------------------------------------------------------


def test_a_workdir_belongs_to_one_configuration(bucket):
    workdir = Workdir(str(bucket))
    workdir.create()
    workdir.claim(tiny_config())
    assert names_below(bucket) == ["config.json"]
    workdir.claim(tiny_config())
    with pytest.raises(RequestError, match=r"holds another configuration: .*learning_rate"):
        workdir.claim(tiny_config({"train.learning_rate": 0.5}))
    goodput = Goodput(workdir.path / "goodput.json")
    goodput.add("step", 2.0)
    goodput.write()
    assert Goodput(workdir.path / "goodput.json").seconds == {"step": 2.0}


def test_a_missing_bucket_is_a_wrong_request(bucket_server):
    with pytest.raises(RequestError, match=r"--workdir=gs://missing/run: cannot be written: No such bucket"):
        Workdir("gs://missing/run").create()
    assert bucket_server.buckets == {"runs"}


# --- metrics and logs -------------------------------------------------------------------------------------------------


def row(step: int) -> dict:
    return {"step": step, "loss": 1.0, "budget": "full", "seconds": 0.5}


@pytest.mark.usefixtures("unchecked_shapes")  # a path of etils is no subclass of `Path`
def test_metrics_appear_with_each_checkpoint(bucket):
    with MetricsWriter(bucket, first_step=1) as writer:
        writer.write(row(1))
        assert read_rows(bucket / "metrics.jsonl") == []
        writer.flush()
        writer.write(row(2))
        assert [row["step"] for row in read_rows(bucket / "metrics.jsonl")] == [1]
    assert [row["step"] for row in read_rows(bucket / "metrics.jsonl")] == [1, 2]
    killed = MetricsWriter(bucket, first_step=3)
    killed.write(row(3))
    with MetricsWriter(bucket, first_step=2) as writer:  # resumed after step 1
        assert writer.lost_seconds == 0.5
        writer.write(row(2) | {"loss": 7.0})
    assert [(row["step"], row["loss"]) for row in read_rows(bucket / "metrics.jsonl")] == [(1, 1.0), (2, 7.0)]


@pytest.mark.usefixtures("unchecked_shapes")  # a path of etils is no subclass of `Path`
def test_tensorboard_events_are_uploaded(bucket, tmp_path):
    with MetricsWriter(bucket, first_step=1) as writer:
        writer.write(row(1))
        writer.flush()
        writer.write(row(2))
    (name,) = (name for name in names_below(bucket) if name.startswith("events.out.tfevents."))
    (tmp_path / name).write_bytes((bucket / name).read_bytes())
    events = list(LegacyEventFileLoader(str(tmp_path / name)).Load())
    assert [event.step for event in events if event.HasField("summary")] == [1, 2]


def test_skipped_samples_are_logged_with_each_checkpoint(bucket):
    path = bucket / "data" / "skipped.jsonl"
    for expected in (1, 2):
        skips = SkipLog(path, 1.0)
        for index in range(expected):
            skips.count_tried()
            skips.count_skipped("a", index, SkipSample("unreadable", "x"))
        assert not path.exists() or len(path.read_text().splitlines()) == expected - 1
        skips.flush()
        assert len(path.read_text().splitlines()) == expected
