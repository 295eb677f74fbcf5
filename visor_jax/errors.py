"""The two ways in which what was asked does not come about, and how their messages are worded.

Ground floor: standard library only. `visor_jax.commands.command_line` turns them into exit status and one line on
stderr, and an `OSError` too (`of_system`); everything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import unicodedata
from collections.abc import Iterable
from typing import Any

STOPPED = 143  # exit status after SIGTERM (128 + 15): stopped after saving, unfinished, to be started again
INTERRUPTED = 130  # exit status after SIGINT (128 + 2): stopped from the keyboard
ABORTED = 134  # exit status of watchdogs (128 + SIGABRT)


class RequestError(Exception):
    """The request is wrong: exit status 2. The message names field or file, its value, and what is expected."""


class RunError(Exception):
    """The request was right and running it failed: exit status 1.

    `result` is what the command found all the same; `--json` prints it as it would have been printed.
    """

    def __init__(self, message: str = "", result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result


# What the system answers when a request cannot be met as it was asked, whenever it is tried: such a path does not
# exist, may not be read or written, is something else, or has too long a name. Anything else ran out while running.
NEVER = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENXIO, errno.EINVAL),
}


def unwritable(place: str, error: OSError) -> RequestError | RunError:
    """What to raise where `place` cannot be written: if it never could be, the request is wrong; a full disk is not."""
    return (RequestError if error.errno in NEVER else RunError)(f"{place}: cannot be written: {_reason(error)}")


def of_system(error: OSError) -> RequestError | RunError | None:
    """The one line for an error of the operating system that nobody has worded; None where it names no path.

    Errors without a path that say that something ran out (`ENOSPC` of a write, `EMFILE`) are worded without one.
    """
    if error.filename is None:
        exhausted = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
        return RunError(_reason(error)) if error.errno in exhausted else None
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return (RequestError if error.errno in NEVER else RunError)(f"{place}: {_reason(error)}")


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def printable(text: str) -> str:
    """`text` for a terminal or a log line: what is not a visible character or a space is written as its escape.

    So names that come with data can neither steer a terminal nor begin a line of their own, and every character can be
    encoded. Letters of all scripts stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def one_line(text: str) -> str:
    """`printable`, with every run of white space as one space: a message as one line, whatever it quotes."""
    return printable(" ".join(text.split()))


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Which of `known` was probably meant.

    Args:
      name: what was given.
      known: the names there are.
      prefix: what they all begin with, such as "--": it makes none nearer than another.

    Returns:
      "did you mean 'x'?", with at most three names, best first; "" where nothing is near.
    """
    by_folded = {candidate.removeprefix(prefix).casefold(): candidate for candidate in known}
    asked = name.removeprefix(prefix).casefold()
    found = [repr(by_folded[near]) for near in difflib.get_close_matches(asked, by_folded, n=3)]
    return f"did you mean {' or '.join(found)}?" if found else ""


def short(value: Any) -> str:
    """A value for a message: the beginning of its JSON."""
    text = value if value == "(none)" else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
