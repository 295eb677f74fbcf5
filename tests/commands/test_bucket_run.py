"""`visor` with a workdir in a bucket: a whole run, kills, a second run, and commands that read the result."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import visor_jax.errors
from visor_jax.__main__ import main
from visor_jax.errors import RequestError
from visor_jax.export import torch_export
from visor_jax.files.bucket import UNFINISHED, names_below
from visor_jax.files.read_write import read_json, write_json
from visor_jax.scale.compiler_options import QUICK
from visor_jax.testing.bucket import without_gcsfs
from visor_jax.workdir.lock import WorkdirLock, this_process
from visor_jax.workdir.metrics_log import read_rows

ROOT = Path(visor_jax.errors.__file__).parents[1]
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
STAGES = ("base", "warmup", "full", "universal", "policy")


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (48, 48), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_without_gcsfs_every_command_names_the_extra(capsys, picture):
    run = f"run --config={ROOT / 'configs' / 'almanac_mini.py'}"
    for command in (run, "report", "export", "evaluate", f"generate --image={picture} --question=b"):
        with without_gcsfs():
            assert main([*command.split(), "--workdir=gs://bucket/run"]) == 2
        error = capsys.readouterr().err
        assert "gs://: needs the package gcsfs" in error and "pip install 'visor-jax[gcs]'" in error, command


@pytest.mark.parametrize("place", ["s3://bucket/run", "gs://", "gs:///run", "gopher://bucket"])
def test_other_places_hold_no_run(capsys, place):
    assert main(["report", f"--workdir={place}"]) == 2
    assert f"--workdir={place}: expected gs://BUCKET/FOLDER or a local folder" in capsys.readouterr().err


def test_an_export_replaces_only_an_export(bucket):
    write_json(bucket / "config.json", {})  # of a workdir
    write_json(bucket / "export" / "parity.json", {})
    for force, message in ((False, "is not empty"), (True, "holds something else than a model")):
        with pytest.raises(RequestError, match=message):
            torch_export._check_destination(bucket, force)
    write_json(bucket / UNFINISHED, {})  # of an upload that was interrupted
    torch_export._check_destination(bucket, False)
    torch_export._check_destination(bucket / "new", False)


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def visor(tmp_path, compiled):
    """Returns a function that runs a command in a process of its own: (exit status, output)."""
    config = tmp_path / "tiny.py"
    config.write_text("from visor_jax.testing import tiny_config\n\n\ndef get_config():\n    return tiny_config()\n")

    def run(*arguments: object, at: str = "", send: str = "SIGKILL", **environment: str) -> tuple[int, str]:
        settings = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS}
        settings |= {"VISOR_TEST_KILL_AT": at, "VISOR_TEST_SIGNAL": send, "TMPDIR": str(tmp_path)}
        settings |= {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "visor_jax", *(str(a).replace("CONFIG", str(config)) for a in arguments)],
            env={**settings, **environment},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def results(workdir: Path) -> dict:
    """Returns everything that must not depend on where a run is stored, or on how often it was killed."""
    losses = {
        stage: [(row["step"], row["loss"], row["budget"]) for row in read_rows(workdir / stage / "metrics.jsonl")]
        for stage in STAGES
    }
    evaluation = read_json(workdir / "eval" / "test.json")
    parity = read_json(workdir / "export" / "parity.json")
    return {
        "losses": losses,
        "viable": read_json(workdir / "search" / "viable.json")["viable"],
        "labels": read_json(workdir / "labels" / "labels.json"),
        "evaluation": {name: evaluation[name] for name in ("identity", "budgets", "dial", "routes")},
        "files": parity["files"],
        "greedy": parity["greedy_tokens_equal"],
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_whole_run_killed_again_and_again_equals_a_local_one(bucket, bucket_server, visor, tmp_path, picture):
    whole = ("run", "--config=CONFIG")
    assert visor(*whole, f"--workdir={tmp_path / 'local'}")[0] == 0
    with WorkdirLock(bucket / "lock.json"):
        status, output = visor(*whole, f"--workdir={bucket}")
        first = f"host {this_process()['host']}, process {os.getpid()}"
        assert status == 2 and f"is in use by another run ({first})" in output
    status, output = visor(*whole, f"--workdir={bucket}", at="step:3", send="SIGTERM")
    assert status == 143 and "stopped by SIGTERM after step 3; saved" in output, output
    assert not (bucket / "lock.json").exists()
    for point in ("dispatched:4", "before_commit:4", "arrays_written:2", "score", "export"):
        status, output = visor(*whole, f"--workdir={bucket}", at=point)
        assert status == -9, output
        assert bool(list(tmp_path.glob(".visor_upload*"))) == (point == "export")
        assert read_json(bucket / "lock.json")["host"] == this_process()["host"]
    write_json(bucket / "lock.json", {**read_json(bucket / "lock.json"), "host": "elsewhere"})  # a stale lock
    status, output = visor(*whole, f"--workdir={bucket}")
    assert status == 0, output
    assert results(bucket) == results(tmp_path / "local")
    names = names_below(bucket)
    assert not list(tmp_path.glob(".visor_upload*"))
    assert "lock.json" not in names and not [name for name in names if ".unfinished" in name or "chunks" in name]
    assert [name for name in names if name.startswith("full/events.out.tfevents.")]
    for method, path in bucket_server.calls:
        assert not any(word in path for word in ("rewriteTo", "copyTo", "moveTo", "compose")), (method, path)

    # Commands that read the result.
    status, output = visor("evaluate", f"--workdir={bucket}", "--json")
    assert status == 0, output
    ask = ("generate", f"--image={picture}", "--question=What colour?", "--max-new-tokens=3")
    answers = [visor(*ask, f"--workdir={workdir}") for workdir in (bucket, tmp_path / "local")]
    assert answers[0][0] == 0 and answers[0][1].split("\n")[0] == answers[1][1].split("\n")[0], answers
    assert visor("report", f"--workdir={bucket}")[0] == 0
    status, output = visor("export", f"--workdir={bucket}", f"--out={bucket}/second", "--stage=full")
    assert status == 0 and (bucket / "second" / "parity.json").exists(), output
    status, output = visor("export", f"--workdir={bucket}", f"--out={bucket}/second", "--stage=full")
    assert status == 2 and "is not empty" in output


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_processes_write_one_set_of_objects(bucket, visor):
    """Their losses and sample ids are those of one process (tests of several processes); here: who writes what."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"{FLAGS} --xla_force_host_platform_device_count=2"
    several = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags}
    with ThreadPoolExecutor(2) as pool:
        one = [
            pool.submit(visor, "run", "--config=CONFIG", f"--workdir={bucket}", **several, JAX_PROCESS_ID=str(index))
            for index in (0, 1)
        ]
    for future in one:
        assert future.result()[0] == 0, future.result()[1]
    names = names_below(bucket)
    assert "lock.json" not in names and "export/parity.json" in names and "report/index.html" in names
    for stage in STAGES:
        assert [row["step"] for row in read_rows(bucket / stage / "metrics.jsonl")] == [1, 2, 3, 4]
        assert sum(name.startswith(f"{stage}/events.out.tfevents.") for name in names) == 1
    assert visor("evaluate", f"--workdir={bucket}")[0] == 0  # in one process
