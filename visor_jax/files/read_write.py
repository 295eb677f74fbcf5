"""Reads regular files of bounded size, and writes files atomically.

Imports no JAX. In: a path, local or in a bucket (`gs://...`). All reads of untrusted files use `open_regular`,
`read_regular` or `read_json`: a FIFO or a device never blocks the reader, a file that is too large is rejected before
it is read, and JSON that is nested too deeply or contains a number with thousands of digits is rejected as unparsable.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from visor_jax.errors import RequestError
from visor_jax.files.bucket import bucket_errors, check_scheme, is_bucket
from visor_jax.files.leftovers import remove_leftovers_of, temporary_name

MAX_JSON_BYTES = 16 * 2**20  # default limit for a JSON file
MAX_TOKENIZER_BYTES = 64 * 2**20  # of a tokenizer.json; one with 250,000 tokens has 35 MB

# --- reading ----------------------------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike[str], max_bytes: int | None = None) -> BinaryIO:
    """Opens a regular local file of bounded size for reading; follows links.

    Args:
      path: the file.
      max_bytes: maximum size; None for any.

    Returns:
      The open file; close it, or use it in a `with` block.

    Raises:
      OSError: the file cannot be opened, is not regular (`errno.EINVAL`; IsADirectoryError for a folder) or is larger
        than `max_bytes` (`errno.EFBIG`). `strerror` describes the reason.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        info = os.fstat(handle)
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
        if max_bytes is not None and info.st_size > max_bytes:
            raise _too_large(path, info.st_size, max_bytes)
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def read_regular(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Reads a regular file or a bucket's object of at most `max_bytes`.

    Raises:
      OSError: as `open_regular`; also if the file holds more bytes than its reported size.
    """
    place = as_path(path)
    if is_bucket(place):
        with bucket_errors(place):
            size = cast(Any, place.stat()).length
            if size > max_bytes:
                raise _too_large(path, size, max_bytes)
            return place.read_bytes()
    with open_regular(place, max_bytes) as file:
        data = file.read(max_bytes + 1)  # files in /proc report size 0 and hold more
    if len(data) > max_bytes:
        raise _too_large(path, len(data), max_bytes)
    return data


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Reads a JSON file.

    Raises:
      RequestError: the file is missing, not regular, larger than `max_bytes`, or not valid JSON; the message names the
        file and, if known, the line.
    """
    try:
        return parse_json(read_regular(path, max_bytes))
    except FileNotFoundError as error:
        raise RequestError(f"{path}: no such file") from error
    except ValueError as error:
        raise RequestError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_json(data: bytes | str) -> Any:
    """Parses JSON text; bytes are UTF-8, with or without a byte order mark.

    Raises:
      ValueError: it is invalid, nested too deeply, or contains an integer with thousands of digits.
    """
    try:
        return json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _too_large(path: str | os.PathLike[str], size: int, max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"File too large: {size:,} bytes, expected at most {max_bytes:,}", os.fspath(path))


# --- writing ----------------------------------------------------------------------------------------------------------


def as_path(path: str | os.PathLike[str]) -> Path:
    """Returns a local path as `pathlib.Path` with `~` expanded, or a bucket's path as `etils.epath.Path`.

    Raises:
      RequestError: the kind of bucket is unknown, or the package that reads it is not installed.
    """
    text = os.fspath(path)
    if not is_bucket(text):
        return Path(os.path.expanduser(text))
    _check_scheme(text.partition("://")[0])
    from etils import epath

    # etils' remote paths have pathlib's methods and are not a subclass.
    return cast(Path, epath.Path(text))


_check_scheme = functools.cache(check_scheme)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file or a bucket's object atomically; creates parent folders."""
    target = as_path(path)
    if is_bucket(target):
        with bucket_errors(target):
            target.write_bytes(data)  # one request: readers see the old object or the new one
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file_beside(target) as file:
            file.write(data)
    except OSError as error:
        if error.errno is None:
            raise
        # The error of a full disk has no path.
        raise OSError(error.errno, error.strerror, os.fspath(target)) from error


@contextlib.contextmanager
def file_beside(target: Path) -> Iterator[BinaryIO]:
    """Yields a new temporary file that replaces a local `target`, flushed to disk, if the block succeeds.

    Raises:
      OSError: the file cannot be written, or the target exists and is not a regular file (a device in /dev must not be
        replaced by a file).
    """
    with contextlib.suppress(FileNotFoundError):
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(target))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "Not a regular file", os.fspath(target))
    temporary = target.with_name(temporary_name(target.name, "tmp"))
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def replaceable(path: str | os.PathLike[str]) -> Path:
    """Resolves the links of a user's output path, so that a link is never replaced by a file.

    Raises:
      OSError: the path is a folder, a device or a FIFO; replacing /dev/null by a file would break the machine.
    """
    target = as_path(path)
    if is_bucket(target):
        return target
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        number = errno.EISDIR if target.is_dir() else errno.EINVAL
        raise OSError(number, os.strerror(number) if target.is_dir() else "Not a regular file", os.fspath(path))
    return target


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries, so that a rename in it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def folder_beside(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a new temporary folder that becomes a local `target`, flushed to disk, if the block succeeds.

    If the block fails, the folder is removed. Leftovers of a killed process are removed first.

    Args:
      target: the folder to write; its parents are created.
      replace: also replace an existing folder.

    Raises:
      OSError: the folder cannot be written, or the target exists.
    """
    folder = target.with_name(temporary_name(target.name, "partial"))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers_of(target)
    folder.mkdir()
    try:
        yield folder
        _flush(folder)
        if replace and target.is_dir():
            old = target.with_name(temporary_name(target.name, "old"))
            target.replace(old)
            folder.replace(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder, local or in a bucket, with all its files; it need not exist."""
    if is_bucket(folder):
        with contextlib.suppress(FileNotFoundError), bucket_errors(folder):
            cast(Any, folder).rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flushes all files and folders below a folder."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON; NaN and Inf, which JSON lacks, become null."""
    write_text(path, json.dumps(finite_or_null(value), indent=2, allow_nan=False) + "\n")


def finite_or_null(value: Any) -> Any:
    """Returns `value` with None for NaN and Inf, lists for tuples, and Python numbers for numpy scalars."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value
