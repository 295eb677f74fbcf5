"""Where tests interrupt a process: named points in the code that do nothing unless the environment names them.

`VISOR_TEST_KILL_AT=NAME` (any step) or `NAME:STEP` (that step) sends SIGKILL to this process. `VISOR_TEST_SIGNAL` says
what is sent instead: names of signals between commas, or "hang", which stops there for an hour;
`VISOR_TEST_DELAY=SECONDS` sends them that much later, from another thread. Standard library only.
"""

from __future__ import annotations

import os
import signal
import threading
import time


def fault_point(name: str, step: int = 0) -> None:
    """Interrupt the process if the environment names this point."""
    wanted = os.environ.get("VISOR_TEST_KILL_AT")
    if not wanted or wanted not in (name, f"{name}:{step}"):
        return
    what = os.environ.get("VISOR_TEST_SIGNAL", "SIGKILL")
    if what == "hang":
        time.sleep(3600)
    if delay := float(os.environ.get("VISOR_TEST_DELAY", 0)):
        threading.Timer(delay, _send, (what,)).start()
    else:
        _send(what)


def _send(names: str) -> None:
    for number in names.split(","):
        os.kill(os.getpid(), signal.Signals[number])
