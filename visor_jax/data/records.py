"""Parses a JSON record into a conversation about named pictures; accepts the common layouts.

In: a value from a JSON file. Out: a `Record`: id, picture names, turns, system text. Opens no file. A record that
cannot be used raises `SkipSample` with a reason and a detail that names the key and says what to do.

Keys that are read:

- the conversation under `conversations`, `conversation` or `messages`, each message with `from`/`value` or
  `role`/`content`; `content` may be a list of text and image parts, as in OpenAI's format;
- the pictures under `image` or `images`, or in the image parts of the messages: one name, a list of names, or objects
  with a `path`;
- videos under `video` or `videos`, or in the video parts of the messages (`visor_jax.data.media`);
- a system text from a `system` key or from leading system messages.

A record without pictures is a text-only sample only if no other key of it seems to hold a picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.media import (
    PICTURE_KEYS,
    VIDEO_KEYS,
    VIDEO_MARKER,
    Picture,
    names_of,
    picture_of,
    pictures_of,
    place_videos,
    video_of,
    videos_of,
)
from visor_jax.data.media import EmbeddedPicture as EmbeddedPicture
from visor_jax.data.sample import SkipSample, Turn

MAX_CHARACTERS = 1_000_000  # per conversation; no row holds that many

CONVERSATION_KEYS = ("conversations", "conversation", "messages")
_MESSAGE_KEYS = (("from", "value"), ("role", "content"))
_ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": "system"}

# Key names that suggest pictures, video or sound; only `image`, `images`, `video` and `videos` are read.
_MEDIA_KEY = re.compile(r"image|img|picture|photo|pixel|video|audio|frames", re.IGNORECASE)
_MEDIA_FILE = re.compile(
    r"\.(jpe?g|png|webp|gif|bmp|tiff?|jp2|heic|heif|avif|mp4|avi|mov|mkv|webm|mp3|wav|flac)$", re.IGNORECASE
)
_SOUND = frozenset({"audio", "audios"})
_NUMBERED_PICTURE_KEY = re.compile(r"(image|img|picture|photo)([ _-]?[0-9]{1,3}|[ _-][a-z])", re.IGNORECASE)
_NO_MEDIA = frozenset({"id", "from", "value", "role", "content", "system", *CONVERSATION_KEYS})

# Image markers of other programs: Qwen-VL, Qwen2-VL, Phi-3, InternLM-XComposer, MiniCPM-V, MMMU, Pixtral. They do not
# occur in HTML or prose, so a record that holds one is not text-only.
_FOREIGN_MARKER = re.compile(
    r"<img>[^<>\n]{1,1000}</img>|<\|(?:image|video)(?:_\d+|_pad)?\|>|<ImageHere>|<image[ _]?\d+>|<IMAGE>|\[IMG\]"
    r"|(?:^\s*<Image>)|(?:<Image>\s*$)"
)

# Known layouts that are not read: the keys that identify each, and its name for the message.
_FOREIGN_LAYOUTS = (
    (("chosen", "rejected"), "preference pairs"),
    (("instruction", "output"), "the Alpaca layout"),
    (("query", "response"), "a query-response layout"),
    (("prompt", "completion"), "a prompt-completion layout"),
    (("prompt", "response"), "a prompt-response layout"),
    (("question", "answers"), "a question-answer layout"),
    (("question", "answer"), "a question-answer layout"),
    (("caption",), "a caption layout"),
    (("text",), "plain text"),
)
_EXPECTED_LAYOUT = (
    'expected "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]'
    ' or "messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'
)


@dataclass(frozen=True)
class Record:
    """A conversation and its pictures, in the order of its `<image>` markers."""

    id: str
    pictures: tuple[Picture, ...]
    turns: tuple[Turn, ...]
    system: str = ""


def parse_record(record: Any, number: int) -> Record:
    """Returns the conversation in a record; `number` is its index in the file, the id of records without one.

    Raises:
      SkipSample: "bad_record", "bad_text", "unknown_layout", "empty_conversation", "unknown_role", "turn_order",
        "empty_question", "empty_answer", "too_long", "picture_key", "audio", "foreign_marker", or "image_count".
    """
    pictures = record_pictures(record)
    messages, message_pictures = _messages(record)
    if pictures and message_pictures:
        raise SkipSample(
            "bad_record", "pictures are named both by the record and by its messages; expected one of them"
        )
    pictures = pictures or message_pictures
    _check_other_media(record, pictures)
    for name in (name for picture in pictures for name in names_of(picture)):
        _clean(name, "a picture's name")
    system, turns = _turns(messages, _system_text(record), _tasks(record))
    _check_markers(turns)
    turns, pictures = place_videos(turns, pictures)
    markers = sum(turn.question.count(IMAGE_MARKER) for turn in turns)
    if markers != len(pictures) and (markers, len(pictures)) != (0, 1):  # a single picture needs no marker
        hint = f"; write one {IMAGE_MARKER} where each picture belongs" if len(pictures) > 1 and not markers else ""
        raise SkipSample("image_count", f"{markers} {IMAGE_MARKER} markers, {len(pictures)} pictures{hint}")
    return Record(_clean(record_id(record, number), "`id`"), tuple(pictures), turns, system)


def record_id(record: Any, number: int) -> str:
    """Returns the record's id, a string or a number; its index in the file if it has none."""
    value = record.get("id") if isinstance(record, dict) else None
    return str(value) if isinstance(value, (str, int)) else str(number)


# --- pictures ---------------------------------------------------------------------------------------------------------


def record_pictures(record: Any) -> list[Picture]:
    """Returns the pictures under `image` or `images`, then the videos under `video` or `videos`.

    Raises:
      SkipSample: "bad_record".
    """
    if not isinstance(record, dict):
        raise SkipSample("bad_record", f"expected an object, got {type(record).__name__}")
    media: list[Picture] = []
    for keys, parse, what in ((PICTURE_KEYS, pictures_of, "pictures"), (VIDEO_KEYS, videos_of, "videos")):
        by_key = {key: found for key in keys if (found := parse(record.get(key), key))}
        if len(set(map(tuple, by_key.values()))) > 1:
            raise SkipSample("bad_record", f"`{keys[0]}` and `{keys[1]}` name different {what}; expected one of them")
        media += next(iter(by_key.values()), [])
    return media


def named_pictures(record: Any) -> list[str]:
    """Returns the picture names of a record and its messages; an empty list if it has none or cannot be read."""
    try:
        pictures = record_pictures(record) or _messages(record)[1]
    except SkipSample:
        return []
    return [name for picture in pictures for name in names_of(picture)]


def _check_other_media(record: dict[str, Any], pictures: list[Picture]) -> None:
    """Refuses a record that would be trained on without its media: sound, pictures under keys not read."""
    for key, value in record.items():
        if value and key.lower() in _SOUND:
            raise SkipSample("audio", f"{key!r}: sound is not supported; remove it")
    if pictures:
        extra = next((key for key in record if _NUMBERED_PICTURE_KEY.fullmatch(key) and _is_name(record[key])), None)
        if extra is not None:
            raise SkipSample("picture_key", f"{extra!r} holds a picture too, but is not read; list all in `image`")
        return
    messages = next((record[key] for key in CONVERSATION_KEYS if record.get(key)), [])
    for where, fields in (("record", record), *(("message", message) for message in messages)):
        for key, value in fields.items():
            if _is_present(value) and key not in _NO_MEDIA and (_MEDIA_KEY.search(key) or _holds_media_file(value)):
                raise SkipSample(
                    "picture_key",
                    f"no `image`, but {key[:50]!r} in the {where}, which is not read; rename it to `image` in the"
                    " record, or remove it if there is no picture",
                )


def _check_markers(turns: Iterable[Turn]) -> None:
    """Refuses questions that hold another program's image marker."""
    for turn in turns:
        if match := _FOREIGN_MARKER.search(turn.question):
            raise SkipSample(
                "foreign_marker",
                f"{match[0].strip()[:60]!r} in a question is another program's marker for a picture; write"
                f" {IMAGE_MARKER} there, and the picture's name in `image`",
            )


def _is_present(value: Any) -> bool:
    """Whether a value is something; tables write a missing picture as an object whose fields are all null."""
    return any(item is not None for item in value.values()) if isinstance(value, dict) else bool(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _holds_media_file(value: Any, depth: int = 3) -> bool:
    """Whether a value names a picture or video file, or is a list whose first item or an object that holds one."""
    if isinstance(value, str):
        return len(value) < 1000 and _MEDIA_FILE.search(value) is not None
    inner = value[:1] if isinstance(value, list) else [*value.values()][:20] if isinstance(value, dict) else []
    return depth > 0 and any(_holds_media_file(item, depth - 1) for item in inner)


# --- messages ---------------------------------------------------------------------------------------------------------


def _messages(record: dict[str, Any]) -> tuple[list[tuple[str, str]], list[Picture]]:
    """Returns (kind, text) of each message, and the picture names in image parts."""
    present = [key for key in CONVERSATION_KEYS if key in record]
    if not present:
        raise _no_conversation(record)
    key = next((key for key in present if record[key]), present[0])
    conversation = record[key]
    if isinstance(conversation, str) and conversation.strip():
        raise SkipSample("unknown_layout", f"`{key}` is text, possibly nested JSON; expected a list of messages")
    if not isinstance(conversation, list) or not conversation:
        raise SkipSample("empty_conversation", f"`{key}` is empty or not a list")
    pictures: list[Picture] = []
    return [_message(message, pictures) for message in conversation], pictures


def _no_conversation(record: dict[str, Any]) -> SkipSample:
    for keys, name in _FOREIGN_LAYOUTS:
        if all(key in record for key in keys):
            present = " and ".join(f"`{key}`" for key in keys)
            return SkipSample("unknown_layout", f"{present}: {name}, which is not read; {_EXPECTED_LAYOUT}")
    keys = ", ".join(repr(key[:30]) for key in list(record)[:8]) or "none"
    return SkipSample("empty_conversation", f"no conversation among the keys ({keys}); {_EXPECTED_LAYOUT}")


def _message(message: Any, pictures: list[Picture]) -> tuple[str, str]:
    """Returns (kind, text) of a message; kind is "question", "answer" or "system". Adds image names to `pictures`."""
    if isinstance(message, list):
        raise SkipSample("unknown_layout", f"a message is a list (pairs or columns); {_EXPECTED_LAYOUT}")
    pair = next((pair for pair in _MESSAGE_KEYS if isinstance(message, dict) and pair[1] in message), None)
    if pair is None:
        raise SkipSample("bad_record", "a message has no text in `value` or `content`")
    role, content = message.get(pair[0]), message[pair[1]]
    if not isinstance(role, str) or role not in _ROLES:
        raise SkipSample("unknown_role", f"`{pair[0]}` is {str(role)[:50]!r}; expected one of {', '.join(_ROLES)}")
    text = "\n".join(_parts(content, pictures)) if isinstance(content, list) else _text(content, pair[1])
    return _ROLES[role], _clean(text, "a message")


def _text(value: Any, key: str) -> str:
    """Returns a text, or a number as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise SkipSample("bad_record", f"`{key}` is {type(value).__name__}; expected text or a number")


def _parts(content: Iterable[Any], pictures: list[Picture]) -> Iterable[str]:
    """Yields the texts of a list of parts, with a marker for each picture; adds picture names to `pictures`."""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            yield part
        elif kind == "text":
            yield _text(part.get("text"), "text")
        elif kind in ("image", "image_url"):
            name = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
            if isinstance(name, dict) and "url" in name:
                name = name["url"]
            if name is not None and not isinstance(name, str | bytes | dict):
                raise SkipSample("bad_record", f"an {kind} part names no file")
            pictures += [picture] if (picture := picture_of(name, kind)) else []
            yield IMAGE_MARKER
        elif kind in ("video", "video_url"):
            name = next((part[key] for key in ("video", "video_url", "path", "url") if part.get(key)), None)
            name = name["url"] if isinstance(name, dict) and "url" in name else name
            pictures += [video] if (video := video_of(name, kind)) else []
            yield VIDEO_MARKER
        else:
            what = f"a content part of type {str(kind)[:50]!r}"
            raise SkipSample("unknown_layout", f"{what}; expected text, image or video")


def _tasks(record: dict[str, Any]) -> str | list[str]:
    """Returns the name of the record's task, "" for none, or the names of its questions' tasks in a list."""
    task = record.get("data_source")
    if isinstance(task, list) and all(isinstance(name, str) for name in task):
        return [_clean(name, "`data_source`") for name in task]
    return _clean(task, "`data_source`") if isinstance(task, str) else ""


def _system_text(record: dict[str, Any]) -> str:
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise SkipSample("bad_record", f"`system` is {type(system).__name__}; expected text")
    return _clean(system or "", "`system`")


def _turns(messages: list[tuple[str, str]], system: str, task: str | list[str]) -> tuple[str, tuple[Turn, ...]]:
    """Returns the system text, and the questions with their answers.

    Drops an answer before the first question, as LLaVA's loader does, and a last question without an answer.
    """
    if sum(len(text) for _, text in messages) + len(system) > MAX_CHARACTERS:
        raise SkipSample("too_long", f"more than {MAX_CHARACTERS} characters")
    leading = next((place for place, (kind, _) in enumerate(messages) if kind != "system"), len(messages))
    systems = [text.strip() for text in (system, *(text for _, text in messages[:leading])) if text.strip()]
    messages = messages[leading:]
    if messages and messages[0][0] == "answer":
        messages = messages[1:]
    if messages and messages[-1][0] == "question" and len(messages) % 2:
        messages = messages[:-1]
    if not messages:
        raise SkipSample("empty_conversation", "no question with an answer")
    for place, (kind, text) in enumerate(messages):
        expected = ("question", "answer")[place % 2]
        if kind != expected:
            raise SkipSample("turn_order", f"message {place} is {_article(kind)}; expected {_article(expected)}")
        if not text.strip():
            raise SkipSample(f"empty_{kind}", f"message {place} is empty")
    texts = [text for _, text in messages]
    tasks = [task] * (len(texts) // 2) if isinstance(task, str) else task
    if len(tasks) != len(texts) // 2:
        raise SkipSample("bad_record", f"`data_source` names {len(tasks)} tasks for {len(texts) // 2} questions")
    turns = tuple(map(Turn, texts[::2], texts[1::2], tasks))
    return "\n".join(dict.fromkeys(systems)), turns


def _article(kind: str) -> str:
    """Returns the word with its indefinite article."""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


_SURROGATE = re.compile("[\ud800-\udfff]")


def _clean(text: str, where: str) -> str:
    """Returns `text`; refuses lone surrogates, which no tokenizer encodes, and NUL, a sign of a damaged file."""
    if _SURROGATE.search(text):
        raise SkipSample("bad_text", f"half a surrogate pair in {where}: {text[:60]!a}")
    if "\0" in text:
        raise SkipSample("bad_text", f"a NUL in {where}: {text[:60]!a}")
    return text
