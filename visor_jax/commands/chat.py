"""`visor generate --chat`: a conversation in the terminal.

In: lines of stdin. Out: streamed answers on stdout, receipts and errors on stderr, and with `--json` one object per
question. After an error in a line, the chat prints it and reads the next line.
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
/image FILE     start again with this picture (without FILE: without a picture)
/new            start again with the same pictures
/budget NAME    auto, full, empty, a number of slots, or bits such as 0b10
/help           this text
An empty line or Ctrl-D ends the chat, Ctrl-C stops an answer."""


class Chat:
    """A conversation: pictures, earlier turns, and settings of the answers.

    Args:
      model: the model.
      pictures: of the conversation.
      history: earlier turns, (question, answer) each.
      budget: of the answers; `/budget` changes it.
      settings: keyword arguments of `Visor.stream`.
      quiet: yield answers as objects without printing them.
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
        """Answers `question`, if given, and then every line; yields an object for each.

        An object holds "question" and the fields of `Answer`; for a stopped answer "question", "text" and "stopped";
        for an error "question" and "error".
        """
        for line in self._lines(question):
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    yield {"question": line, **self._ask(line)}
            except RequestError as error:
                message = " ".join(str(error).split())
                print(f"visor: {message}", file=sys.stderr)
                yield {"question": line, "error": message}

    def _lines(self, question: str | None) -> Iterator[str]:
        line = next_line() if question is None else question
        while line:
            yield line
            line = next_line()

    def _ask(self, question: str) -> dict[str, Any]:
        """Answers a question; the answer, even if stopped, becomes a turn of the conversation."""
        stream = self.model.stream(self.pictures, question, self._budget, history=self.history, **self._settings)
        pieces: list[str] = []
        try:
            answer = self._print_answer(stream, pieces)
        except KeyboardInterrupt:
            answer = None
            print("(stopped)", file=sys.stderr)
        text = "".join(pieces)
        if text.strip():  # an empty answer is not a turn
            self.history.append((question, text))
        return {"text": text, "stopped": True} if answer is None else dataclasses.asdict(answer)

    def _print_answer(self, stream: AnswerStream, pieces: list[str]) -> Any:
        show: Callable[..., None] = (lambda *_, **__: None) if self._quiet else print
        try:
            for piece in stream:
                pieces.append(piece)
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
    """Reads the user's next line, stripped; "" at the end of the input."""
    if sys.stdin is None:  # closed by the parent process
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
