"""Resolves a record's picture name to a file, and checks that the file is in the data folder.

In: a folder and a name from a data set. Out: the real path of an existing file, or `SkipSample`. Opens no file.

Accepted names: relative, absolute below the folder, with Windows' backslashes, with `..` that stays inside, in another
Unicode normalization than the file system's (archives made on a Mac hold decomposed names). A name never leads out of
the folder; a link inside it may, but only if `data.follow_links` is set.
"""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from pathlib import Path

from visor_jax.data.sample import SkipSample

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.IGNORECASE)
_NOT_PLAIN = re.compile(r"\\|^/|(^|/)\.{0,2}(/|$)")  # a backslash, an absolute name, a part that is empty, "." or ".."
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def resolve_under(root: Path, name: str, follow_links: bool = False) -> Path:
    """Returns the real path of an existing file under `root`.

    Args:
      root: the folder that no name may leave.
      name: relative to `root`, or absolute and below it.
      follow_links: whether links inside the folder may lead out of it.

    Raises:
      SkipSample: "unsafe_path" (the name leaves the folder, itself or through a link; "~", a URL, NUL), "missing_file".
    """
    if "\0" in name or name.startswith("~") or _SCHEME.match(name):
        raise SkipSample("unsafe_path", f"{name[:200]!r} is not a plain path under the data folder")
    try:
        base = root.resolve(strict=True)
        path = _find(base, _relative(base, root, name)).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # missing, too long, not encodable, a loop of links
        hint = "; a path with a drive comes from another computer" if _DRIVE.match(name) else ""
        cause = getattr(error, "strerror", None) or str(error)
        raise SkipSample("missing_file", f"{name[:200]!r}: {cause}{hint}") from None
    if not follow_links and not path.is_relative_to(base):
        raise SkipSample(
            "unsafe_path",
            f"{name[:200]!r} leads out of the data folder through a link; data.follow_links=True allows that",
        )
    return path


def plain_name(root: Path, name: str) -> str:
    """Returns one spelling for all names of the same file under `root`; does not read the disk."""
    if name.isascii() and not _NOT_PLAIN.search(name):
        return name
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    top = f"{os.path.abspath(root).rstrip('/')}/"
    if posixpath.isabs(name):
        name = posixpath.normpath("/" + name.lstrip("/")).removeprefix(top)
    return posixpath.normpath(name)


def _relative(base: Path, root: Path, name: str) -> str:
    """Returns `name` relative to the folder, without "." and ".."; raises SkipSample if it leaves the folder."""
    if not os.path.lexists(base / name):
        name = name.replace("\\", "/")
    if posixpath.isabs(name):
        roots = (os.path.abspath(root), str(base))
        plain = posixpath.normpath("/" + name.lstrip("/"))
        inside = next((plain[len(top) :] for top in roots if f"{plain}/".startswith(f"{top.rstrip('/')}/")), None)
        if inside is None:
            raise SkipSample("unsafe_path", f"{name[:200]!r} is an absolute path outside the data folder")
        name = inside.lstrip("/")
    plain = posixpath.normpath(name)
    if plain == ".." or plain.startswith("../"):
        raise SkipSample("unsafe_path", f"{name[:200]!r} leads out of the data folder")
    return plain


def _find(base: Path, name: str) -> Path:
    """Returns the path as spelled on disk; only the Unicode normalization of its parts may differ from `name`."""
    path = base / name
    if name.isascii() or os.path.lexists(path):
        return path
    path = base
    for part in name.split("/"):
        spellings = dict.fromkeys((part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))))
        path = path / next((spelling for spelling in spellings if os.path.lexists(path / spelling)), part)
    return path
