"""Supervises a command: handles the signals that stop it, and aborts it when it hangs.

`supervised` returns the one `Stop` of this process. SIGTERM ends the process with 143 immediately while there is
nothing to save (start-up, imports, compilation, search, evaluation). Once a stage defers it (`Stop.hold`), the loop
calls `should_stop` after each step, saves, and exits 143. SIGINT raises `KeyboardInterrupt`; if a library suppresses
it, a watched command ends anyway. SIGUSR1 dumps all stacks and continues.

`watched` aborts the process with 134 if `beat` is not called for `train.hang_seconds`. Every long loop of a command
calls `beat` once per unit of work: a step, a sample, a batch, a file.

Standard library only, so that the entry point can use it before importing anything else.
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
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from visor_jax.errors import ABORTED, INTERRUPTED, STOPPED

log = logging.getLogger(__name__)

GRACE_SECONDS = 3.0  # time limit for a watched command to end after SIGINT, unless it is saving
LEAVE_SECONDS = 8.0  # time limit for the actions before an immediate exit: releasing the lock, telling other processes
_POLL_SECONDS = 1.0
_STDERR = 2  # the file descriptor, because a replaced `sys.stderr` may have none


class Stop:
    """The signals of one command.

    Python runs a signal handler only between two instructions of the main thread, so not while XLA compiles. Therefore
    a thread reads the interpreter's wakeup descriptor and reacts immediately.

    With several processes, JAX's preemption notifier makes all of them stop after the same step. It is a C handler that
    `jax.distributed.initialize` installs in place of ours. `take_sigterm` restores ours and keeps the notifier, which
    is called on SIGTERM only while the signal is deferred, so that a process that is compiling also ends immediately.

    Attributes:
      interrupted: whether SIGINT was received.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._received = False  # SIGTERM was received
        self._held = False  # SIGTERM is deferred until a stage has saved
        self._starting = False  # during start-up SIGINT also ends the process immediately
        self._ending = False  # the process is ending because of SIGTERM
        self._ended = False
        self._points = 0  # sync points over all stages; JAX requires increasing numbers
        self._notifier: Callable[[int], None] | None = None
        self._trampoline: int | None = None
        self._before_exit: list[Callable[[int], None]] = []

    # --- interface of the loop ----------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Defers SIGTERM to `should_stop`, once a step of the stage has ended and there is state to save."""
        self._held = True

    def should_stop(self) -> bool:
        """Returns whether to save and stop now; with several processes all of them must call it at every step."""
        if self.interrupted:
            raise KeyboardInterrupt  # a library suppressed the first one
        if _process_count() == 1:
            return self._received
        from jax.experimental import multihost_utils

        self._points += 1
        return bool(multihost_utils.reached_preemption_sync_point(self._points))

    @contextlib.contextmanager
    def until_complete(self, stage: str) -> Iterator[None]:
        """Wraps a stage that may `hold` the signal; a deferred signal takes effect once the block succeeds.

        Raises:
          SystemExit: 143; the stage is complete, and no other one may start.
        """
        self.take_sigterm()
        try:
            yield
            self._ending = _any_process(self._received)
        except BaseException:
            self._ending = self._received  # the block is ending anyway; let it finish
            raise
        finally:
            self._held = False
        # Read again: the signal may have arrived between the line in `try` and the release above.
        if self._ending or self._received:
            log.warning("%s: complete; stopped by SIGTERM", stage)
            raise SystemExit(STOPPED)

    def before_exit(self, action: Callable[[int], None]) -> None:
        """Registers an action to run before an immediate exit, with its status; it must be quick.

        All actions run at the same time, each in a thread of its own.
        """
        self._before_exit.append(action)

    def ignore_sigterm(self) -> None:
        """Ignores SIGTERM from now on, because the command is complete."""
        self._ending = True

    def started(self) -> None:
        """Ends the start-up phase: from now on SIGINT raises `KeyboardInterrupt`, so that the command can clean up."""
        self._starting = False

    # --- receiving ----------------------------------------------------------------------------------------------------

    def take_sigterm(self) -> None:
        """Reinstalls our SIGTERM handler, which `jax.distributed.initialize` may have replaced by JAX's notifier."""
        if self._trampoline is None or threading.current_thread() is not threading.main_thread():
            return
        handler = _set_c_handler(None)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._adopt(handler)

    def _adopt(self, handler: int) -> None:
        """Keeps a C handler of SIGTERM that is not Python's."""
        if handler > 1 and handler != self._trampoline:  # 0 and 1: the default action, ignored
            import ctypes

            self._notifier = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._received = True  # the listener reacts

    def _on_sigint(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        if self._starting:  # extension modules print or suppress a KeyboardInterrupt during import
            if self._before_exit:
                self.leave(INTERRUPTED, "interrupted")
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    def _listen(self, reading: int) -> None:
        """Runs in a thread and reacts to signals immediately."""
        while received := os.read(reading, 1):
            if received[0] == signal.SIGTERM:
                self._received = True
                if self._ending:
                    continue
                if not self._held:
                    self.leave(STOPPED, "SIGTERM received: nothing to save, stopping")
                log.warning("SIGTERM received: saving and stopping after this step")
                if self._notifier is not None:
                    self._notifier(signal.SIGTERM)
            elif received[0] == signal.SIGINT and self._may_insist():
                threading.Thread(target=self._insist, name="interrupt", daemon=True).start()
        os.close(reading)

    def _may_insist(self) -> bool:
        """Returns whether SIGINT may force an exit: not in a command that handles it, nor while a stage saves."""
        return _watchdog is not None and not self._held and not self._ended

    def _insist(self) -> None:
        """Ends the process if `KeyboardInterrupt` was suppressed or is delayed by a compilation."""
        time.sleep(GRACE_SECONDS)
        if self._may_insist():
            self.leave(INTERRUPTED, "interrupted")

    def leave(self, status: int, message: str) -> NoReturn:
        """Ends the process now, after the actions of `before_exit`, which have a time limit."""
        leaving = threading.Thread(target=self._before_leaving, args=(status, message), daemon=True)
        leaving.start()
        leaving.join(LEAVE_SECONDS)
        os._exit(status)

    def _before_leaving(self, status: int, message: str) -> None:
        log.warning("%s", message)
        actions = [threading.Thread(target=self._act, args=(x, status), daemon=True) for x in self._before_exit]
        for thread in actions:
            thread.start()
        for thread in actions:
            thread.join()

    @staticmethod
    def _act(action: Callable[[int], None], status: int) -> None:
        with contextlib.suppress(Exception):
            action(status)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Handles SIGTERM, SIGINT and SIGUSR1 inside the block and restores the previous handlers."""
        faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True, chain=False)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._listen, args=(reading,), name="stop signal", daemon=True).start()
        signal.signal(signal.SIGINT, self._on_sigint)
        handler = _set_c_handler(None)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._trampoline = _set_c_handler(None)  # the C handler that Python installs for all its handlers
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._adopt(handler)
        try:
            yield
        finally:
            self._ended = True
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            signal.set_wakeup_fd(wakeup)
            os.close(writing)  # ends the listener, which closes the reading end
            faulthandler.unregister(signal.SIGUSR1)


_stop: Stop | None = None


@contextlib.contextmanager
def supervised(*, starting: bool = False) -> Iterator[Stop]:
    """Yields the process's `Stop`: the existing one, or a new one that handles the signals inside the block.

    Only the main thread may set handlers; in another thread the `Stop` has no effect.

    Args:
      starting: until `Stop.started`, SIGINT ends the process immediately with 130.
    """
    global _stop
    if _stop is not None:
        yield _stop
        return
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    _stop, stop._starting = stop, starting
    try:
        with stop._listening():
            yield stop
    finally:
        _stop = None


def _in_a_forked_child() -> None:
    """Resets the handlers in a child, which shares the wakeup pipe, so that its signals are not mistaken for ours."""
    if _stop is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_a_forked_child)


def was_interrupted() -> bool:
    """Returns whether SIGINT was received during this command."""
    return _stop is not None and _stop.interrupted


def before_exit(action: Callable[[int], None]) -> None:
    """Registers an action to run before an immediate exit; see `Stop.before_exit`."""
    if _stop is not None:
        _stop.before_exit(action)


def ignore_sigterm() -> None:
    """Ignores SIGTERM from now on, because the command is complete."""
    if _stop is not None:
        _stop.ignore_sigterm()


def leave(status: int, message: str) -> NoReturn:
    """Ends the process now, from any thread, after the actions of `before_exit`."""
    if _stop is not None:
        _stop.leave(status, message)
    log.warning("%s", message)
    os._exit(status)


def _set_c_handler(handler: int | None) -> int:
    """Sets the C handler of SIGTERM to an address (None: the default action) and returns the previous one."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    return libc.signal(signal.SIGTERM, handler) or 0


def _process_count() -> int:
    """Returns the number of processes of this run; 1 before JAX is imported."""
    jax = sys.modules.get("jax")
    return 1 if jax is None else jax.process_count()


def _any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process; with several, all of them must call it."""
    if _process_count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


# --- the watchdog -----------------------------------------------------------------------------------------------------


class Watchdog:
    """Dumps all stacks and aborts the process with 134 if `beat` is not called for `hang_seconds`.

    A peer that is stuck in Python still sends heartbeats to the coordinator, so JAX would wait for it forever; only the
    lack of progress reveals it. `hang_seconds` must exceed the time of a compilation. 0 turns the watchdog off.
    """

    def __init__(self, hang_seconds: float) -> None:
        self._limit = float(hang_seconds)
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Starts the watching thread."""
        self._thread.start()

    def end(self) -> None:
        """Stops the watching thread."""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Reports progress."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def limited_to(self, hang_seconds: float) -> Iterator[None]:
        """Uses another limit inside the block, such as that of a stage."""
        before, self._limit = self._limit, float(hang_seconds)
        self.beat()
        try:
            yield
        finally:
            self._limit = before
            self.beat()

    def _watch(self) -> None:
        wait = 0.0
        while not self._ended.wait(wait):
            limit = self._limit
            left = self._last + limit - time.monotonic() if limit > 0 else _POLL_SECONDS
            if left <= 0:
                self._abort(limit)
            wait = min(left, _POLL_SECONDS)
            if limit > 0:
                # If a call hangs without releasing the interpreter, this thread stops as well. Then the C-level timer
                # ends the process; its exit status is always 1.
                faulthandler.dump_traceback_later(left + limit, file=_STDERR, exit=True)
            else:
                faulthandler.cancel_dump_traceback_later()

    def _abort(self, limit: float) -> NoReturn:
        log.critical("no progress for %g s (train.hang_seconds): stacks of all threads follow; aborting", limit)
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        os._exit(ABORTED)


_watchdog: Watchdog | None = None


@contextlib.contextmanager
def watched(hang_seconds: float) -> Iterator[None]:
    """Aborts with 134 if `beat` is not called for `hang_seconds` inside the block; an inner block has its own limit.

    Raises:
      KeyboardInterrupt: SIGINT was received, and a library suppressed the first KeyboardInterrupt.
    """
    global _watchdog
    if _stop is not None:
        _stop.started()
    if _watchdog is not None:
        with _watchdog.limited_to(hang_seconds):
            yield
        return
    _watchdog = Watchdog(hang_seconds)
    _watchdog.start()
    try:
        yield
        beat()
    finally:
        _watchdog.end()
        _watchdog = None


def is_watched() -> bool:
    """Returns whether the process is inside `watched`."""
    return _watchdog is not None


def beat() -> None:
    """Reports progress: a step, a sample, a batch, a file. Cheap; has no effect outside `watched`.

    Raises:
      KeyboardInterrupt: SIGINT was received, and a library suppressed the first KeyboardInterrupt (main thread only).
    """
    if _watchdog is None:
        return
    _watchdog.beat()
    if was_interrupted() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
