"""Stand-ins for clients: they record their arguments, keep state, and run the scripts of workers on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from visor_jax.launching import tpu, wheel
from visor_jax.launching.steps import Runner

PROGRAM = Path(__file__).parent / "stand_ins" / "program.py"
CLIENTS = ("gcloud", "xpk", "kubectl", "sky", "sbatch", "squeue", "scancel", "scontrol", "sacct")
# What the scripts of a worker call, besides systemd: `uv` makes an environment whose `visor` is a script of the test.
OF_WORKERS = {
    # Anything but systemd would change this machine.
    "sudo": 'case $1 in systemctl | systemd-run) exec "$@" ;; tee) cat >/dev/null ;; esac',
    "curl": "echo a key",
    "mountpoint": "exit 1",
    "lsb_release": "echo jammy",
    "hostname": 'echo "$HOSTNAME"',
    "python3": 'mkdir -p "$HOME/.local/bin" && ln -sf "$STAND_INS/bin/uv" "$HOME/.local/bin/uv"',
    "uv": """for last; do :; done
case $1 in
  venv) mkdir -p "$last/bin" ;;
  pip) test -f "${last#*file://}" && cp "$STAND_INS/visor" env/bin/visor && chmod +x env/bin/visor ;;
esac""",
}
# Saves within a moment after SIGTERM, as a run does, and ends with 143; continues where it left off.
VISOR = """#!/bin/bash
echo "started with $*"
trap 'echo saved; echo saved >>saves; exit 143' TERM
sleep 100 &
wait
"""


class Clients:
    """The stand-ins of one test: what they were asked, and what they shall answer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for name, text in OF_WORKERS.items():
            self.script(name, f"#!/bin/sh\n{text}\n")
        for name in (*CLIENTS, "systemctl", "systemd-run"):
            self.script(name, f'#!/bin/sh\nexec {sys.executable} -IS {PROGRAM} {name} "$@"\n')
        (folder / "visor").write_text(VISOR)
        self.set(workers=1, schedule=["PROVISIONING", "ACTIVE"])

    def script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def set(self, **values: Any) -> None:
        """Writes what the stand-ins read: `schedule`, `workers`, `secrets`, `answers`, `requests`."""
        for name, value in values.items():
            (self.folder / f"{name}.json").write_text(json.dumps(value))

    def get(self, name: str) -> Any:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def fail(self, match: str, err: str, *, status: int = 1, times: int = 1) -> None:
        """Lets the next `times` command lines that match fail."""
        fault = {"match": match, "err": err, "status": status, "times": times}
        self.set(faults=[*(self.get("faults") or []), fault])

    def calls(self, *words: str) -> list[list[str]]:
        """Returns the recorded command lines that contain all words."""
        log = self.folder / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if all(word in line for word in words)]

    def forget(self) -> None:
        (self.folder / "log.jsonl").unlink(missing_ok=True)

    def preempt(self, name: str, state: str = "SUSPENDED") -> None:
        """Takes the machines of a request away."""
        requests = self.get("requests")
        requests[name]["states"] = [state]
        self.set(requests=requests)
        self.kill()
        shutil.rmtree(self.folder / "workers", ignore_errors=True)

    def units(self) -> dict[str, Any]:
        """Returns worker/unit -> its record."""
        files = (self.folder / "workers").glob("*/units/*.json")
        return {f"{file.parts[-3]}/{file.stem}": json.loads(file.read_text()) for file in files}

    def kill(self) -> None:
        """Ends every process that a unit of this test started."""
        for unit in self.units().values():
            for pid in (unit.get("supervisor"), unit.get("pid")):
                if pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)

    def wait_for(self, done: Callable[[], Any], seconds: float = 20.0) -> Any:
        """Returns the first true value of `done`."""
        end = time.monotonic() + seconds
        while not (value := done()):
            assert time.monotonic() < end, (self.units(), self.calls())
            time.sleep(0.02)
        return value


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clients]:
    """Every client on PATH is a stand-in; the current folder is empty; the wheel is an empty file; no waiting."""
    made = Clients(tmp_path / "stand-ins")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    monkeypatch.setenv("STAND_INS", str(made.folder))
    monkeypatch.setattr(wheel, "build", lambda runner: runner.write(wheel.FILE, "a wheel\n"))
    monkeypatch.setattr(tpu, "POLL_SECONDS", 0.0)
    yield made
    made.kill()


@pytest.fixture
def dry() -> Runner:
    """A runner that prints."""
    return Runner("first", dry_run=True)
