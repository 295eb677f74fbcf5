"""Named points in the code at which tests interrupt the process; they do nothing unless the environment names them.

`VISOR_TEST_KILL_AT=NAME` (any step) or `NAME:STEP` (that step) sends SIGKILL to this process. `VISOR_TEST_SIGNAL`
replaces the signal: comma-separated signal names, or "hang", which sleeps for an hour. `VISOR_TEST_DELAY=SECONDS` sends
the signals after a delay, from another thread. Standard library only.
"""

from __future__ import annotations

import os
import signal
import threading
import time


def fault_point(name: str, step: int = 0) -> None:
    """Interrupts the process if the environment names this point."""
    target = os.environ.get("VISOR_TEST_KILL_AT")
    if not target or target not in (name, f"{name}:{step}"):
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
