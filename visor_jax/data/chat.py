"""Encodes conversations as token ids in the template of `chat_template`, with a mask of the training targets.

In: a tokenizer and turns. Out: ids with exactly one `<image>` id per picture (`collate` replaces it by the picture's
visual positions) and a target mask. Only the template makes chat tokens: chat tokens written in a question or an
answer are encoded as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visor_jax.data.chat_template import (
    ASSISTANT,
    IMAGE_MARKER,
    NEWLINE,
    SYSTEM,
    USER,
    header,
    image_first,
    images_before,
)
from visor_jax.data.sample import SkipSample, Turn
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.errors import RequestError

TARGETS = ("answer", "llava")


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation's token ids, and for each id whether it is a target; both lists have the same length."""

    token_ids: list[int]
    target_mask: list[bool]


def encode_conversation(
    tokenizer: ChatTokenizer,
    turns: Sequence[Turn],
    *,
    system: str | None = None,
    targets: str = "answer",
    num_images: int = 1,
) -> EncodedConversation:
    """Encodes a whole conversation for training.

    A single `<image>` marker in a question moves to the front, on a separate line; several markers keep their places.
    If no question has a marker and there is one picture, the picture comes before the first question. White space
    around an answer is removed.

    Args:
      tokenizer: encodes the text.
      turns: questions and answers, in order.
      system: the system text; None or "" omits the system turn.
      targets: "answer": each answer and its <|im_end|>. "llava": as in LLaVA's training code, the assistant's whole
        turn with its header, and every "\\n", <|im_start|> and <|im_end|> token anywhere.
      num_images: number of pictures in the conversation.

    Raises:
      SkipSample: "image_count" if the number of markers is not `num_images` (markers in answers count too),
        "empty_conversation" if there is no turn or an answer is blank, "bad_text" for half a surrogate pair.
      RequestError: `targets` is unknown.
    """
    if targets not in TARGETS:
        raise RequestError(f"loss.targets: expected one of {', '.join(TARGETS)}, got {targets!r}")
    if not turns:
        raise SkipSample("empty_conversation", "no turns")
    _check_answers([turn.answer for turn in turns])
    answers = [turn.answer.strip() for turn in turns]
    questions = _place_images([turn.question for turn in turns], answers, num_images)
    encoder = _Encoder(tokenizer, targets)
    encoder.system(system)
    for question, answer in zip(questions, answers, strict=True):
        encoder.question(question)
        encoder.answer(answer)
    return EncodedConversation(encoder.token_ids, encoder.target_mask)


def encode_prompt(
    tokenizer: ChatTokenizer,
    question: str,
    num_images: int = 1,
    system: str | None = None,
    history: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Returns the token ids of a prompt for the answer to `question`; they end in "<|im_start|>assistant\\n".

    These are the ids that `encode_conversation` puts before that answer. `history` holds earlier turns, (question,
    answer) each. Raises SkipSample as `encode_conversation`.
    """
    _check_answers([answer for _, answer in history])
    answers = [answer.strip() for _, answer in history]
    *earlier, latest = _place_images([*(past for past, _ in history), question], answers, num_images)
    encoder = _Encoder(tokenizer, "answer")
    encoder.system(system)
    for past, answer in zip(earlier, answers, strict=True):
        encoder.question(past)
        encoder.answer(answer)
    encoder.question(latest)
    encoder.header()
    return encoder.token_ids


class _Encoder:
    """Collects token ids and their target mask, turn by turn."""

    def __init__(self, tokenizer: ChatTokenizer, targets: str) -> None:
        self.token_ids: list[int] = []
        self.target_mask: list[bool] = []
        self._tokenizer = tokenizer
        self._whole_turn = targets == "llava"
        structure = {*tokenizer.encode(NEWLINE), tokenizer.start_token_id, tokenizer.end_token_id}
        self._always = structure if self._whole_turn else set()

    def system(self, text: str | None) -> None:
        """Adds the system turn if there is a system text."""
        if text:
            self._read(header(SYSTEM) + text)

    def question(self, question: str) -> None:
        """Adds the user's turn, with an image id at every marker."""
        self._read(*(header(USER) + question).split(IMAGE_MARKER))

    def header(self) -> None:
        """Adds the assistant's header; it is encoded separately from the answer, as in `encode_prompt`."""
        self._add([self._tokenizer.start_token_id, *self._tokenizer.encode(header(ASSISTANT))], self._whole_turn)

    def answer(self, answer: str) -> None:
        """Adds the assistant's turn."""
        self.header()
        self._add([*self._tokenizer.encode(answer), self._tokenizer.end_token_id], True)
        self._add(self._tokenizer.encode(NEWLINE), self._whole_turn)

    def _read(self, text: str, *after_images: str) -> None:
        """Adds a turn that is not a target. Encodes the text between special tokens in one piece, as transformers."""
        ids = [self._tokenizer.start_token_id, *self._tokenizer.encode(text)]
        for piece in after_images:
            ids += [self._tokenizer.image_token_id, *self._tokenizer.encode(piece)]
        self._add([*ids, self._tokenizer.end_token_id, *self._tokenizer.encode(NEWLINE)], False)

    def _add(self, ids: list[int], target: bool) -> None:
        self.token_ids += ids
        self.target_mask += [target or token in self._always for token in ids]


def mark_pictures(questions: Sequence[str], num_images: int) -> list[str]:
    """Returns the questions of a chat; if there are several pictures and no marker, all come before the first question.

    A single picture needs no marker.
    """
    if num_images > 1 and not any(IMAGE_MARKER in question for question in questions):
        return [images_before(questions[0], num_images), *questions[1:]]
    return list(questions)


def _check_answers(answers: Sequence[str]) -> None:
    """Raises SkipSample if a turn has no answer."""
    for number, answer in enumerate(answers, 1):
        if not answer.strip():
            raise SkipSample("empty_conversation", f"turn {number} has no answer")


def _place_images(questions: list[str], answers: list[str], num_images: int) -> list[str]:
    """Returns the questions with one marker per picture, single markers in front; raises SkipSample."""
    for text in (*questions, *answers):
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can hold half a surrogate pair, which no tokenizer accepts
            raise SkipSample("bad_text", f"half a surrogate pair in {text[:60]!a}") from None
    markers = sum(text.count(IMAGE_MARKER) for text in (*questions, *answers))
    if markers == 0 and num_images == 1:
        questions, markers = [images_before(questions[0], 1), *questions[1:]], 1
    if markers != num_images:
        raise SkipSample("image_count", f"{markers} {IMAGE_MARKER} markers for {num_images} pictures")
    return [image_first(question) if question.count(IMAGE_MARKER) == 1 else question for question in questions]
