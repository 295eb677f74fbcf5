"""Encodes conversations as token ids, in the chat template that the model was trained with (template_visor.py).

In: questions, messages as `apply_chat_template` takes them, or a prompt that a chat template rendered, and the number
of visual tokens of each picture. Out: token ids, each picture as its run of placeholders. In questions and messages,
only the template adds chat tokens: text that looks like one is encoded as plain text. In a rendered prompt, chat tokens
in the text are special tokens, because those of the template and those of a user cannot be told apart.
Every export contains this file; it needs tokenizers (which transformers brings) only.
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

SOURCES = ("image", "url", "path", "base64")  # keys of a picture part that may hold its source
_SPECIAL = re.compile("(" + "|".join(map(re.escape, CHAT_TOKENS)) + ")")


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each whether it belongs to an assistant's answer (with its <|im_end|>)."""

    ids: list[int]
    is_answer: list[bool]


@dataclass(frozen=True)
class Message:
    """One turn; `text` has one marker per picture, `sources` their sources (None: passed separately)."""

    role: str
    text: str
    sources: tuple[Any, ...]


class ChatEncoder:
    """Encodes conversations and decodes answers with one tokenizer.

    Attributes:
        start_id, end_id, pad_id: ids of the chat tokens.
        image_id: id of the placeholder, which occurs once per visual token.
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
        """Encodes a whole conversation.

        Args:
            messages: its turns.
            lengths: number of visual tokens of each picture, in order.
            system: text of a system turn if the messages do not begin with one; None or "": no system turn.
            add_generation_prompt: end with the assistant's header, so that the model answers.
            continue_final_message: do not end the last message, so that the model continues it.

        Raises:
            ValueError: the numbers of markers and pictures differ, or an assistant's text has a marker.
        """
        markers = sum(message.text.count(IMAGE_MARKER) for message in messages)
        if markers != len(lengths):
            raise ValueError(f"images: {len(lengths)} pictures for {markers} {IMAGE_MARKER} markers")
        turns, ids, is_answer, pictures = list(messages), [], [], iter(lengths)
        if system and not (turns and turns[0].role == SYSTEM):
            turns = [Message(SYSTEM, system, ()), *turns]
        for number, message in enumerate(turns, 1):
            if message.role == SYSTEM and not message.text:
                continue
            by_assistant = message.role == ASSISTANT
            before, body = self._turn(message, pictures)
            rest = [self.end_id, *self.encode(NEWLINE)]
            if continue_final_message and number == len(turns):
                rest = []
            ids += [*before, *body, *rest]
            is_answer += [False] * len(before) + [by_assistant] * (len(body) + bool(rest)) + [False] * (len(rest) - 1)
        if add_generation_prompt:
            ids += [self.start_id, *self.encode(header(ASSISTANT))]
            is_answer += [False] * (len(ids) - len(is_answer))
        return Encoded(ids, is_answer)

    def rendered(self, text: str, lengths: Sequence[int]) -> list[int]:
        """Encodes a prompt that a chat template rendered; chat tokens and markers in it are special tokens.

        Raises:
            ValueError: the numbers of markers and pictures differ.
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
        """Returns the token ids of plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of an answer's token ids, up to its end and without special tokens."""
        numbers = [int(number) for number in ids]
        if self.end_id in numbers:
            numbers = numbers[: numbers.index(self.end_id)]
        return self.tokenizer.decode(numbers, skip_special_tokens=True)

    def _turn(self, message: Message, pictures: Iterator[int]) -> tuple[list[int], list[int]]:
        """Returns the token ids of a turn's start and of its body.

        An answer is stripped and encoded separately from its header, as in generation; other text is encoded together
        with its header.
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
    """Returns a tokenizer that encodes chat tokens in a text as plain text."""
    content = json.loads(tokenizer_json)
    for token in content.get("added_tokens", ()):
        token["special"] = token["special"] or token["content"] in CHAT_TOKENS
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True  # encodes their text instead of their ids
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def place_images(question: str, num_images: int) -> str:
    """Returns a user's text with one marker per picture.

    If it has no markers, they are placed before the text, one per line. A single marker is moved there, and the text is
    stripped. Several markers stay where they are.

    Raises:
        ValueError: the text has markers, but their number differs from that of the pictures.
    """
    if IMAGE_MARKER not in question:
        question = images_before(question, num_images)
    if question.count(IMAGE_MARKER) != num_images:
        raise ValueError(f"question: {question.count(IMAGE_MARKER)} {IMAGE_MARKER} markers, {num_images} pictures")
    if num_images == 1:
        return image_first(question)
    return question


def read_message(message: Mapping[str, Any]) -> Message:
    """Reads a message in the form of `apply_chat_template`: `content` is a text, or a list of texts and pictures.

    Raises:
        ValueError: the content holds something else, or the numbers of markers and pictures differ.
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
    """Returns the source of a message's picture; None: the picture is passed separately from the messages."""
    if part["type"] == "image_url":
        url = part["image_url"]
        return url["url"] if isinstance(url, Mapping) else url
    return next((part[key] for key in SOURCES if part.get(key) is not None), None)
