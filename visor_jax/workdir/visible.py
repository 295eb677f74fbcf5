"""Waits for files that another process of the run has written: a network's file system may take a while to show them.

Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from visor_jax.workdir.supervision import beat

SECONDS = 60.0


def wait_until(is_visible: Callable[[], bool]) -> bool:
    """Calls `is_visible` once a second until it is true, and reports progress meanwhile.

    Returns:
      false if `SECONDS` pass before.
    """
    deadline = time.monotonic() + SECONDS
    while not is_visible():
        if time.monotonic() > deadline:
            return False
        beat()
        time.sleep(1)
    return True
