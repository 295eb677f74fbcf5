"""Requests that are refused before the model runs: pictures, questions and settings, each with its message."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visor_jax import testing
from visor_jax.errors import RequestError
from visor_jax.generate.engine import Engine
from visor_jax.loading import Visor

TOKENIZER = testing.almanac_tokenizer()
WIDE = testing.random_picture(20, 90, seed=0)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([WIDE], r"questions\[0\]: expected \(image, question\) or \(image, question, history\), got ndarray"),
        ([(WIDE, "What?"), (WIDE,)], r"questions\[1\]: expected \(image, question\)"),
        ([(WIDE, "What?"), (WIDE, " ")], r"questions\[1\]: question: is empty"),
        ([(WIDE, "What?", [("a", "")])], r"questions\[0\]: history\[0\]: its answer is empty"),
        (["ab"], r"questions\[0\]: expected .* got str 'ab'"),
        ("ab", "questions: expected .* got str"),
        (5, "questions: expected .* got int"),
        (None, "questions: expected .* got NoneType"),
    ],
)
def test_invalid_lists_of_questions_are_refused(questions: Any, message: str, model: Visor) -> None:
    with pytest.raises(RequestError, match=message):
        model.answer_many(questions, "empty", max_new_tokens=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "0b01"}, "'0b01' has 2 bits, the model has 1 slots"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": ["several tokens"]}, r"'several tokens' is \d+ tokens, expected one"),
        ({"stop": [""]}, "'' is 0 tokens"),
        ({"stop": "ab c"}, r"'ab c' is \d+ tokens"),
        ({"stop": [5]}, "stop: expected texts of one token each, got int 5"),
        ({"stop": 5}, "stop=5: expected texts of one token each"),
        ({"max_new_tokens": 40_000}, r"max_new_tokens=40,000 are more than the 32,768 of this model"),
        ({"history": "What? red"}, r"history: expected earlier turns, \[\(question, answer\), \.\.\.\], got str"),
        ({"history": 5}, "history: expected earlier turns.* got int"),
        ({"history": ["ab"]}, r"history\[0\]: expected earlier turns.* got str 'ab'"),
        ({"history": [("a", "b"), ("a", "b", "c")]}, r"history\[1\]: expected earlier turns"),
        ({"history": [("a", 3)]}, r"history\[0\]: expected earlier turns.* got tuple \('a', 3\)"),
        ({"history": [("a", " ")]}, r"history\[0\]: its answer is empty"),
        ({"history": [("a", "an <image>")]}, r"history\[0\]: <image> is in an answer"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": "0.5"}, "temperature='0.5': expected a number"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number"),
        ({"seed": None}, "seed=None: expected a whole number"),
        ({"dial": "1"}, "dial='1': expected a finite number"),
        ({"max_new_tokens": True}, "max_new_tokens=True: expected a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected a whole number"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(
    settings: dict[str, Any], message: str, model: Visor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "prefill_shared", lambda *_, **__: pytest.fail("the engine was called"))
    many = lambda *question, history=(), **how: model.answer_many([(*question, history)], **how)  # noqa: E731
    for ask in (model.answer, model.stream, many):
        with pytest.raises(RequestError, match=message):
            ask(WIDE, "Which digit is below A?", **settings)


@pytest.mark.parametrize(
    ("image", "question", "message"),
    [
        ([[WIDE]], "What?", r"image\[0\]: expected a picture file's path or bytes, a PIL image.* got list"),
        (5, "What?", "image: expected .* got int"),
        ({"bytes": b""}, "What?", "image: expected .* got dict"),
        (WIDE.astype(float), "What?", r"image: expected .* got float64 \(20, 90, 3\)"),
        ("photo.jpg", "What?", "image: missing_file: 'photo.jpg': No such file.*; expected a JPEG"),
        ([WIDE, Path("/")], "What?", r"image\[1\]: unsafe_path: '/' is not a regular file"),
        ("https://example.org/photo.jpg", "What?", "image='https://example.org/photo.jpg': is an address"),
        (b"no picture", "What?", "image: image_format: 10 bytes is not a"),
        (b"", "What?", "image: image_format: 0 bytes is not a"),
        (WIDE, "<image>", "question: is empty"),
        (WIDE, None, "question: expected text, got NoneType"),
        (WIDE, 5, "question: expected text, got int"),
        (None, "Is <image> red?", "1 <image> markers for 0 pictures; put one <image> for each picture"),
        (None, "a" * (32 * 32_768 + 1), "question: 1,048,577 characters with its history; expected at most 1,048,576"),
        (None, "A a " * 17_000, "positions .* of text, 0 of pictures.* max_new_tokens=64 are more than the 32,768"),
    ],
)
def test_invalid_pictures_and_questions_are_refused(image: Any, question: Any, message: str, model: Visor) -> None:
    with pytest.raises(RequestError, match=message):
        model.answer(image, question, "full")


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (io.BytesIO, "image: expected .* got BytesIO; of an open file pass what .read"),
        (lambda png: Image.open(io.BytesIO(png[:-40])), "image: broken_image: PngImageFile"),
        (lambda png: png[:-40], "image: broken_image"),
    ],
    ids=["open file", "truncated PIL image", "truncated bytes"],
)
def test_an_open_or_truncated_file_is_refused(
    encoded: Callable[[bytes], Any], message: str, model: Visor, png: bytes
) -> None:
    with pytest.raises(RequestError, match=message):
        model.answer(encoded(png), "What?", "full")


@pytest.mark.parametrize("tokens", [[5, TOKENIZER.vocab_size], [5, -1], [5.7, 2], ["5"], [[5, 6]], [5, 2**40]])
def test_token_ids_outside_the_vocabulary_are_refused(model: Visor, tokens: Any) -> None:
    with pytest.raises(RequestError, match=f"token_ids: expected whole numbers from 0 to {TOKENIZER.vocab_size - 1}"):
        model.logits(tokens, [])
