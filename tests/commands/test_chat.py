"""`visor generate --chat` with a scripted model: turns, stops, commands, mistakes."""

from __future__ import annotations

import io
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from visor_jax.budget import Budget
from visor_jax.commands.chat import Chat
from visor_jax.errors import RequestError
from visor_jax.generate.answer import Answer, AnswerStream
from visor_jax.generate.visor import Visor

ANSWER = Answer("", "full", 1e9, 0.1, 0.2, 100, 5e8, complete=True, new_tokens=0, seconds_compiling=0.0)


class Parrot:
    """Repeats every question in two pieces and records the requests; "stop" raises KeyboardInterrupt in between."""

    def __init__(self) -> None:
        self.requests: list[tuple[Any, str, str, list[tuple[str, str]]]] = []

    def stream(self, image: Any, question: str, budget: Any, *, history: Any, **settings: Any) -> AnswerStream:
        assert settings == {"max_new_tokens": 3}
        if question == "bad":
            raise RequestError("question: is\nbad")
        self.requests.append((image, question, str(budget), list(history)))
        return AnswerStream(self._pieces(question))

    def _pieces(self, question: str) -> Generator[str, None, Answer]:
        if question == "nothing":
            return ANSWER
        yield f"{question}, "
        if question == "stop":
            raise KeyboardInterrupt
        yield question
        return ANSWER


def talk(monkeypatch: pytest.MonkeyPatch, typed: str, first: str | None = None, **changes: Any) -> tuple[Parrot, list]:
    parrot = Parrot()
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    model = cast(Visor, parrot)
    chat = Chat(model, ["picture"], [("a", "b")], Budget.parse("full"), {"max_new_tokens": 3}, **changes)
    return parrot, list(chat.run(first))


def test_each_question_continues_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parrot, rows = talk(monkeypatch, " one \ntwo\n\nnot asked\n", first="zero")
    turns = [("a", "b"), ("zero", "zero, zero"), ("one", "one, one")]
    assert [request[3] for request in parrot.requests] == [turns[:1], turns[:2], turns]
    assert [row["question"] for row in rows] == ["zero", "one", "two"]
    assert rows[0] == {"question": "zero", **vars(ANSWER)}
    captured = capsys.readouterr()
    assert captured.out == "zero, zero\none, one\ntwo, two\n"
    assert captured.err.count("budget full; 1.0000 GFLOP") == 3


def test_for_json_nothing_but_the_objects_is_for_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, rows = talk(monkeypatch, "one", quiet=True)
    assert len(rows) == 1 and capsys.readouterr().out == ""


def test_an_answer_that_is_stopped_is_a_turn_as_far_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    parrot, rows = talk(monkeypatch, "stop\nnothing\nthen\n")
    assert rows[0] == {"question": "stop", "text": "stop, ", "stopped": True}
    assert parrot.requests[-1][3] == [("a", "b"), ("stop", "stop, ")], "a turn without text is not recorded"


def test_what_else_may_be_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "red one.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    parrot, rows = talk(
        monkeypatch, "one\n/budget empty\n/image ~/red one.png\ntwo\n/new\nthree\n/image\nfour\n/help\n"
    )
    assert not [row for row in rows if "error" in row]
    pictures, questions, budgets, histories = zip(*parrot.requests, strict=True)
    assert questions == ("one", "two", "three", "four") and budgets == ("full", "empty", "empty", "empty")
    assert [len(history) for history in histories] == [1, 0, 0, 0]
    assert pictures[0] == ["picture"] and pictures[3] == []
    assert np.array_equal(pictures[1], pictures[2]) and np.shape(pictures[1]) == (1, 2, 3, 3)
    assert "/budget NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bad", "question: is bad"),
        ("/imgae x", "/imgae: unknown; expected /image, /new, /budget, /help, or a question"),
        ("/image none.png", "/image none.png: missing_file"),
        ("/budget fulll", "did you mean 'full'"),
    ],
)
def test_a_wrong_request_is_reported_and_the_chat_continues(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parrot, rows = talk(monkeypatch, f"{line}\nthen\n")
    assert message in rows[0]["error"] and rows[0]["question"] == line
    assert f"visor: {rows[0]['error']}\n" in capsys.readouterr().err
    assert [request[1] for request in parrot.requests] == ["then"]


def test_a_closed_stdin_and_one_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(cast(Visor, Parrot()), [], [], Budget.parse("full"), {})
    monkeypatch.setattr("sys.stdin", None)
    assert list(chat.run(None)) == []
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(RequestError, match="stdin: expected UTF-8"):
        list(chat.run(None))
