"""Files that grow at their end: logs and metrics, on a disk or in a bucket.

Imports no JAX. A local file takes every write at once. A bucket's object cannot be appended to, so it is kept in memory
and replaced as a whole by `flush`; what was written since the last `flush` is lost with the process.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Protocol

from visor_jax.files.bucket import is_bucket, make_folder
from visor_jax.files.read_write import read_regular, write_bytes

MAX_BYTES = 2**31  # of a bucket's object, which is kept in memory


class GrowingFile(Protocol):
    """A file that is open for writing at its end."""

    def write(self, data: bytes) -> object:
        """Adds bytes at the end."""

    def flush(self) -> None:
        """Stores everything written so far, so that it survives this process and this machine."""

    def close(self) -> None:
        """Flushes and closes."""


def open_growing(path: Path) -> GrowingFile:
    """Opens a file, new or existing, for writing at its end; creates its folder.

    Raises:
      OSError: it cannot be opened, or a bucket's object cannot be read.
    """
    make_folder(path.parent)
    return _GrowingObject(path) if is_bucket(path) else _GrowingLocalFile(path)


class _GrowingLocalFile:
    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes) -> None:
        """Adds bytes in one call of the operating system, so that a kill loses all or nothing of them."""
        if os.write(self._handle, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        os.fsync(self._handle)

    def close(self) -> None:
        os.fsync(self._handle)
        os.close(self._handle)


class _GrowingObject:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._content = bytearray(read_regular(path, MAX_BYTES))
        except FileNotFoundError:
            write_bytes(path, b"")  # it exists from now on, as a local file does
            self._content = bytearray()
        self._stored = len(self._content)

    def write(self, data: bytes) -> None:
        self._content += data

    def flush(self) -> None:
        if len(self._content) > self._stored:
            write_bytes(self._path, bytes(self._content))
            self._stored = len(self._content)

    def close(self) -> None:
        self.flush()
