"""The two ways in which what was asked does not come about, and the "did you mean" of their messages.

Ground floor: standard library only. `visor_jax.__main__` turns them into exit status and one line on stderr; everything
else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import Any

STOPPED = 143  # exit status after SIGTERM (128 + 15): stopped after saving, unfinished, to be started again
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


def unwritable(place: str, error: OSError) -> RequestError | RunError:
    """What to raise where `place` cannot be written: if it never could be, the request is wrong; a full disk is not."""
    never = FileExistsError | FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError
    kind = RequestError if isinstance(error, never) or error.errno == errno.EROFS else RunError
    return kind(f"{place}: cannot be written: {error.strerror or error}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Which of `known` was probably meant.

    Args:
      name: what was given.
      known: the names there are.

    Returns:
      "did you mean 'x'?", with at most three names, best first; "" where nothing is near.
    """
    by_folded = {candidate.casefold(): candidate for candidate in known}
    found = [repr(by_folded[near]) for near in difflib.get_close_matches(name.casefold(), by_folded, n=3)]
    return f"did you mean {' or '.join(found)}?" if found else ""
