"""Starts a `visor` command as several processes of one run on this machine, each with simulated CPU devices.

In: the command's arguments, the numbers of processes and of devices of each. Out: their exit statuses and output. For
tests: what runs here is what runs on several machines, except for the devices and the network.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self


class Ended(NamedTuple):
    """How a process ended: its exit status (negative: the signal that killed it) and everything that it printed."""

    status: int
    output: str


class Processes:
    """Running processes of one command; a context manager that kills those that still run at its end."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        count: int = 2,
        devices: int = 2,
        environment: Mapping[str, str] | None = None,
        of_each: Sequence[Mapping[str, str]] = (),
        program: Sequence[str] = ("-m", "visor_jax"),
    ) -> None:
        """
        Args:
          arguments: of `visor`.
          count: number of processes; with 1 the command runs alone, as without this class.
          devices: simulated devices of each process.
          environment: variables of all processes, besides those of this one.
          of_each: further variables of each process.
          program: what Python runs.
        """
        coordinator = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
        self._files = [tempfile.TemporaryFile("w+") for _ in range(count)]  # noqa: SIM115
        self._processes = []
        for index, file in enumerate(self._files):
            variables = {**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})}
            flags = variables.get("XLA_FLAGS", "")
            variables["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
            variables |= {**coordinator, "JAX_PROCESS_ID": str(index)} if count > 1 else {}
            variables |= of_each[index] if of_each else {}
            command = [sys.executable, "-P", *program, *arguments]
            self._processes.append(
                subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process, file in zip(self._processes, self._files, strict=True):
            if process.poll() is None:
                process.kill()
            process.wait()
            file.close()

    def output(self, index: int) -> str:
        """Returns what a process has printed so far, on standard output and standard error."""
        file = self._files[index]
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode("utf-8", "replace")

    def send(self, index: int, number: signal.Signals) -> None:
        """Sends a signal to a process."""
        self._processes[index].send_signal(number)

    def wait(self, seconds: float) -> list[Ended]:
        """Waits for all processes.

        Raises:
          TimeoutError: one still runs.
        """
        deadline = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"still running after {seconds:g} s:\n{self._all_output()}") from error
        return [Ended(process.returncode, self.output(index)) for index, process in enumerate(self._processes)]

    def _all_output(self) -> str:
        return "\n".join(f"--- process {index}\n{self.output(index)}" for index in range(len(self._processes)))


def run_processes(arguments: Sequence[str], *, seconds: float = 600, count: int = 2, devices: int = 2) -> list[Ended]:
    """Runs a command to its end in `count` processes."""
    with Processes(arguments, count=count, devices=devices) as processes:
        return processes.wait(seconds)


def program_report(program: Path, *arguments: str, devices: int, flags: str = "") -> Any:
    """Runs a Python program that uses several simulated devices, and returns the JSON in the last line of its output.

    Args:
      flags: for XLA, besides the number of devices.

    Raises:
      RuntimeError: the program failed; the message is the end of what it printed.
    """
    flags = f"--xla_force_host_platform_device_count={devices} {flags}".strip()
    root = str(Path(__file__).parents[2])  # of the checkout, for `visor_jax` and `tests`
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": root}
    command = [sys.executable, str(program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program}: exit status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def free_port() -> int:
    """Returns a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
