"""SIGTERM at every kind of moment of a whole `visor run`: status 143, and afterwards the results of an undisturbed run.

`tests/commands/test_signals.py` has the same moments for single commands, with what each leaves on the disk, two
signals at once, and SIGINT.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.whole_run import environment, exported, results, visor

# What is interrupted -> the fault point, and the seconds after it. In their order in the run.
MOMENTS = {
    "compiling": ("base>step:1", "0.7"),
    "the step before the last": ("base>step:3", "0"),
    "a step": ("warmup>step:2", "0"),
    "between two steps": ("warmup>dispatched:3", "0"),
    "a save": ("full>save_begin:2", "0"),
    "the last step of a stage": ("full>step:4", "0"),
    "between two stages": ("search", "0"),
    "search": ("search>score", "0"),
    "the end of a save": ("universal>before_commit:1", "0"),
    "the last save of a stage": ("universal>save_begin:4", "0"),
    "label": ("label>chunk:0", "0"),
    "the last step of the last stage": ("policy>step:4", "0"),
    "evaluate": ("eval>chunk:0", "0"),
    "report": ("eval>report", "0"),
    "export": ("eval>export", "0"),
    "verifying the export": ("eval>export", "1.5"),
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_stopped_at_every_kind_of_moment_ends_like_an_undisturbed_one(
    uninterrupted: Path, compiled: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = "run", f"--config={uninterrupted}/tiny.py", f"--workdir={run}"
    for name, (point, delay) in MOMENTS.items():
        at = {"VISOR_TEST_KILL_AT": point, "VISOR_TEST_SIGNAL": "SIGTERM", "VISOR_TEST_DELAY": delay}
        began = time.monotonic()
        status, err = visor(*command, compiled=compiled, **at)
        print(f"{name}: {status} after {time.monotonic() - began:.0f} s")
        assert status == 143 and "Traceback" not in err, (name, err)
        assert not (run / "lock.json").exists() and not list(run.glob("*/*.tmp"))
    status, err = visor(*command, compiled=compiled)
    assert status == 0, err
    assert results(run) == results(uninterrupted / "run")
    assert exported(run) == exported(uninterrupted / "run")


@pytest.mark.slow
@pytest.mark.parametrize("idle", ["for another machine's lock", "for a question"])
def test_a_command_that_waits_ends_at_once(idle: str, tiny_copy: Path, compiled: str) -> None:
    """While it watches whether another machine's run is alive, and in a chat, whose standard input is silent."""
    shutil.rmtree(tiny_copy / "policy") if "lock" in idle else None
    arguments = ["train", "--config.stage=policy"] if "lock" in idle else ["generate", "--chat"]
    ready = "watching" if "lock" in idle else ""
    if "lock" in idle:
        (tiny_copy / "lock.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "t", "beat": 0}))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "visor_jax", *arguments, f"--workdir={tiny_copy}"],
        env=environment(compiled),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        if ready:
            assert any(ready in line for line in process.stderr)
        else:
            time.sleep(12)  # a chat says nothing before the first question
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 143 and "Traceback" not in err, err
    assert time.monotonic() - began < 30, "the lock is watched for 35 s"
    assert not (tiny_copy / "policy").exists() or "lock" not in idle
