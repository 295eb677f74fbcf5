"""Named points in the code at which tests interrupt the process; they do nothing unless the environment names them.

`VISOR_TEST_KILL_AT=NAME` (any step) or `NAME:STEP` (that step) sends SIGKILL to this process. `FIRST>SECOND>...` waits
for the points in this order and acts at the last one, such as `universal>save_begin:3`. `VISOR_TEST_SIGNAL` replaces
the signal: comma-separated signal names, or "hang", which sleeps for an hour. `VISOR_TEST_DELAY=SECONDS` sends the
signals after a delay, from another thread. Standard library only.
"""

from __future__ import annotations

import os
import signal
import threading
import time

_passed: dict[str, int] = {}  # by target: how many of its points, separated by ">", were reached


def fault_point(name: str, step: int = 0) -> None:
    """Interrupts the process if the environment names this point."""
    target = os.environ.get("VISOR_TEST_KILL_AT")
    if not target:
        return
    points = target.split(">")
    reached = _passed.get(target, 0)
    if points[reached] not in (name, f"{name}:{step}"):
        return
    if reached < len(points) - 1:
        _passed[target] = reached + 1
        return
    signals = os.environ.get("VISOR_TEST_SIGNAL", "SIGKILL")
    if signals == "hang":
        time.sleep(3600)
    if delay := float(os.environ.get("VISOR_TEST_DELAY", 0)):
        threading.Timer(delay, _send, (signals,)).start()
    else:
        _send(signals)


def _send(names: str) -> None:
    for number in names.split(","):
        os.kill(os.getpid(), signal.Signals[number])
