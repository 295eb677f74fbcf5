"""Validates a question, its pictures and the settings of its answer before anything is computed.

In: the user's arguments. Out: an `Example` and a `Request`. Every invalid argument is a `RequestError`, including a
sample that training would skip.
"""

from __future__ import annotations

import io
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits
from visor_jax.config.data_fields import DEFAULT_MAX_PIXELS
from visor_jax.data.chat import mark_pictures
from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.collate import Example, encode_prompt, encode_tokens
from visor_jax.data.images import FORMATS, decode_image, read_image
from visor_jax.data.row_shape import RowShape
from visor_jax.data.sample import SkipSample
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.data.video_limits import VideoLimits
from visor_jax.data.videos import read_video
from visor_jax.errors import RequestError
from visor_jax.files.read_write import as_path
from visor_jax.generate.sampling import Sampling

# A picture file's path or its bytes; a PIL image; uint8 [H, W, 3]; a video's frames, uint8 [F, H, W, 3].
Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
Pictures = Picture | Iterable[Picture] | None  # one, several in order, or none
History = Iterable[tuple[str, str]]  # earlier turns of the conversation: a question and its answer each
QuestionItem = tuple[Pictures, str] | tuple[Pictures, str, History]

ONE_PICTURE = str | os.PathLike | bytes | bytearray | memoryview | Image.Image
EXPECTED_PICTURE = (
    "expected a picture file's path or bytes, a PIL image, uint8 [H, W, 3], or the frames of a video, uint8"
    " [F, H, W, 3]"
)
EXPECTED_FILE = f"expected a {', '.join(FORMATS)} file of at most {DEFAULT_MAX_PIXELS:,} pixels"
EXPECTED_HISTORY = "expected earlier turns, [(question, answer), ...]"
EXPECTED_QUESTION = "expected (image, question) or (image, question, history)"
CHARACTERS_PER_TOKEN = 32  # no real text has more on average; longer questions are rejected before tokenization
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """Settings of an answer.

    Attributes:
      budget: its bits; None if the policy decides.
      dial: shifts the policy's choice.
      max_new_tokens: maximum length of the answer.
      sampling: settings of token selection.
      stops: ids of the tokens that end an answer.
    """

    budget: Bits | None
    dial: float
    max_new_tokens: int
    sampling: Sampling
    stops: frozenset[int]

    def __post_init__(self) -> None:
        most = self.max_new_tokens
        if not isinstance(most, numbers.Integral) or isinstance(most, bool) or most < 1:
            raise RequestError(f"max_new_tokens={self.max_new_tokens!r}: expected a whole number, at least 1")
        if not isinstance(self.dial, numbers.Real) or not math.isfinite(self.dial):
            raise RequestError(f"dial={self.dial!r}: expected a finite number")


# --- the conversation -------------------------------------------------------------------------------------------------


def prompt_of(
    image: Pictures,
    question: str,
    tokenizer: ChatTokenizer,
    arch: Architecture,
    system: str | None,
    history: History = (),
    origin: tuple[int, int] | None = None,
) -> Example:
    """Encodes a question about any number of pictures or videos, with the earlier turns of the conversation.

    `<image>` in a question, also an earlier one, marks a picture's position. Without markers all pictures precede the
    first question, as in training. With `origin` the one picture keeps its size in its tile (`data.small_pictures`).
    """
    question, turns = checked_question(question), checked_history(history)
    pictures = [pixels(picture, name) for name, picture in each_picture(image)]
    check_length(question, turns, arch)
    *earlier_questions, latest = mark_pictures([*(earlier for earlier, _ in turns), question], len(pictures))
    marked = list(zip(earlier_questions, (answer for _, answer in turns), strict=True))
    return usable(
        partial(encode_prompt, pictures, latest, tokenizer, arch, system=system, history=marked, origin=origin)
    )


def checked_question(question: str) -> str:
    """Returns the question; raises RequestError if it is not text or empty."""
    if not isinstance(question, str):
        raise RequestError(f"question: expected text, got {type(question).__name__}")
    if not question.replace(IMAGE_MARKER, "").strip():
        raise RequestError("question: is empty; ask something about the picture")
    return question


def checked_history(history: Any) -> list[tuple[str, str]]:
    """Returns the turns as pairs of text; raises RequestError that names an invalid turn."""
    if history is None:
        return []
    if isinstance(history, str | bytes | dict) or not isinstance(history, Iterable):
        raise RequestError(f"history: {EXPECTED_HISTORY}, got {type(history).__name__}")
    turns = list(history)
    for number, turn in enumerate(turns):
        if not isinstance(turn, tuple | list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RequestError(f"history[{number}]: {EXPECTED_HISTORY}, got {brief(turn)}")
        if not turn[1].strip():
            raise RequestError(f"history[{number}]: its answer is empty; leave the turn out")
        if IMAGE_MARKER in turn[1]:
            raise RequestError(f"history[{number}]: {IMAGE_MARKER} is in an answer; expected it in questions only")
    return [(question, answer) for question, answer in turns]


def check_length(question: str, turns: Sequence[tuple[str, str]], arch: Architecture) -> None:
    """Raises RequestError for text that is far too long, before tokenizing it."""
    characters = len(question) + sum(len(earlier) + len(answer) for earlier, answer in turns)
    most = CHARACTERS_PER_TOKEN * arch.text.max_positions
    if characters > most:
        raise RequestError(
            f"question: {characters:,} characters with its history; expected at most {most:,}, which is more than the"
            f" {arch.text.max_positions:,} positions of this model hold"
        )


def check_fits(length: int, size: RowShape, max_new_tokens: int, arch: Architecture) -> None:
    """Raises RequestError if a prompt of `length` positions and its answer exceed those of the model."""
    most = arch.text.max_positions
    if length + max_new_tokens > most:
        raise RequestError(
            f"question: {length:,} positions ({size.text:,} of text, {size.visual:,} of pictures)"
            f" and max_new_tokens={max_new_tokens:,} are more than the {most:,} of this model; ask less at once"
        )


def checked_stops(stop: Any) -> list[str]:
    """Returns the texts that end an answer; accepts one, several, or None."""
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, Iterable):
        raise RequestError(f"stop={stop!r}: expected texts of one token each")
    stops = list(stops)
    for text in stops:
        if not isinstance(text, str):
            raise RequestError(f"stop: expected texts of one token each, got {brief(text)}")
    return stops


def checked_item(item: Any) -> tuple[Pictures, str, History]:
    """Returns one item of a list of questions as (image, question, history)."""
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise RequestError(f"{EXPECTED_QUESTION}, got {brief(item)}")
    image, question, *rest = item
    return image, question, rest[0] if rest else ()


def tokens_of(token_ids: Sequence[int], images: Pictures, tokenizer: ChatTokenizer, arch: Architecture) -> Example:
    """Encodes token ids that contain one placeholder id per picture."""
    pictures = [pixels(picture, name) for name, picture in each_picture(images)]
    most = arch.text.vocab_size
    if not all(isinstance(token, int | np.integer) and 0 <= token < most for token in token_ids):
        raise RequestError(f"token_ids: expected whole numbers from 0 to {most - 1}, got {list(token_ids)[:8]!r}...")
    return usable(partial(encode_tokens, token_ids, pictures, tokenizer.image_token_id, arch))


# --- pictures ---------------------------------------------------------------------------------------------------------


def each_picture(image: Any) -> Iterable[tuple[str, Any]]:
    """Yields (name for messages, picture) for one picture, several, or none (None or an empty list)."""
    if image is None:
        return []
    is_one = isinstance(image, ONE_PICTURE | dict) or hasattr(image, "__array__") or hasattr(image, "read")
    if is_one or not isinstance(image, Iterable):
        return [("image", image)]
    return ((f"image[{number}]", picture) for number, picture in enumerate(image))


def pixels(image: Any, name: str = "image") -> np.ndarray:
    """Returns a picture as uint8 [H, W, 3], or a video's frames as [F, H, W, 3]; `name` is its name in messages.

    Paths and bytes are decoded as in training; a PIL image like the file that it was opened from.

    Raises:
      RequestError: the type is not supported, the file does not exist, or it cannot be decoded.
    """
    try:
        if isinstance(image, str | os.PathLike):
            return _of_path(os.fspath(image), name)
        if isinstance(image, bytes | bytearray | memoryview):
            return decode_image(io.BytesIO(image), DEFAULT_MAX_PIXELS, f"{len(image):,} bytes")
        if isinstance(image, Image.Image):
            return decode_image(image, DEFAULT_MAX_PIXELS, type(image).__name__)
    except SkipSample as why:
        raise RequestError(f"{name}: {why}; {EXPECTED_FILE}") from None
    if not hasattr(image, "__array__"):
        hint = "; of an open file pass what .read() returns" if hasattr(image, "read") else ""
        raise RequestError(f"{name}: {EXPECTED_PICTURE}, got {type(image).__name__}{hint}")
    try:
        array = np.asarray(image)
    except Exception as error:  # a user's __array__ may raise anything
        why = f"{type(error).__name__}: {error}"
        raise RequestError(f"{name}: {EXPECTED_PICTURE}, got {type(image).__name__} ({why})") from None
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or array.size == 0:
        raise RequestError(f"{name}: {EXPECTED_PICTURE}, got {array.dtype} {array.shape}")
    return array


def video_frames(path: str, max_frames: int, name: str = "video") -> np.ndarray:
    """Reads a video's file or folder as in training, at most `max_frames` frames: uint8 [F, H, W, 3].

    Raises:
      RequestError: the file does not exist or cannot be decoded.
    """
    if max_frames < 1:
        raise RequestError(f"max_frames={max_frames}: expected 1 or more")
    try:
        return read_video(as_path(path), VideoLimits(max_frames), shown=path)
    except SkipSample as why:
        raise RequestError(f"{name}: {why}") from None


def _of_path(path: str | bytes, name: str) -> np.ndarray:
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if URL.match(path):
        raise RequestError(f"{name}={path[:200]!r}: is an address; expected a file, download it first")
    return read_image(as_path(path), DEFAULT_MAX_PIXELS, shown=path)


def brief(value: Any) -> str:
    """Describes a wrong value for a message: its type, and its repr if that is short."""
    shown = repr(value)
    return f"{type(value).__name__} {shown}" if len(shown) <= 60 else type(value).__name__


def usable(make: Callable[[], Example]) -> Example:
    """Returns the result of `make`; turns SkipSample into RequestError."""
    try:
        return make()
    except SkipSample as why:
        hint = f"; put one {IMAGE_MARKER} for each picture, or none at all" if why.reason == "image_count" else ""
        raise RequestError(f"{why}{hint}") from None
