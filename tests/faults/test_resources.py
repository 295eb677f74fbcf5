"""Resources that fail while a stage trains: a full disk, a folder that became read-only, a data worker, one bad sample.

`tests/commands/test_surroundings.py` has full disks (as limits of a file's size) and missing permissions for the other
commands; `tests/train/test_loop.py` counts bad steps across restarts.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.faults.whole_run import array_digests, environment, visor
from visor_jax.train import loop
from visor_jax.train.objectives.base import Objective
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.metrics_log import read_rows

TINY = "from visor_jax.testing import tiny_config as get_config\n"


def last_line(err: str) -> str:
    """Returns the last line of our own; Python may report shared memory of a dead worker after it."""
    return [line for line in err.splitlines() if line.startswith("visor: ")][-1]


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; skips where this process may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_while_saving_is_reported_and_ends_in_exit_1(
    small_disk: Path, compiled: str, tmp_path: Path
) -> None:
    """Once there is room again, the stage resumes from the newest step that was saved."""
    (tmp_path / "tiny.py").write_text(TINY)
    settings = (
        f"--config={tmp_path}/tiny.py --config.stage=base --config.train.checkpoint_every=1 --config.train.keep=99"
    )
    command = "train", *settings.split(), "--config.train.steps=40", f"--workdir={small_disk}/run"
    status, err = visor(*command, compiled=compiled)
    assert status == 1 and "Traceback" not in err, err
    assert "saving failed (1 in a row)" in err and "No space left on device" in last_line(err), err
    assert not (small_disk / "run/base/complete.json").exists()
    assert [step for step in (small_disk / "run/base/checkpoints").iterdir() if (step / "commit.json").exists()]
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    status, err = visor(*command, compiled=compiled)
    assert status == 0 and "base: resumed after step" in err, err
    other = tmp_path / "other"
    assert visor(*command[:-1], f"--workdir={other}", compiled=compiled)[0] == 0
    assert array_digests(small_disk / "run", "base") == array_digests(other, "base")


def test_a_folder_that_became_read_only_is_reported_and_ends_in_exit_1(
    tiny_copy: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.commands.test_surroundings import mode
    from visor_jax.__main__ import main

    monkeypatch.setattr("visor_jax.checkpoint.manager.time.sleep", lambda seconds: None)
    checkpoints = tiny_copy / "policy/checkpoints"
    shutil.rmtree(tiny_copy / "policy")
    checkpoints.mkdir(parents=True)
    with mode(checkpoints, 0o555):
        assert main(["train", f"--workdir={tiny_copy}", "--config.stage=policy"]) == 1
    err = capsys.readouterr().err
    assert f"{checkpoints}/4: saving failed (3 in a row): PermissionError" in last_line(err), err
    assert "saving failed (1 in a row)" in caplog.text and "Traceback" not in err
    assert not (tiny_copy / "policy/complete.json").exists()


# --- data workers -----------------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """Returns the process ids of all children of a process, and of theirs."""
    try:
        lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:
        return []
    children = [int(child) for text in lists for child in text.split()]
    return [*children, *(inner for child in children for inner in descendants(child))]


@contextmanager
def training(tiny_run: Path, tmp_path: Path, compiled: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Yields a run that trains with one data worker and has done some steps, and its workers' process ids."""
    (tmp_path / "tiny.py").write_text(TINY)
    run = tmp_path / "run"
    settings = {"stage": "warmup", "stage_overrides.warmup.init_from": tiny_run / "base", "data.workers": 1}
    settings |= {"train.steps": 100_000, "train.checkpoint_every": 100_000}
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-P", "-m", "visor_jax", "train", f"--config={tmp_path}/tiny.py", f"--workdir={run}"]
    process = subprocess.Popen(
        [*command, *overrides],
        env=environment(compiled),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        metrics = run / "warmup/metrics.jsonl"
        while not (metrics.exists() and len(read_rows(metrics)) > 3):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.2)
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)}
        workers = [pid for pid, command in commands.items() if b"spawn_main" in command]
        assert workers
        yield process, workers
    finally:
        process.kill()


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_a_data_worker_that_is_killed_ends_the_run_within_seconds(
    tiny_run: Path, tmp_path: Path, compiled: str
) -> None:
    with training(tiny_run, tmp_path, compiled) as (process, workers):
        os.kill(workers[-1], signal.SIGKILL)
        began = time.monotonic()
        _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert process.returncode == 1 and "Traceback" not in err, err
    assert "a process that prepares samples died" in last_line(err) and "data.workers" in last_line(err)
    assert not alive(workers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "to_all"),
    [
        (signal.SIGKILL, -9, False),
        (signal.SIGTERM, 143, False),
        (signal.SIGTERM, 143, True),  # as Slurm, containers and terminals send it
        (signal.SIGINT, 130, True),
    ],
)
def test_no_data_worker_outlives_its_run(
    number: signal.Signals, status: int, to_all: bool, tiny_run: Path, tmp_path: Path, compiled: str
) -> None:
    """A signal to every process of the run is answered by the run alone, as one to it."""
    with training(tiny_run, tmp_path, compiled) as (process, workers):
        os.killpg(process.pid, number) if to_all else process.send_signal(number)
        began = time.monotonic()
        _, err = process.communicate(timeout=120)
        while alive(workers) and time.monotonic() - began < 60:
            time.sleep(0.2)
    print(f"{number.name}: everything had ended after {time.monotonic() - began:.1f} s")
    assert process.returncode == status and "Traceback" not in err, err
    assert not alive(workers)


# --- one sample -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_changes_no_bit_of_the_state_and_is_named(
    bad: float, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One sample of step 2: parameters and optimizer state after it are those before it."""
    from visor_jax.config import from_dict

    make, run_steps, states, ids = loop.make_objective, loop.run_steps, [], []

    def make_bad(config: Any, stage: str, workdir: Workdir) -> Objective:
        objective = make(config, stage, workdir)

        def steps(done: int, total: int, position: Any = None):
            for step in objective.steps(done, total, position):
                if step.number == 2:
                    weight = step.arrays["label_weight"].copy()
                    weight[1] = bad
                    ids.extend(step.ids)
                    step = dataclasses.replace(step, arrays={**step.arrays, "label_weight": weight})
                yield step

        return dataclasses.replace(objective, steps=steps)

    def spied(run: Any, *arguments: Any) -> int:
        def update(state: Any, *inputs: Any) -> Any:
            before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
            result = run.update(state, *inputs)
            states.append((before, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result[0])]))
            return result

        update.lower = run.update.lower  # what the first step is checked by
        return run_steps(dataclasses.replace(run, update=update), *arguments)

    monkeypatch.setattr(loop, "make_objective", make_bad)
    monkeypatch.setattr(loop, "run_steps", spied)
    shutil.rmtree(tiny_copy / "policy")
    workdir = Workdir(tiny_copy)
    loop.train(from_dict(workdir.config()), "policy", workdir)
    assert [before == after for before, after in states] == [False, True, False, False]
    assert f"step 2: loss or gradient not finite, step not applied; samples: {', '.join(ids)}" in caplog.text
    assert len(ids) == 4
