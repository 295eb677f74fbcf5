"""Stands in for systemd on a worker: transient units that are real processes, with the properties that we set.

A unit's state is a file in the folder that UNITS names. `systemd-run` leaves a supervisor behind that waits for the
process, writes its status, and starts it again where `RestartForceExitStatus` says so. Standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from program import read, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

UNITS = os.environ.get("UNITS", "/nonexistent")
DEAD = {"SubState": "dead", "Result": "success", "ExecMainStatus": "0", "NRestarts": "0"}


def unit_file(name: str) -> str:
    return os.path.join(UNITS, f"{name}.json")


def load(name: str) -> dict[str, Any]:
    return read(unit_file(name), {})


def save(name: str, unit: dict[str, Any]) -> None:
    write(unit_file(name), unit)


def run(argv: list[str], log: int) -> int:
    """Starts a process in a session of its own, whose output goes to an open file; returns its number."""
    files = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
    return os.posix_spawnp(argv[0], argv, os.environ, file_actions=files, setsid=True)


def main(program: str, arguments: list[str]) -> int:
    return start(arguments) if program == "systemd-run" else control(arguments)


def start(arguments: list[str]) -> int:
    end = next(index for index, argument in enumerate(arguments) if not argument.startswith("--"))
    flags: dict[str, str] = {}
    properties: dict[str, str] = {}
    for argument in arguments[:end]:
        name, _, value = argument[2:].partition("=")
        if name == "property":
            properties.update([value.split("=", 1)])
        else:
            flags[name] = value
    name, timer = flags["unit"], "on-active" in flags
    os.makedirs(UNITS, exist_ok=True)
    if load(name):
        sys.stderr.write(f"Failed to start transient service unit: Unit {name}.service already exists.\n")
        return 1
    unit = {"argv": arguments[end:], "properties": properties, "flags": flags, "timer": timer}
    if timer:
        save(name, {**unit, "show": {**DEAD, "SubState": "waiting"}})
        return os.spawnvp(os.P_WAIT, arguments[end], arguments[end:])  # the timer's first run
    save(name, unit)
    if os.fork() == 0:
        os.setsid()
        supervise(name, unit)
        os._exit(0)
    while "show" not in load(name):
        time.sleep(0.005)
    return 0


def supervise(name: str, unit: dict[str, Any]) -> None:
    """Runs the unit's process until it ends for good."""
    properties = unit["properties"]
    log = os.open(properties["StandardOutput"].removeprefix("append:"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    restarts, most = 0, int(properties["StartLimitBurst"]) - 1
    while True:
        pid = run(unit["argv"], log)
        show = {"SubState": "running", "Result": "success", "ExecMainStatus": "0", "NRestarts": str(restarts)}
        save(name, {**unit, "pid": pid, "supervisor": os.getpid(), "show": show})
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        named = signal.Signals(-status).name if status < 0 else str(status)
        again = named in properties["RestartForceExitStatus"].split()
        if not again or restarts == most:
            break
        restarts += 1
    good = status == 0 or str(status) in properties["SuccessExitStatus"].split()
    sub, result = ("exited", "success") if good else ("failed", "start-limit-hit" if again else "exit-code")
    show = {"SubState": sub, "Result": result, "ExecMainStatus": str(abs(status)), "NRestarts": str(restarts)}
    save(name, {**unit, "show": show})


def control(arguments: list[str]) -> int:
    verb, names = arguments[0], [word for word in arguments[1:] if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    for name in names:
        unit = load(name.removesuffix(".timer").removesuffix(".service"))
        show = unit.get("show", DEAD)
        if verb == "show":
            values = [(key, show[key]) for key in flags["property"].split(",")]
            print("\n".join(value if "value" in flags else f"{key}={value}" for key, value in values))
        elif verb == "kill":
            os.kill(unit["pid"], getattr(signal, flags["signal"]))
        elif verb in ("stop", "reset-failed") and unit:
            os.unlink(unit_file(name.removesuffix(".timer").removesuffix(".service")))
    return 0
