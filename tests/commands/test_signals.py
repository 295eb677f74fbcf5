"""Signals to commands in separate processes: exit status, remaining files, and no process that continues."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import visor_jax.errors
from visor_jax.scale.compiler_options import QUICK

ROOT = Path(visor_jax.errors.__file__).parents[1]
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())


def visor(*arguments: object, at: str = "", send: str = "SIGTERM", **environment: str) -> tuple[int, str]:
    """Returns exit status and stderr of a command that receives signals at a fault point."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS, "VISOR_TEST_KILL_AT": at}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "visor_jax", *map(str, arguments)],
        env={**settings, "VISOR_TEST_SIGNAL": send, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr


# --- before anything has begun ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["start", "imported"])
@pytest.mark.parametrize(("send", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGINT,SIGINT", 130)])
def test_a_signal_at_start_up_is_a_status_and_no_traceback(point: str, send: str, status: int, tmp_path: Path) -> None:
    ended, err = visor("report", f"--workdir={tmp_path}", at=point, send=send)
    assert (ended, "Traceback" in err) == (status, False), err


def test_signals_are_handled_before_slow_imports() -> None:
    """Before that, no slow package and only these modules of ours are imported."""
    script = (
        "import sys; from visor_jax import __main__; from visor_jax.workdir import fault_points, supervision\n"
        "heavy = 'numpy', 'jax', 'rich', 'ml_collections', 'etils'\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in heavy))\n"
        "print(sorted(m for m in sys.modules if m.startswith('visor_jax.')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy, ours = done.stdout.splitlines()
    assert heavy == "[]"
    light = ("__main__", "errors", "workdir", "workdir.fault_points", "workdir.supervision")
    assert ours == str([f"visor_jax.{name}" for name in light])


# --- while a command runs ---------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A signal at a point of a command; `again` is the command to repeat, `left` checks the remaining files."""

    command: str
    again: str
    point: str
    send: str
    status: int
    left: Callable[[Path], bool]
    message: str = ""


def steps(run: Path, stage: str) -> list[str]:
    return sorted(p.parent.name for p in run.glob(f"{stage}/checkpoints/*/commit.json"))


def nothing(of: str) -> Callable[[Path], bool]:
    return lambda run: not (run / of).exists()


def saved(stage: str, *numbers: str) -> Callable[[Path], bool]:
    return lambda run: steps(run, stage) == [*numbers] and nothing(f"{stage}/complete.json")(run)


def complete(stage: str, next_one: str) -> Callable[[Path], bool]:
    return lambda run: (run / stage / "complete.json").exists() and nothing(next_one)(run)


RUN, POLICY = "run", "train --config.stage=policy"
CASES = {
    "first step, TERM": Case(POLICY, "policy", "step:1", "SIGTERM", 143, saved("policy"), "nothing to save"),
    "mid-steps, TERM": Case(POLICY, "policy", "step:3", "SIGTERM", 143, saved("policy", "2", "3"), "after step 3"),
    "mid-steps, INT": Case(POLICY, "policy", "step:3", "SIGINT", 130, saved("policy", "2")),
    "while a step is saved": Case(POLICY, "policy", "save_begin:2", "SIGTERM", 143, saved("policy", "2", "3")),
    "TERM, TERM": Case(POLICY, "policy", "step:3", "SIGTERM,SIGTERM", 143, saved("policy", "2", "3")),
    "INT, INT": Case(POLICY, "policy", "step:3", "SIGINT,SIGINT", 130, nothing("policy/complete.json")),
    "USR1, TERM": Case(POLICY, "policy", "step:3", "SIGUSR1,SIGTERM", 143, saved("policy", "2", "3"), "Current thread"),
    "TERM, INT": Case(POLICY, "policy", "step:3", "SIGTERM,SIGINT", 130, nothing("policy/complete.json")),
    "search": Case("search", "search", "score", "SIGTERM", 143, nothing("search/viable.json")),
    "label": Case("label", "labels", "score", "SIGTERM", 143, nothing("labels/labels.npz")),
    "evaluate, TERM": Case("evaluate", "eval", "score", "SIGTERM", 143, nothing("eval/test.json")),
    "evaluate, INT": Case("evaluate", "eval", "score", "SIGINT", 130, nothing("eval/test.json")),
    "report, TERM": Case("report", "report", "report", "SIGTERM", 143, nothing("report/index.html")),
    "report, INT": Case("report", "report", "report", "SIGINT", 130, nothing("report/index.html")),
    "last step": Case(RUN, "universal policy", "step:4", "SIGTERM", 143, complete("universal", "policy")),
    "final save": Case(RUN, "universal policy", "save_begin:4", "SIGTERM", 143, complete("universal", "policy")),
    "last step of the last stage": Case(RUN, "policy eval", "step:4", "SIGTERM", 143, complete("policy", "eval")),
    "between two stages": Case(RUN, "policy eval", "policy", "SIGTERM", 143, nothing("policy/checkpoints")),
    "run's export, TERM": Case(RUN, "export", "export", "SIGTERM", 143, nothing("export")),
    "export, TERM": Case("export", "export", "export", "SIGTERM", 143, nothing("export")),
    "export, TERM, TERM": Case("export", "export", "export", "SIGTERM,SIGTERM", 143, nothing("export")),
    "export, INT": Case("export", "export", "export", "SIGINT", 130, nothing("export")),
}
QUICK_CASES = ("first step, TERM", "search", "evaluate, INT", "report, INT")


@pytest.mark.parametrize(
    "name", [name if name in QUICK_CASES else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_signal_to_a_command(name: str, tiny_copy: Path, compiled: str) -> None:
    command, again, point, send, status, left, message = CASES[name]
    for folder in again.split():
        shutil.rmtree(tiny_copy / folder, ignore_errors=True)
    ended, err = visor(
        *command.split(), f"--workdir={tiny_copy}", at=point, send=send, JAX_COMPILATION_CACHE_DIR=compiled
    )
    assert ended == status and message in err and "Traceback" not in err, err
    assert left(tiny_copy), err
    assert not (tiny_copy / "lock.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("send", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_while_a_step_compiles_ends_it_at_once(
    send: str, status: int, tiny_copy: Path, tmp_path: Path
) -> None:
    """With an empty cache, compiling takes 4 s here: the signal arrives meanwhile, when Python runs no handler."""
    shutil.rmtree(tiny_copy / "universal")
    ended, err = visor(
        *("train", "--config.stage=universal", f"--workdir={tiny_copy}"),
        at="step:1",
        send=send,
        VISOR_TEST_DELAY="1",
        XLA_FLAGS="",
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "empty"),
    )
    assert ended == status and "Traceback" not in err, err
    assert not (tiny_copy / "universal" / "metrics.jsonl").read_text(), "no step is complete"


# --- hangs ------------------------------------------------------------------------------------------------------------

HANGS = {
    "search": ("search", "search", "score"),
    "label": ("label", "labels", "score"),
    "evaluate": ("evaluate", "eval", "score"),
    "report": ("report", "report", "report"),
    "export": ("export", "export", "export"),
    "train": (POLICY, "policy", "step:1"),
}


@pytest.mark.parametrize(
    "name", [name if name == "report" else pytest.param(name, marks=pytest.mark.slow) for name in HANGS]
)
def test_a_command_that_hangs_is_aborted(name: str, tiny_copy: Path, compiled: str) -> None:
    command, again, point = HANGS[name]
    shutil.rmtree(tiny_copy / again, ignore_errors=True)
    config = tiny_copy / "config.json"
    config.write_text(config.read_text().replace('"hang_seconds": 600.0', '"hang_seconds": 8.0'))
    ended, err = visor(
        *command.split(), f"--workdir={tiny_copy}", at=point, send="hang", JAX_COMPILATION_CACHE_DIR=compiled
    )
    assert ended == 134 and "no progress for 8 s (train.hang_seconds)" in err and "fault_point" in err, err
