"""`visor generate --chat`: a conversation in the terminal.

In: lines of stdin. Out: answers on stdout while they come, receipts and mistakes on stderr, and for `--json` one object
for each question. A mistake in a line ends nothing: it is told, and the next line is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

from visor_jax.budget import Budget
from visor_jax.commands.generate import receipt
from visor_jax.errors import RequestError
from visor_jax.generate.answer import AnswerStream
from visor_jax.generate.request import pixels
from visor_jax.generate.visor import Visor

HELP = """\
/image FILE     start anew, with this picture (without FILE: without a picture)
/new            start anew, with the same pictures
/budget NAME    auto, full, empty, a number of slots, or bits such as 0b100
/help           this
An empty line or Ctrl-D ends, Ctrl-C stops an answer."""


class Chat:
    """A conversation: its pictures, the turns so far, and how to answer.

    Args:
      settings: keyword arguments of `Visor.stream`.
      quiet: answers are yielded as objects only, not printed.
    """

    def __init__(
        self,
        model: Visor,
        pictures: list[Any],
        history: list[tuple[str, str]],
        budget: Budget,
        settings: dict[str, Any],
        *,
        quiet: bool = False,
    ):
        self.model, self.pictures, self.history = model, pictures, history
        self._budget, self._settings, self._quiet = budget, settings, quiet

    def run(self, question: str | None) -> Iterator[dict[str, Any]]:
        """Answers `question`, where there is one, and then every line; yields an object for each.

        An object holds "question" and the fields of `Answer`; of an answer that was stopped "question", "text" and
        "stopped"; of what could not be answered "question" and "error".
        """
        for line in self._lines(question):
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    yield {"question": line, **self._ask(line)}
            except RequestError as error:
                told = " ".join(str(error).split())
                print(f"visor: {told}", file=sys.stderr)
                yield {"question": line, "error": told}

    def _lines(self, question: str | None) -> Iterator[str]:
        line = next_line() if question is None else question
        while line:
            yield line
            line = next_line()

    def _ask(self, question: str) -> dict[str, Any]:
        """Asks; what is said, also up to where it is stopped, becomes a turn of the conversation."""
        stream = self.model.stream(self.pictures, question, self._budget, history=self.history, **self._settings)
        said: list[str] = []
        try:
            answer = self._tell(stream, said)
        except KeyboardInterrupt:
            answer = None
            print("(stopped)", file=sys.stderr)
        text = "".join(said)
        if text.strip():  # a turn without an answer is no turn
            self.history.append((question, text))
        return {"text": text, "stopped": True} if answer is None else dataclasses.asdict(answer)

    def _tell(self, stream: AnswerStream, said: list[str]) -> Any:
        show: Callable[..., None] = (lambda *_, **__: None) if self._quiet else print
        try:
            for piece in stream:
                said.append(piece)
                show(piece, end="", flush=True)
        finally:
            show(flush=True)
        print(receipt(stream.answer), file=sys.stderr)
        return stream.answer

    def _command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/image":
            self.pictures = [pixels(value, f"/image {value}")] if value else []
            self.history = []
        elif name == "/new":
            self.history = []
        elif name == "/budget":
            self._budget = Budget.parse(value)
        elif name == "/help":
            print(HELP, file=sys.stderr)
        else:
            raise RequestError(f"{name}: unknown; expected /image, /new, /budget, /help, or a question")


def next_line() -> str:
    """The next line that the user types, without white space around it; "" at the end."""
    if sys.stdin is None:  # closed by who started us
        return ""
    try:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return sys.stdin.readline().strip()
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys, for `input`
        return input("> ").strip()
    except EOFError:
        print()
        return ""
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin: expected UTF-8: {error}") from None
