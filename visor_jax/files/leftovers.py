"""What killed processes left behind: unfinished files and folders beside their places, and how they are told.

In: a folder. Out: nothing that a dead process of this machine was still writing. Whatever is written whole or not at
all is written beside its place under `temporary_name`, which says by which process of which machine. So a file of a
live process, or of another machine that shares the file system, is never touched.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_NAME = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]{1,10})(@(?P<host>[^/]*))?\.(?P<kind>tmp|partial|old)", re.DOTALL)
_BEGAN = time.time()


def temporary_name(name: str, kind: str) -> str:
    """Under which name this process writes what is to become `name`.

    Args:
      name: of a file or folder.
      kind: "tmp" for files, "partial" for folders, "old" for what is being replaced.
    """
    return f".{name}.{os.getpid()}@{socket.gethostname()}.{kind}"


def remove_leftovers(folder: Path) -> None:
    """Remove what dead processes of this machine left anywhere below a local folder; for the holder of its lock."""
    if "://" in os.fspath(folder):
        return
    found = list(_leftovers(folder))
    for path in found:
        _remove(path)
    if found:
        shown = ", ".join(str(path.relative_to(folder)) for path in found[:3])
        log.info("%s: removed %d leftovers of killed processes (%s)", folder, len(found), shown)


def remove_leftovers_of(target: Path) -> None:
    """Remove what dead processes of this machine left of one file or folder, beside it."""
    for path in list(_matching(target.parent, os.listdir(target.parent))):
        if _parts(path.name)["name"] == target.name:
            _remove(path)


def _leftovers(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder, onerror=lambda _: None):
        found = list(_matching(Path(place), [*folders, *files]))
        yield from found
        folders[:] = sorted(set(folders) - {path.name for path in found})


def _matching(place: Path, names: list[str]) -> Iterator[Path]:
    for name in names:
        if name.startswith(".") and _NAME.fullmatch(name) and _is_dead(place / name):
            yield place / name


def _parts(name: str) -> dict[str, str | None]:
    match = _NAME.fullmatch(name)
    return match.groupdict() if match else {"name": None}


def _is_dead(path: Path) -> bool:
    """Whether the process that was writing `path` ran on this machine and is no more."""
    parts = _parts(path.name)
    if parts["host"] not in (None, socket.gethostname()):
        return False
    pid = int(parts["pid"] or 0)
    if pid == os.getpid():  # given out again, as in a container that was started anew
        try:
            return path.lstat().st_mtime < _BEGAN - 1
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return pid == 0


def _remove(path: Path) -> None:
    """Remove one; a folder that was being replaced when its process was killed is put back instead."""
    parts = _parts(path.name)
    place = path.with_name(str(parts["name"]))
    try:
        if parts["kind"] == "old" and not place.exists():
            path.rename(place)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: left by a killed process, cannot be removed: %s", path, error.strerror or error)
