"""One run per workdir: a lock that names its holder and that a dead run cannot keep.

In: the path of the lock file. Out: a context manager; inside it, no other run of this workdir is alive. On the same
machine the holder's process is looked up; a lock of another machine counts as held while its heartbeat moves, which is
watched for a while and so needs no agreement between clocks (a preempted run comes back on another machine, its lock
still lying there).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from visor_jax.errors import ABORTED, RequestError
from visor_jax.files.leftovers import remove_leftovers
from visor_jax.files.read_write import parse_json, read_regular, write_bytes
from visor_jax.workdir.supervision import before_exit

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
MAX_BYTES = 2**16  # of a lock file
WATCH_SECONDS = 35.0  # three beats and a little: longer than a busy file system delays one


class WorkdirLock:
    """Held from `with` to the end of its block; released also when the process is killed."""

    def __init__(self, path: Path, *, beat_seconds: float = BEAT_SECONDS, watch_seconds: float = WATCH_SECONDS) -> None:
        self._path = path
        self._beat_seconds, self._watch_seconds = beat_seconds, watch_seconds
        self._me: dict[str, Any] = {**this_process(), "token": uuid.uuid4().hex, "beat": 0}
        self._released = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Self:
        """
        Raises:
          RequestError: another live run holds the lock; names its machine and process.
        """
        seen = None
        while True:
            with self._guard():
                holder = self._read()
                if holder is None:
                    self._write()
                    break
                if holder == seen or is_gone(holder):
                    log.warning("%s: taken over from a dead run (%s)", self._path, describe(holder))
                    self._write()
                    break
            if seen is not None or is_local(holder):
                raise RequestError(
                    f"--workdir: {self._path.parent} is in use by another run ({describe(holder)});"
                    f" expected a folder of its own, or {self._path.name} removed once that run is surely dead"
                )
            log.warning(
                "%s: held by %s; watching %.0f s for a sign of life", self._path, describe(holder), self._watch_seconds
            )
            seen = holder
            time.sleep(self._watch_seconds)
        before_exit(self._leave)
        self._heart = threading.Thread(target=self._beat, name="workdir lock", daemon=True)
        self._heart.start()
        remove_leftovers(self._path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._released.set()
        if self._heart is not None:
            self._heart.join()
        with self._guard():
            if self._is_mine():
                self._path.unlink(missing_ok=True)

    def _leave(self) -> None:
        """Give the lock back where the process is ended at once: the guard is not waited for."""
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(self._beat_seconds):
            try:
                with self._guard():
                    mine = self._is_mine()
                    if mine:
                        self._me["beat"] += 1
                        self._write()
            except OSError as error:
                log.warning("%s: heartbeat not written: %s", self._path, error)
                continue
            if not mine:
                # This machine was away for so long that another run took over: two writers would ruin the workdir.
                log.critical("%s: lost to another run; aborting", self._path)
                os._exit(ABORTED)

    def _is_mine(self) -> bool:
        holder = self._read()
        return holder is not None and holder.get("token") == self._me["token"]

    def _read(self) -> dict[str, Any] | None:
        """The holder; None where there is no lock, or one that no run can have written.

        Raises:
          RequestError: there is something else in its place: a folder, a device, a file of megabytes.
        """
        try:
            holder = parse_json(read_regular(self._path, MAX_BYTES))
        except (FileNotFoundError, ValueError):
            return None
        except OSError as error:
            problem = error.strerror or error
            raise RequestError(f"{self._path}: is no lock ({problem}); expected a file of a run, or none") from error
        if not isinstance(holder, dict) or not {"host", "pid", "token"} <= holder.keys():
            return None
        known = isinstance(holder["host"], str) and type(holder["pid"]) is int and isinstance(holder["token"], str)
        return holder if known else None

    def _write(self) -> None:
        write_bytes(self._path, json.dumps(self._me).encode())

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Look and write as one act, where the file system can lock (buckets cannot: there the heartbeat decides)."""
        if "://" in os.fspath(self._path):
            yield
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path.parent, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL):
                    raise
            yield
        finally:
            os.close(handle)


def this_process() -> dict[str, Any]:
    """Machine, boot, process and its start: together they name one process for ever."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}


def is_local(holder: dict[str, Any]) -> bool:
    """Whether the holder's process id can be looked up here: same machine, same boot, same container."""
    return holder["host"] == socket.gethostname() and holder.get("boot") == _boot()


def is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder certainly lives no more: it ran here, and its process is not there.

    A process id alone would not do: it is given out again, in a restarted container often to the next run.
    """
    if not is_local(holder):
        return False
    started = _started(holder["pid"])
    return started is None or started != holder.get("started")


def describe(holder: dict[str, Any]) -> str:
    return f"host {holder['host']}, process {holder['pid']}"


def _boot() -> str:
    """This boot of the kernel and, within it, this container's world of process ids."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: object) -> str | None:
    """When a process of this machine started (kernel ticks); "" where /proc does not say; None when it is not there."""
    if not isinstance(pid, int):
        return None
    try:
        # The second field, the program's name, may hold spaces and brackets: count from its closing one.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        pass
    return ""
