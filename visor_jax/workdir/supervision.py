"""What watches over a command from its first line to its last: signals that stop it, and a watchdog that ends a hang.

`supervised` gives the one `Stop` of this process. SIGTERM ends the process with 143 at once while there is nothing to
save (start-up, imports, compilation, search, evaluation); where a stage holds it back (`Stop.hold`), the loop asks
`should_stop` after each step, saves, and exits 143. SIGINT is a `KeyboardInterrupt`, and cannot be swallowed by a
library in a command that is watched. SIGUSR1 dumps all stacks and goes on.

`watched` aborts the process with 134 where no `beat` came for `train.hang_seconds`. Whatever a command does in a long
loop calls `beat` once per natural unit: a step, a sample, a batch, a file.

Standard library only, so that the entry point has it before anything else is imported.
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

GRACE_SECONDS = 3.0  # how long a watched command may take to end after SIGINT while nothing is being saved
LEAVE_SECONDS = 2.0  # how long what is done before an exit at once (giving back the lock) may take
_POLL_SECONDS = 1.0
_STDERR = 2  # the file descriptor: `sys.stderr` may have been replaced by something that has none


class Stop:
    """The signals of one command.

    Python runs a signal's handler only between two instructions of the main thread, so not while XLA compiles. A thread
    therefore reads the interpreter's wakeup descriptor and acts at once, whatever the main thread is in.

    With several processes JAX's preemption notifier makes all of them stop after the same step. It is a C handler that
    `jax.distributed.initialize` puts in the place of ours. `take_sigterm` puts ours back and remembers the notifier,
    which is told of SIGTERM only while the signal is held back: so a process that compiles ends at once as well.

    Attributes:
      interrupted: SIGINT has come.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._received = False  # SIGTERM has come
        self._held = False  # a stage has steps that are to be saved first
        self._starting = False  # nothing has begun yet: SIGINT too ends the process at once
        self._ending = False  # SIGTERM is being obeyed
        self._ended = False
        self._points = 0  # sync points passed, over all stages: JAX wants numbers that only grow
        self._notifier: Callable[[int], None] | None = None
        self._trampoline: int | None = None
        self._before_exit: list[Callable[[], None]] = []

    # --- what the loop asks -------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """From here on SIGTERM waits for `should_stop`: a step of the stage has ended, and there is a state to save."""
        self._held = True

    def should_stop(self) -> bool:
        """Whether to save and stop now; with several processes all of them must ask at every step."""
        if self.interrupted:
            raise KeyboardInterrupt  # it was swallowed on the way
        if _process_count() == 1:
            return self._received
        from jax.experimental import multihost_utils

        self._points += 1
        return bool(multihost_utils.reached_preemption_sync_point(self._points))

    @contextlib.contextmanager
    def until_complete(self, stage: str) -> Iterator[None]:
        """Around a stage that may `hold` the signal: where its block ends well, a signal held back is obeyed now.

        Raises:
          SystemExit: 143; the stage is complete, and no other one is to begin.
        """
        self.take_sigterm()
        try:
            yield
            self._ending = _any_process(self._received)
        except BaseException:
            self._ending = self._received  # the block is ending anyway, and may take its time
            raise
        finally:
            self._held = False
        # Read once more: before the line above the signal was kept, after it the process ends by itself.
        if self._ending or self._received:
            log.warning("%s: complete; stopped by SIGTERM", stage)
            raise SystemExit(STOPPED)

    def before_exit(self, action: Callable[[], None]) -> None:
        """Have `action` done before the process is ended at once; it must be quick and may run in any thread."""
        self._before_exit.append(action)

    def started(self) -> None:
        """There may be something to clean up from here on: SIGINT is a `KeyboardInterrupt`, no exit at once."""
        self._starting = False

    # --- receiving ----------------------------------------------------------------------------------------------------

    def take_sigterm(self) -> None:
        """Own SIGTERM, also where `jax.distributed.initialize` has given it to JAX's notifier in the meantime."""
        if self._trampoline is None or threading.current_thread() is not threading.main_thread():
            return
        handler = _set_c_handler(None)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._adopt(handler)

    def _adopt(self, handler: int) -> None:
        """Remember a C handler of SIGTERM that is not Python's."""
        if handler > 1 and handler != self._trampoline:  # 0 and 1: the default action, ignored
            import ctypes

            self._notifier = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._received = True  # the listener does the rest

    def _on_sigint(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        if self._starting:  # extension modules that are being imported print or swallow a KeyboardInterrupt
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    def _listen(self, reading: int) -> None:
        """In a thread: hear of signals at once."""
        while received := os.read(reading, 1):
            if received[0] == signal.SIGTERM:
                self._received = True
                if self._ending:
                    continue
                if not self._held:
                    self._exit(STOPPED, "SIGTERM received: nothing to save, stopping")
                log.warning("SIGTERM received: saving and stopping after this step")
                if self._notifier is not None:
                    self._notifier(signal.SIGTERM)
            elif received[0] == signal.SIGINT and self._may_insist():
                threading.Thread(target=self._insist, name="interrupt", daemon=True).start()
        os.close(reading)

    def _may_insist(self) -> bool:
        """Whether SIGINT may end the process by force: not in a command that handles it, nor while a stage saves."""
        return _watchdog is not None and not self._held and not self._ended

    def _insist(self) -> None:
        """A `KeyboardInterrupt` may be swallowed, or wait for a compilation: end the process all the same."""
        time.sleep(GRACE_SECONDS)
        if self._may_insist():
            self._exit(INTERRUPTED, "interrupted")

    def _exit(self, status: int, message: str) -> NoReturn:
        """End the process now, from a thread of its own; nothing that hangs can hold it up."""
        leaving = threading.Thread(target=self._leave, args=(message,), daemon=True)
        leaving.start()
        leaving.join(LEAVE_SECONDS)
        os._exit(status)

    def _leave(self, message: str) -> None:
        log.warning("%s", message)
        for action in self._before_exit:
            with contextlib.suppress(Exception):
                action()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Own SIGTERM, SIGINT and SIGUSR1 inside the block; outside, they are as they were."""
        faulthandler.register(signal.SIGUSR1, file=_STDERR, all_threads=True, chain=False)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._listen, args=(reading,), name="stop signal", daemon=True).start()
        signal.signal(signal.SIGINT, self._on_sigint)
        handler = _set_c_handler(None)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._trampoline = _set_c_handler(None)  # what Python puts there for any handler of its own
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._adopt(handler)
        try:
            yield
        finally:
            self._ended = True
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            signal.set_wakeup_fd(wakeup)
            os.close(writing)  # ends the listener, which closes the other end
            faulthandler.unregister(signal.SIGUSR1)


_stop: Stop | None = None


@contextlib.contextmanager
def supervised(*, starting: bool = False) -> Iterator[Stop]:
    """The process's `Stop`: the one there is already, else a new one that owns the signals inside the block.

    Outside the main thread, which alone may set handlers, it never stops anything.

    Args:
      starting: until `Stop.started`, SIGINT ends the process at once with 130.
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
    """A child shares the wakeup pipe: a signal sent to it must not be taken for one of ours."""
    if _stop is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_a_forked_child)


def was_interrupted() -> bool:
    """Whether SIGINT has come during this command."""
    return _stop is not None and _stop.interrupted


def before_exit(action: Callable[[], None]) -> None:
    """Have `action` done before this process is ended at once; it must be quick and may run in any thread."""
    if _stop is not None:
        _stop.before_exit(action)


def _set_c_handler(handler: int | None) -> int:
    """Replace the handler of SIGTERM below Python's by an address (None: the default action); the one before."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    return libc.signal(signal.SIGTERM, handler) or 0


def _process_count() -> int:
    """Processes of this run; 1 while JAX is not even imported."""
    jax = sys.modules.get("jax")
    return 1 if jax is None else jax.process_count()


def _any_process(flag: bool) -> bool:
    """Whether the flag is up in any process; with several, all of them must ask."""
    if _process_count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


# --- the watchdog -----------------------------------------------------------------------------------------------------


class Watchdog:
    """Aborts the process with 134, after dumping all stacks, when no `beat` came for `hang_seconds`.

    A peer that is stuck in Python keeps its heartbeat to the coordinator, so JAX waits for it for ever; only the lack
    of progress tells. Compilation counts too: `hang_seconds` must be longer. 0 turns the watchdog off.
    """

    def __init__(self, hang_seconds: float) -> None:
        self._limit = float(hang_seconds)
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Say that the command has made progress."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def limited_to(self, hang_seconds: float) -> Iterator[None]:
        """Another limit inside the block: that of a stage."""
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
                # Should a call hang without releasing the interpreter, this thread stands still as well: then the
                # C-level timer ends the process (its exit status is 1, which cannot be chosen).
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
    """Abort with 134 where no `beat` comes for `hang_seconds` inside the block; an inner block has a limit of its own.

    Raises:
      KeyboardInterrupt: SIGINT came and was swallowed on the way.
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
    """Whether a command that takes long is at its work."""
    return _watchdog is not None


def beat() -> None:
    """Say that the command has made progress: a step, a sample, a batch, a file. Costs nothing, works everywhere.

    Raises:
      KeyboardInterrupt: SIGINT came and was swallowed on the way (in a watched command, in its main thread).
    """
    if _watchdog is None:
        return
    _watchdog.beat()
    if was_interrupted() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
