"""The two kinds of expected errors, and helpers for their messages.

Standard library only. `visor_jax.commands.command_line` turns them, and an `OSError` (`from_os_error`), into an exit
status and one line on stderr. Any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import unicodedata
from collections.abc import Iterable
from typing import Any

STOPPED = 143  # exit status after SIGTERM (128 + 15): saved and stopped; run it again to continue
INTERRUPTED = 130  # exit status after SIGINT (128 + 2): stopped from the keyboard
ABORTED = 134  # exit status of watchdogs (128 + SIGABRT)


class RequestError(Exception):
    """The request is wrong: exit status 2. The message names field or file, its value, and the expected values."""


class RunError(Exception):
    """A valid request failed while running: exit status 1.

    Attributes:
      result: the command's result despite the failure, which `--json` prints; or None.
    """

    def __init__(self, message: str = "", result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result


# System errors that make the request wrong: the path does not exist, is not accessible, is of another kind, or has too
# long a name. All other system errors are failures while running.
REQUEST_ERRNOS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENXIO, errno.EINVAL),
}


def unwritable(place: str, error: OSError) -> RequestError | RunError:
    """Returns the error for an unwritable `place`: RunError for a full disk, RequestError for a wrong path."""
    return (RequestError if error.errno in REQUEST_ERRNOS else RunError)(
        f"{place}: cannot be written: {_reason(error)}"
    )


def from_os_error(error: OSError) -> RequestError | RunError | None:
    """Converts an error of the operating system; None if it names no path.

    An exhausted resource (`ENOSPC`, `EMFILE`, ...) is converted even without a path.
    """
    if error.filename is None:
        exhausted = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
        return RunError(_reason(error)) if error.errno in exhausted else None
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return (RequestError if error.errno in REQUEST_ERRNOS else RunError)(f"{place}: {_reason(error)}")


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def printable(text: str) -> str:
    """Escapes every character of `text` that is neither visible nor a space, for a terminal or a log line.

    Names from data can then neither control a terminal nor start a new line, and every character can be encoded.
    Letters of all scripts stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def one_line(text: str) -> str:
    """Applies `printable` and replaces every run of white space by one space, so that a message has one line."""
    return printable(" ".join(text.split()))


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Suggests known names similar to `name`.

    Args:
      name: the name that was given.
      known: the valid names.
      prefix: common prefix, such as "--", which is ignored in the comparison.

    Returns:
      "did you mean 'x'?", with at most three names, best first; "" if none is similar.
    """
    by_folded = {candidate.removeprefix(prefix).casefold(): candidate for candidate in known}
    folded = name.removeprefix(prefix).casefold()
    matches = [repr(by_folded[match]) for match in difflib.get_close_matches(folded, by_folded, n=3)]
    return f"did you mean {' or '.join(matches)}?" if matches else ""


def short(value: Any) -> str:
    """Returns the beginning of a value's JSON, for a message."""
    text = value if value == "(none)" else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
