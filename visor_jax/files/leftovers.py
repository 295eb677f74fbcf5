"""Removes the unfinished files and folders of killed processes.

In: a folder. Out: the folder without the temporary files of dead processes of this machine. Atomic writes go to a
`temporary_name` next to the target, which contains process id and host name. Files of live processes, or of other
machines on a shared file system, are never removed.
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
    """Returns the name under which this process writes the future `name`.

    Args:
      name: of a file or folder.
      kind: "tmp" for files, "partial" for folders, "old" for a folder that is being replaced.
    """
    return f".{name}.{os.getpid()}@{socket.gethostname()}.{kind}"


def remove_leftovers(folder: Path) -> None:
    """Removes the leftovers of dead processes of this machine below a local folder; only for the holder of its lock."""
    if "://" in os.fspath(folder):
        return
    leftovers = list(_leftovers(folder))
    for path in leftovers:
        _remove(path)
    if leftovers:
        shown = ", ".join(str(path.relative_to(folder)) for path in leftovers[:3])
        log.info("%s: removed %d leftovers of killed processes (%s)", folder, len(leftovers), shown)


def remove_leftovers_of(target: Path) -> None:
    """Removes the leftovers of dead processes of this machine for one file or folder."""
    for path in list(_matching(target.parent, os.listdir(target.parent))):
        if _parts(path.name)["name"] == target.name:
            _remove(path)


def _leftovers(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder, onerror=lambda _: None):
        leftovers = list(_matching(Path(place), [*folders, *files]))
        yield from leftovers
        folders[:] = sorted(set(folders) - {path.name for path in leftovers})


def _matching(place: Path, names: list[str]) -> Iterator[Path]:
    for name in names:
        if name.startswith(".") and _NAME.fullmatch(name) and _is_dead(place / name):
            yield place / name


def _parts(name: str) -> dict[str, str | None]:
    match = _NAME.fullmatch(name)
    return match.groupdict() if match else {"name": None}


def _is_dead(path: Path) -> bool:
    """Returns whether the process that wrote `path` ran on this machine and no longer exists."""
    parts = _parts(path.name)
    if parts["host"] not in (None, socket.gethostname()):
        return False
    pid = int(parts["pid"] or 0)
    if pid == os.getpid():  # the id was reused, as in a restarted container
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
    """Removes a leftover; restores a folder instead if its process was killed while replacing it."""
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
