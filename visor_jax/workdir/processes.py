"""What one of several processes does for all of them.

Standard library until several processes run: before JAX is imported there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from visor_jax.errors import RequestError, RunError

_FAILURES: tuple[type[RequestError | RunError], ...] = (RequestError, RunError)


def process_count() -> int:
    """Returns the number of processes of this run; 1 before JAX is imported."""
    jax = sys.modules.get("jax")
    return 1 if jax is None else jax.process_count()


def process_index() -> int:
    """Returns this process's number; 0 before JAX is imported."""
    jax = sys.modules.get("jax")
    return 0 if jax is None else jax.process_index()


def in_process_0(action: Callable[[], object], elsewhere: str) -> None:
    """Runs `action` in process 0 while the others wait; where it fails, all of them fail.

    Args:
      action: runs only in process 0.
      elsewhere: the message of the other processes.

    Raises:
      RequestError, RunError: the one that `action` raised, or one of the same kind in the other processes.
    """
    if process_count() == 1:
        action()
        return
    import numpy as np
    from jax.experimental import multihost_utils

    failure: RequestError | RunError | None = None
    if process_index() == 0:
        try:
            action()
        except _FAILURES as error:
            failure = error
    kind = next((number for number, kind in enumerate(_FAILURES, start=1) if isinstance(failure, kind)), 0)
    kind = int(multihost_utils.broadcast_one_to_all(np.int32(kind)))
    if failure is not None:
        raise failure
    if kind:
        raise _FAILURES[kind - 1](elsewhere)
