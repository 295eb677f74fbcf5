"""Conversations as token ids, in the chat template that the model was trained with (template_visor.py).

In: questions, messages as `apply_chat_template` takes them, or a prompt that a chat template rendered, and the number
of visual tokens of each picture. Out: token ids, each picture as its run of placeholders. In questions and messages,
chat tokens come from the template only: what looks like one in somebody's text is encoded as plain text. Only in a
rendered prompt do they count, because there nobody can tell who wrote them.
This file travels inside every export; it needs tokenizers (which transformers brings) only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from .template_visor import (
    ASSISTANT,
    CHAT_TOKENS,
    END,
    IMAGE_MARKER,
    NEWLINE,
    PAD,
    START,
    SYSTEM,
    USER,
    header,
    image_first,
    images_before,
)

SOURCES = ("image", "url", "path", "base64")  # keys of a message's picture that say where it is
_SPECIAL = re.compile("(" + "|".join(map(re.escape, CHAT_TOKENS)) + ")")


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each whether the assistant said it (its answers, each with its <|im_end|>)."""

    ids: list[int]
    said: list[bool]


@dataclass(frozen=True)
class Message:
    """One turn; `text` has one marker for each of its pictures, `sources` says where they are (None: unsaid)."""

    role: str
    text: str
    sources: tuple[Any, ...]


class ChatEncoder:
    """Encodes with one tokenizer.

    Attributes:
        start_id, end_id, pad_id: ids of the chat tokens.
        image_id: id of the placeholder that stands once for each visual token.
    """

    def __init__(self, tokenizer_json: str, image_id: int):
        self.tokenizer = plain_tokenizer(tokenizer_json)
        added = {token.content: number for number, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.start_id, self.end_id = added[START], added[END]
        self.pad_id = added.get(PAD, self.end_id)
        self.image_id = image_id

    def conversation(
        self,
        messages: Sequence[Message],
        lengths: Sequence[int],
        system: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> Encoded:
        """A whole conversation.

        Args:
            lengths: visual tokens of each picture, in order.
            system: text of a system turn, where the messages do not begin with one; None or "": no such turn.
            add_generation_prompt: end with the assistant's header, which an answer follows.
            continue_final_message: leave the last message open, so that its text is gone on with.

        Raises:
            ValueError: markers and pictures are not equally many, or an assistant's text has a marker.
        """
        markers = sum(message.text.count(IMAGE_MARKER) for message in messages)
        if markers != len(lengths):
            raise ValueError(f"images: {len(lengths)} pictures for {markers} {IMAGE_MARKER} markers")
        turns, ids, said, pictures = list(messages), [], [], iter(lengths)
        if system and not (turns and turns[0].role == SYSTEM):
            turns = [Message(SYSTEM, system, ()), *turns]
        for number, message in enumerate(turns, 1):
            if message.role == SYSTEM and not message.text:
                continue
            is_answer = message.role == ASSISTANT
            before, body = self._turn(message, pictures)
            rest = [self.end_id, *self.encode(NEWLINE)]
            if continue_final_message and number == len(turns):
                rest = []
            ids += [*before, *body, *rest]
            said += [False] * len(before) + [is_answer] * (len(body) + bool(rest)) + [False] * (len(rest) - 1)
        if add_generation_prompt:
            ids += [self.start_id, *self.encode(header(ASSISTANT))]
            said += [False] * (len(ids) - len(said))
        return Encoded(ids, said)

    def rendered(self, text: str, lengths: Sequence[int]) -> list[int]:
        """A prompt as a chat template rendered it; chat tokens and markers in it are meant.

        Raises:
            ValueError: markers and pictures are not equally many.
        """
        if text.count(IMAGE_MARKER) != len(lengths):
            raise ValueError(
                f"text: {text.count(IMAGE_MARKER)} {IMAGE_MARKER} markers, {len(lengths)} pictures; "
                "apply_chat_template places one for each picture"
            )
        pictures, special, ids = iter(lengths), {START: self.start_id, END: self.end_id, PAD: self.pad_id}, []
        for before, piece in zip(["", *(pieces := _SPECIAL.split(text))], pieces, strict=False):
            if piece == IMAGE_MARKER:
                ids += [self.image_id] * next(pictures)
            elif piece in special:
                ids.append(special[piece])
            elif before == START and piece.startswith(header(ASSISTANT)):
                ids += self.encode(header(ASSISTANT)) + self.encode(piece.removeprefix(header(ASSISTANT)))
            else:
                ids += self.encode(piece)
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's token ids, up to its end and without special tokens."""
        numbers = [int(number) for number in ids]
        if self.end_id in numbers:
            numbers = numbers[: numbers.index(self.end_id)]
        return self.tokenizer.decode(numbers, skip_special_tokens=True)

    def _turn(self, message: Message, pictures: Iterator[int]) -> tuple[list[int], list[int]]:
        """A turn's header and what follows it.

        An answer is encoded apart from its header, as it is when the model writes it, and without white space around
        it; all else together with its header.
        """
        if message.role == ASSISTANT:
            if IMAGE_MARKER in message.text:
                raise ValueError(f"messages: an assistant's text has a {IMAGE_MARKER} marker; pictures are the user's")
            return [self.start_id, *self.encode(header(ASSISTANT))], self.encode(message.text.strip())
        first, *others = message.text.split(IMAGE_MARKER)
        ids = self.encode(header(message.role) + first)
        for piece in others:
            ids += [self.image_id] * next(pictures) + self.encode(piece)
        return [self.start_id], ids


def plain_tokenizer(tokenizer_json: str) -> Tokenizer:
    """A tokenizer that takes no chat token from a text: those that stand in one are spelled out."""
    content = json.loads(tokenizer_json)
    for token in content.get("added_tokens", ()):
        token["special"] = token["special"] or token["content"] in CHAT_TOKENS
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True  # that is: encode their text
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def place_images(question: str, num_images: int) -> str:
    """A user's text with one marker for each picture.

    Without markers they come first, each on a line of its own. A single one is moved there, and white space at the
    text's edges goes; several stay where they are.

    Raises:
        ValueError: there are markers, but not as many as pictures.
    """
    if IMAGE_MARKER not in question:
        question = images_before(question, num_images)
    if question.count(IMAGE_MARKER) != num_images:
        raise ValueError(f"question: {question.count(IMAGE_MARKER)} {IMAGE_MARKER} markers, {num_images} pictures")
    if num_images == 1:
        return image_first(question)
    return question


def read_message(message: Mapping[str, Any]) -> Message:
    """A message as `apply_chat_template` takes it: `content` is a text, or a list of texts and pictures.

    Raises:
        ValueError: the content holds something else, or markers and pictures are not equally many.
    """
    role, content = message["role"], message.get("content") or ""
    if isinstance(content, str):
        count = content.count(IMAGE_MARKER)
        return Message(role, place_images(content, count) if role == USER else content, (None,) * count)
    texts, sources = [], []
    for part in content:
        if part.get("type") == "text":
            texts.append(part["text"])
        elif part.get("type") in ("image", "image_url"):
            sources.append(_source(part))
        else:
            raise ValueError(f"messages: a part of type {part.get('type')!r}; expected text, image or image_url")
    text = "".join(texts)
    if role == USER or sources:
        text = place_images(text, len(sources) or text.count(IMAGE_MARKER))
    return Message(role, text, tuple(sources) or (None,) * text.count(IMAGE_MARKER))


def _source(part: Mapping[str, Any]) -> Any:
    """Where a message's picture is; None: it comes beside the messages."""
    if part["type"] == "image_url":
        url = part["image_url"]
        return url["url"] if isinstance(url, Mapping) else url
    return next((part[key] for key in SOURCES if part.get(key) is not None), None)
