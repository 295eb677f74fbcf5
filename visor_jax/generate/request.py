"""What is asked, checked before anything is computed: pictures, question, and how the answer is to be given.

In: what a user passes. Out: an `Example` and a `Request`. Whatever is wrong is a `RequestError`, also a sample that
training would skip.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits
from visor_jax.config_schema import MAX_PIXELS
from visor_jax.data import chat
from visor_jax.data.collate import Example, encode_prompt, encode_tokens
from visor_jax.data.images import decode_image
from visor_jax.data.sample import SkipSample
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.errors import RequestError
from visor_jax.generate.sampling import Sampling

Picture = Image.Image | np.ndarray  # an array of four axes is a video: its frames, uint8 [F, H, W, 3]


@dataclass(frozen=True)
class Request:
    """How a question is to be answered.

    Attributes:
      budget: its bits; None where the policy decides.
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


def prompt_of(
    image: Picture | Sequence[Picture],
    question: str,
    tokenizer: ChatTokenizer,
    arch: Architecture,
    system: str | None,
) -> Example:
    """A question about a picture or a video, several, or none (an empty sequence).

    Where each belongs is told by `<image>` in the question; without it they come first.
    """
    question = checked_question(question)
    pictures = [pixels(one) for one in image] if isinstance(image, Sequence) else [pixels(image)]
    if len(pictures) > 1 and chat.IMAGE_MARKER not in question:  # they come first, as a single one does
        question = f"{chat.IMAGE_MARKER}\n" * len(pictures) + question
    return usable(partial(encode_prompt, pictures, question, tokenizer, arch, system=system))


def checked_question(question: str) -> str:
    if not isinstance(question, str):
        raise RequestError(f"question: expected text, got {type(question).__name__}")
    if not question.replace(chat.IMAGE_MARKER, "").strip():
        raise RequestError("question: is empty; ask something about the picture")
    return question


def tokens_of(
    token_ids: Sequence[int], images: Sequence[Picture], tokenizer: ChatTokenizer, arch: Architecture
) -> Example:
    """Token ids with one placeholder id per picture."""
    pictures = [pixels(image) for image in images]
    most = arch.text.vocab_size
    if not all(isinstance(token, int | np.integer) and 0 <= token < most for token in token_ids):
        raise RequestError(f"token_ids: expected whole numbers from 0 to {most - 1}, got {list(token_ids)[:8]!r}...")
    return usable(partial(encode_tokens, token_ids, pictures, tokenizer.image_token_id, arch))


def pixels(image: Picture) -> np.ndarray:
    """uint8 [H, W, 3] of a PIL image, read as a picture file is, or of an array; [F, H, W, 3] of a video's frames."""
    expected = "image: expected a PIL image, uint8 [H, W, 3], or the frames of a video, uint8 [F, H, W, 3], got "
    if not (isinstance(image, Image.Image) or hasattr(image, "__array__")):
        raise RequestError(f"{expected}{type(image).__name__}")
    try:
        array = np.asarray(decode_image(image, MAX_PIXELS) if isinstance(image, Image.Image) else image)
    except SkipSample as why:
        raise RequestError(f"image: {why}") from None
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or array.size == 0:
        raise RequestError(f"{expected}{array.dtype} {array.shape}")
    return array


def usable(make: Callable[[], Example]) -> Example:
    """What `make` gives; a sample that cannot be used is the caller's mistake here."""
    try:
        return make()
    except SkipSample as why:
        raise RequestError(str(why)) from None
