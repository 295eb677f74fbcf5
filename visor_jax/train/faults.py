"""What a run does when something goes wrong around it: SIGTERM, SIGUSR1, a hang, steps that are not finite.

Out: `StopSignal` (stop after this step), `Watchdog` (abort with 134 when no step ends), `BadSteps` (give up after too
many in a row), `keep_if_finite` (the jitted part of it), and `fault_point`, where tests kill the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from visor_jax.errors import ABORTED, STOPPED, RunError

log = logging.getLogger(__name__)

_STDERR = 2  # the file descriptor: `sys.stderr` may have been replaced by something that has none

TreeT = TypeVar("TreeT")


class StopSignal:
    """Turns SIGTERM into a question that the loop asks after each step; SIGUSR1 into a stack dump.

    With several processes SIGTERM belongs to JAX's preemption service, which makes all processes stop after the same
    step: a Python handler would take the signal away from it, so none is set.

    Use as a context manager, in the main thread, after `jax.distributed.initialize`.
    """

    def __init__(self) -> None:
        self._received = False
        self._safe = False
        self._previous: object = None
        self._wakeup: int | None = None  # the end that the interpreter writes to
        self._previous_wakeup = -1

    def __enter__(self) -> Self:
        faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True, chain=False)
        if jax.process_count() == 1:
            self._listen()
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous if callable(self._previous) else signal.SIG_DFL)
            signal.set_wakeup_fd(self._previous_wakeup)
            if self._wakeup is not None:
                os.close(self._wakeup)  # ends the listener, which closes the other end
        faulthandler.unregister(signal.SIGUSR1)

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop after `step`; with several processes to be called by all of them at every step."""
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Inside, SIGTERM ends the process at once with 143: for compiling, which may outlast the grace period.

        Python runs its own handler only between two instructions of the main thread, so not while XLA compiles.
        """
        self._safe = True
        try:
            yield
        finally:
            self._safe = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def _listen(self) -> None:
        """A thread that hears of SIGTERM at once, whatever the main thread is in."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._previous_wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._wakeup = writing

        def listen() -> None:
            while received := os.read(reading, 1):
                if received[0] != signal.SIGTERM:
                    continue
                if self._safe:
                    log.warning("SIGTERM received: nothing to save, stopping")
                    os._exit(STOPPED)
                log.warning("SIGTERM received: saving and stopping after this step")
            os.close(reading)

        threading.Thread(target=listen, name="stop signal", daemon=True).start()


class Watchdog:
    """Aborts the process with 134, after dumping all stacks, when no `beat` came for `hang_seconds`.

    A peer that is stuck in Python keeps its heartbeat to the coordinator, so JAX waits for it for ever; only the lack
    of progress tells. The first step's compilation counts too: `hang_seconds` must be longer. 0 turns the watchdog off.
    """

    def __init__(self, hang_seconds: float) -> None:
        self._limit = float(hang_seconds)
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.beat()
        if self._limit > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._limit > 0:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Say that the run has made progress."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while (left := self._last + self._limit - time.monotonic()) > 0:
            # Should a call hang without releasing the interpreter, this thread stands still as well: then the C-level
            # timer ends the process (its exit status is 1, which cannot be chosen).
            faulthandler.dump_traceback_later(left + self._limit, file=_STDERR, exit=True)
            if self._ended.wait(left):
                return
        log.critical("no step for %.0f s (train.hang_seconds): stacks of all threads follow; aborting", self._limit)
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        sys.stderr.flush()
        os._exit(ABORTED)


class BadSteps:
    """Counts steps whose loss or gradient was not finite, and gives up after too many in a row."""

    def __init__(self, max_in_row: int) -> None:
        """
        Args:
          max_in_row: so many bad steps in a row end the run; 1 or more.
        """
        self._max = max_in_row
        self.in_row = 0

    def observe(self, step: int, finite: bool, sample_ids: Sequence[str]) -> None:
        """Count `step`.

        Raises:
          RunError: it is one bad step too many; names the batch's samples.
        """
        if finite:
            self.in_row = 0
            return
        self.in_row += 1
        names = ", ".join(sample_ids)
        log.warning("step %d: loss or gradient not finite, step not applied; samples: %s", step, names)
        if self.in_row >= self._max:
            raise RunError(
                f"step {step}: loss or gradient not finite in {self.in_row} steps in a row (train.max_bad_steps);"
                f" the last batch's samples: {names}"
            )


def keep_if_finite(finite: jax.Array, new: TreeT, old: TreeT) -> TreeT:
    """`new` where `finite` (boolean scalar), else `old`, bit for bit; for use inside the jitted step.

    Unlike `optax.apply_if_finite` it never applies a bad update, however many there were before.
    """
    return jax.tree.map(lambda fresh, kept: jnp.where(finite, fresh, kept), new, old)


def fault_point(name: str, step: int) -> None:
    """Where tests kill the process: `VISOR_TEST_KILL_AT=NAME`, or `NAME:STEP` for one step only, sends SIGKILL here."""
    wanted = os.environ.get("VISOR_TEST_KILL_AT")
    if wanted and wanted in (name, f"{name}:{step}"):
        os.kill(os.getpid(), signal.SIGKILL)
