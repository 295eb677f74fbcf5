"""Runs the commands of a launch, or prints them for a dry run.

A target's action calls the same methods of a `Runner` in both cases, so that a dry run cannot differ from what is run.
What a dry run prints on stdout is a shell script: commands with their purpose as comments, and files as here-documents.
Nothing is ever passed through a shell here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from visor_jax.errors import RequestError, RunError, one_line

FOLDER = Path("visor-launch")  # below the current folder: the files of each launch
END = "VISOR_END"  # of here-documents
# What clients print when they know no account; trying again does not help.
NO_CREDENTIALS = (
    *("do not currently have an active account", "Reauthentication", "problem refreshing your current auth tokens"),
    *("does not have any valid credentials", "invalid_grant", "Could not automatically determine credentials"),
    *("must be logged in to the server", "no configuration has been provided", "No cloud access is set up"),
    *("connection to the server localhost:8080 was refused", "context was not found for specified context"),
)
INSTALL = {
    "gcloud": "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install) and run 'gcloud auth login'",
    "kubectl": (
        "install it with 'gcloud components install kubectl gke-gcloud-auth-plugin' and run 'gcloud container clusters"
        " get-credentials CLUSTER'"
    ),
    "xpk": "install it with 'pip install xpk'",
    "sky": "install it with 'pip install skypilot[gcp]' and run 'sky check'",
    "sbatch": "run this on a login node of a Slurm cluster",
}
# What clients print when they do not know where to go.
NO_SETTING = {
    "Failed to find attribute [project]": "no project; give --project=ID, or run 'gcloud config set project ID'",
    "Could not establish a configuration source": "no cluster; run this on a login node of a Slurm cluster",
}
INSTALL |= dict.fromkeys(("squeue", "scancel", "scontrol", "sacct"), INSTALL["sbatch"])


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
      argv: the program and its arguments.
      purpose: one line that says what it is for.
      assumed: the output with which a dry run continues.
      premise: what that output means, in a word, for the reader of a dry run.
      missing: how to install the program; by default `INSTALL` knows.
      environment: additional variables.
    """

    argv: tuple[str, ...]
    purpose: str
    assumed: str = ""
    missing: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    premise: str = ""

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.environment]
        return shlex.join([*(["env", *variables] if variables else []), *self.argv])


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str = ""
    err: str = ""


class Runner:
    """Runs commands and writes files, or prints them.

    Attributes:
      dry_run: print only.
      folder: of this launch's files.
      shown: the commands so far; a dry run's result.
    """

    def __init__(self, name: str, *, dry_run: bool = False) -> None:
        self.dry_run = dry_run
        self.folder = FOLDER / name
        self.shown: list[tuple[str, ...]] = []
        self.files: dict[str, str] = {}

    def run(self, command: Command, accept: Sequence[str] = ()) -> Done:
        """Runs a command and returns its output.

        Args:
          command: what to run.
          accept: a failure whose output contains one of these is no error; its status is in the result.

        Raises:
          RequestError: the program is not installed, or has no credentials.
          RunError: it failed; the message ends with the last line that it printed.
        """
        if self.dry_run:
            return self._print(command)
        return self._finish(command, self._start(command, capture=True), accept)

    def show(self, command: Command, accept: Sequence[str] = ()) -> Done:
        """Runs a command whose output the user wants to see; its errors are captured as in `run`."""
        if self.dry_run:
            return self._print(command)
        return self._finish(command, self._start(command, capture=False), accept)

    def write(self, name: str, text: str) -> Path:
        """Writes a file of this launch and returns its path.

        Raises:
          RequestError: the folder cannot be written.
        """
        path = self.folder / name
        if self.dry_run:
            self.files[str(path)] = text
            end = END
            while end in text:
                end += "_"
            print(f"\nmkdir -p {shlex.quote(str(path.parent))}")
            print(f"cat >{shlex.quote(str(path))} <<'{end}'\n{text.rstrip(chr(10))}\n{end}")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def say(self, text: str) -> None:
        """Prints one line of progress on stderr; that of a dry run is marked, because nothing has happened."""
        print(f"visor{' (dry run)' if self.dry_run else ''}: {one_line(text)}", file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """Prints one line of the result on stdout; a dry run has no result."""
        if not self.dry_run:
            print(one_line(text), flush=True)

    def sleep(self, seconds: float) -> None:
        """Waits; a dry run does not."""
        if not self.dry_run:
            time.sleep(seconds)

    def _print(self, command: Command) -> Done:
        self.shown.append(command.argv)
        premise = f" (assumed here: {command.premise})" if command.premise else ""
        print(f"\n# {one_line(command.purpose)}{premise}\n{command}")
        return Done(0, command.assumed)

    def _start(self, command: Command, *, capture: bool) -> subprocess.CompletedProcess[str]:
        program = command.argv[0]
        if shutil.which(program) is None:
            hint = command.missing or INSTALL.get(program, "install it")
            raise RequestError(f"{program}: not found on PATH; {hint}, or use --dry-run to see the commands")
        self.shown.append(command.argv)
        return subprocess.run(
            list(command.argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else _descriptor(sys.stdout),
            stderr=subprocess.PIPE,
            env=_with(command.environment),
            text=True,
            errors="backslashreplace",
            check=False,
        )

    def _finish(self, command: Command, ended: subprocess.CompletedProcess[str], accept: Sequence[str]) -> Done:
        done = Done(ended.returncode, ended.stdout or "", ended.stderr or "")
        said = f"{done.err}\n{done.out}"
        if done.status == 0 or any(text.lower() in said.lower() for text in accept):
            return done
        for text, hint in NO_SETTING.items():
            if text in said:
                raise RequestError(f"{command.argv[0]}: could not {command.purpose}: {hint}")
        what = f"{command.argv[0]}: could not {command.purpose}: {last_error(said) or f'exit status {done.status}'}"
        if any(text in said for text in NO_CREDENTIALS):
            raise RequestError(f"{what}; no credentials: {INSTALL.get(command.argv[0], 'log in')}")
        raise RunError(what)


def _descriptor(stream: TextIO) -> int | None:
    """Returns the file behind a stream: with `--json` that of stderr, because stdout holds the result alone."""
    try:
        stream.flush()
        return stream.fileno()
    except (OSError, ValueError):
        return None


def last_error(said: str) -> str:
    """Returns the line of a client's output that says what went wrong: the last one with "error", else the last.

    Lines of kubectl's own log, such as `E1129 17:12:14.138800 ...`, are not for users.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip() and not re.match(r"[EFIW]\d{4} ", line)]
    errors = [line for line in lines if "error" in line.lower()]
    return one_line((errors or lines or [""])[-1])[:400]


def _with(environment: Sequence[tuple[str, str]]) -> dict[str, str] | None:
    return {**os.environ, **dict(environment)} if environment else None
