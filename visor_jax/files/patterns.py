"""Expands the name of one or several local files: `*`, `?`, `[...]`, `**` and `{a,b}`, as shells do.

In: a folder and a name. Out: paths in sorted order. A file that exists under the very name is meant itself, whatever
characters the name has.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from visor_jax.files.read_write import as_path

_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")
_MAGIC = re.compile(r"[*?\[]")
MAX_FILES = 100_000  # of one pattern


def expand(root: str | os.PathLike[str], name: str) -> list[Path]:
    """Returns the files that a name below a folder means.

    Args:
      root: the folder; ignored for an absolute name and for one with `~`.
      name: a file's name or a pattern. The alternatives of braces come in their order, matches of `*` sorted.

    Returns:
      Paths. A name without `*`, `?` or `[` gives a path even if there is no such file; a pattern that matches nothing
      gives no path.
    """
    path = _below(root, name)
    if "://" in str(path) or os.path.lexists(path):
        return [path]
    found: list[Path] = []
    for alternative in _alternatives(name):
        path = _below(root, alternative)
        if not _MAGIC.search(alternative) or os.path.lexists(path):
            found.append(path)
            continue
        if alternative.startswith("~"):
            pattern = os.path.expanduser(alternative)
        else:
            pattern = os.path.join(glob.escape(str(as_path(root))), alternative)  # an absolute one stays as it is
        found += map(Path, sorted(glob.glob(pattern, recursive=True)))
    return list(dict.fromkeys(found))[:MAX_FILES]


def is_pattern(name: str) -> bool:
    """Returns whether a name may mean several files."""
    return bool(_MAGIC.search(name) or _BRACES.search(name))


def _below(root: str | os.PathLike[str], name: str) -> Path:
    return as_path(name) if name.startswith("~") or "://" in name else as_path(root) / name


def _alternatives(name: str) -> list[str]:
    """Returns "a1b" and "a2b" for "a{1,2}b"; several braces multiply."""
    match = _BRACES.search(name)
    if match is None:
        return [name]
    choices = match[1].split(",")
    whole = [f"{name[: match.start()]}{choice.strip()}{name[match.end() :]}" for choice in choices]
    return [result for part in whole for result in _alternatives(part)][:MAX_FILES]
