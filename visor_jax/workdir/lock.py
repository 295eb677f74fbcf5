"""Locks a workdir for one run; the lock names its holder and is released when the holder dies.

In: the path of the lock file. Out: a context manager; inside it, no other run of this workdir is alive. On the same
machine the holder's process is looked up. A lock from another machine is held while its heartbeat changes; the waiting
run observes it for a while, so clocks need not agree. A preempted run that resumes on another machine can therefore
take over its old lock. In a bucket the lock is an object that is created only if absent, and replaced or removed only
if it has not changed since it was read.

Of several processes of one run, process 0 takes the lock and the others wait for it.
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
from visor_jax.files.bucket import SharedObject, is_bucket
from visor_jax.files.leftovers import remove_leftovers
from visor_jax.files.read_write import parse_json, read_regular, write_bytes
from visor_jax.workdir.supervision import before_exit

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
MAX_BYTES = 2**16  # of a lock file
WATCH_SECONDS = 35.0  # three beats and a margin for a slow file system


class WorkdirLock:
    """Holds the lock from `with` to the end of its block; a killed process loses it too."""

    def __init__(self, path: Path, *, beat_seconds: float = BEAT_SECONDS, watch_seconds: float = WATCH_SECONDS) -> None:
        self._path = path
        self._beat_seconds, self._watch_seconds = beat_seconds, watch_seconds
        self._me: dict[str, Any] = {**this_process(), "token": uuid.uuid4().hex, "beat": 0}
        self._shared = SharedObject(path) if is_bucket(path) else None
        self._released = threading.Event()
        self._heart: threading.Thread | None = None

    @property
    def token(self) -> str:
        """A text in the lock file that no other run's lock has."""
        return self._me["token"]

    def __enter__(self) -> Self:
        """Acquires the lock.

        Raises:
          RequestError: another live run holds the lock; the message names its machine and process.
        """
        last_holder = None
        while True:
            with self._guard():
                holder, version = self._read()
                free = holder is None or holder == last_holder or is_gone(holder)
                # The answer to a write that succeeded may have been lost; then the lock is ours already.
                if self._is_mine(holder) or (free and self._write(version)):
                    break
            if free:
                continue  # another run was faster; only in a bucket, where nothing guards
            assert holder is not None
            if last_holder is not None or is_local(holder):
                raise RequestError(
                    f"--workdir: {self._path.parent} is in use by another run ({describe(holder)});"
                    f" expected a folder of its own, or {self._path.name} removed once that run is surely dead"
                )
            log.warning(
                "%s: held by %s; watching %.0f s for a sign of life", self._path, describe(holder), self._watch_seconds
            )
            last_holder = holder
            time.sleep(self._watch_seconds)
        if holder is not None and not self._is_mine(holder):
            log.warning("%s: taken over from a dead run (%s)", self._path, describe(holder))
        before_exit(lambda status: self._leave())
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
            try:
                with self._guard():
                    self._leave()
            except OSError as failure:  # another run takes the lock over once it has watched it
                log.warning("%s: cannot be released: %s", self._path, failure)

    def _leave(self) -> None:
        """Releases the lock; before an immediate exit without waiting for the guard."""
        holder, version = self._read()
        if self._is_mine(holder):
            self._remove(version)

    def _beat(self) -> None:
        while not self._released.wait(self._beat_seconds):
            try:
                with self._guard():
                    holder, version = self._read()
                    mine = self._is_mine(holder)
                    if mine:
                        self._me["beat"] += 1
                        # The answer to a write that succeeded may be lost: what is stored now decides.
                        mine = self._write(version) or self._is_mine(self._read()[0])
            except OSError as error:
                log.warning("%s: heartbeat not written: %s", self._path, error)
                continue
            if not mine:
                # This machine stalled for so long that another run took over; two writers would corrupt the workdir.
                log.critical("%s: lost to another run; aborting", self._path)
                os._exit(ABORTED)

    def _is_mine(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and holder.get("token") == self._me["token"]

    def _read(self) -> tuple[dict[str, Any] | None, bytes]:
        """Returns (holder; None if there is no lock or its content is invalid, version of the object in a bucket).

        Raises:
          RequestError: the path is a folder, a device or a file that is too large.
        """
        version = b""
        try:
            if self._shared is not None:
                content, version = self._shared.read()
            else:
                content = read_regular(self._path, MAX_BYTES)
            holder = None if content is None else parse_json(content)
        except (FileNotFoundError, ValueError):
            return None, version
        except OSError as error:
            if self._shared is not None:
                raise
            problem = error.strerror or error
            raise RequestError(f"{self._path}: is not a lock ({problem}); expected a file of a run, or none") from error
        if not isinstance(holder, dict) or not {"host", "pid", "token"} <= holder.keys():
            return None, version
        known = isinstance(holder["host"], str) and type(holder["pid"]) is int and isinstance(holder["token"], str)
        return (holder if known else None), version

    def _write(self, version: bytes) -> bool:
        """Writes this process as the holder; in a bucket only over the version that was read. Returns whether."""
        data = json.dumps(self._me).encode()
        if self._shared is not None:
            return self._shared.write(data, version)
        write_bytes(self._path, data)
        return True

    def _remove(self, version: bytes) -> None:
        if self._shared is not None:
            self._shared.write(None, version)
        else:
            self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Makes reading and writing atomic if the file system supports locks; in a bucket, versions do that."""
        if self._shared is not None:
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
    """Returns machine, boot, process id and start time, which together identify a process uniquely."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}


def is_local(holder: dict[str, Any]) -> bool:
    """Returns whether the holder's process id can be looked up here: same machine, boot and container."""
    return holder["host"] == socket.gethostname() and holder.get("boot") == _boot()


def is_gone(holder: dict[str, Any]) -> bool:
    """Returns whether the holder is certainly dead: it ran here, and its process does not exist.

    The start time is compared too, because process ids are reused, often by the next run in a restarted container.
    """
    if not is_local(holder):
        return False
    started = _started(holder["pid"])
    return started is None or started != holder.get("started")


def describe(holder: dict[str, Any]) -> str:
    """Returns the holder's machine and process for a message."""
    return f"host {holder['host']}, process {holder['pid']}"


def _boot() -> str:
    """Returns the ids of this boot and of this container's process namespace."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: object) -> str | None:
    """Returns a local process's start time (kernel ticks); "" if /proc does not give it; None if it does not exist."""
    if not isinstance(pid, int):
        return None
    try:
        # The second field, the program's name, may contain spaces and brackets, so count from the last bracket.
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
