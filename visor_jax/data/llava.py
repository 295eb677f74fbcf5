"""LLaVA-format conversations from a JSON or JSON-lines file, with picture files under a folder.

In: `[{"id", "image": name | [names] | absent, "conversations": [{"from": "human" | "gpt", "value"}], "data_source"?}]`,
in a `.json` file as one list, in a `.jsonl` file one record a line. Out: a `Source`.

A file that cannot be read as a whole is the asker's mistake (`RequestError`); a record that cannot be used is skipped
(`SkipSample`) when it is asked for. As in LLaVA's own loader, an answer before the first question is dropped. Records
about the same pictures always fall in the same split.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.data.images import open_under
from visor_jax.data.sample import IMAGE_MARKER, Sample, SkipSample, Turn
from visor_jax.errors import RequestError

SPLITS = ("train", "validation", "test")
WHOLE = "all"  # beside the splits: every record of the file
SPLIT_MARK = "{split}"
MAX_CHARACTERS = 1_000_000  # of one conversation; far beyond any window, and soon refused

_ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}


@dataclass(frozen=True)
class _BadLine:
    """Stands among the records for a line that is no JSON."""

    error: str


class LlavaSource:
    """A `Source` over one file; its `name` is the file's, without the ending."""

    def __init__(
        self, path: Path, root: Path, *, max_image_pixels: int, split: str = "train", test_fraction: float = 0.0
    ) -> None:
        """Reads the file; pictures are read when a sample is asked for.

        Args:
            path: the `.json` or `.jsonl` file.
            root: the folder under which the records' picture names are looked up.
            max_image_pixels: a picture with more is skipped.
            split: "train", "validation", "test", or "all".
            test_fraction: 0 gives every record to every split. Otherwise about this part of the records is "test", as
                much again "validation", and the rest "train"; which is decided by the names of the record's pictures
                (its id, where it has none), so adding records moves none.

        Raises:
            RequestError: the file or folder is missing, or is no such file, or the split has no record.
        """
        if split not in (*SPLITS, WHOLE):
            raise RequestError(f"data: unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        self.name = path.stem
        self._path, self._root, self._max_image_pixels = path, root, max_image_pixels
        if not root.is_dir():
            raise RequestError(f"data.root: {root} is not a folder")
        data = _read(path)
        self._records = _parse_lines(data, path) if path.suffix == ".jsonl" else _parse_list(data, path)
        self._chosen = [
            index for index, record in enumerate(self._records) if _in_split(record, index, split, test_fraction)
        ]
        if not self._chosen:
            raise RequestError(
                f"data.test_fraction={test_fraction:g} leaves split {split!r} without any of the {len(self._records)} "
                f"records of {path}"
            )

    @classmethod
    def from_config(cls, config: Any, split: str) -> LlavaSource:
        """The source that `config.data` names.

        `{split}` in `data.path` stands for the split: each has a file of its own, and `data.test_fraction` is not used.
        Without a `data.root` the pictures lie in the file's own folder.

        Raises:
            RequestError: as the constructor.
        """
        data = config.data
        path = Path(data.root) / data.path.replace(SPLIT_MARK, split)
        return cls(
            path,
            Path(data.root) if data.root else path.parent,
            max_image_pixels=data.max_image_pixels,
            split=split,
            test_fraction=0.0 if SPLIT_MARK in data.path else data.test_fraction,
        )

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of the split; raises `SkipSample` for a bad record, `IndexError` outside 0..len-1."""
        if not 0 <= index < len(self._chosen):
            raise IndexError(f"{self.name}: no sample {index}, there are {len(self._chosen)}")
        number = self._chosen[index]
        try:
            return self._sample(self._records[number], number)
        except SkipSample as why:
            raise SkipSample(why.reason, f"{self._path.name}[{number}]: {why.detail}") from None

    def duplicate_ids(self) -> int:
        """How many records of the split have an id that an earlier one has too. They are kept."""
        ids = Counter(_id(self._records[number], number) for number in self._chosen)
        return sum(count - 1 for count in ids.values())

    def _sample(self, record: Any, number: int) -> Sample:
        if isinstance(record, _BadLine):
            raise SkipSample("bad_json", record.error)
        names = _image_names(record)
        if record.get("video"):
            raise SkipSample("video", "videos are not supported")
        task = record.get("data_source")
        turns = _turns(record.get("conversations"), task if isinstance(task, str) else "")
        markers = sum(turn.question.count(IMAGE_MARKER) for turn in turns)
        if markers != len(names):
            raise SkipSample("image_count", f"{markers} {IMAGE_MARKER} markers, {len(names)} pictures")
        images = tuple(open_under(self._root, name, self._max_image_pixels) for name in names)
        return Sample(id=_id(record, number), images=images, turns=turns, source=self.name)


# --- the file ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise RequestError(f"data.path: {path} is not a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"data.path: cannot read {path}: {error.strerror}") from None


def _parse_list(data: bytes, path: Path) -> list[Any]:
    try:
        records = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RequestError(f"data.path: {path} line {error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"data.path: {path} line {line}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"data.path: {path}: not JSON that can be read: {error}") from None
    if not isinstance(records, list) or not records:
        kind = "an empty list" if records == [] else type(records).__name__
        raise RequestError(f"data.path: {path} holds {kind}; expected a list of conversations")
    return records


def _parse_lines(data: bytes, path: Path) -> list[Any]:
    """One record a line."""
    records: list[Any] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            records.append(_BadLine(f"line {number}: {error}"))
    if not any(isinstance(record, dict) for record in records):
        raise RequestError(f"data.path: {path} holds no record; expected one JSON object a line")
    return records


def _in_split(record: Any, number: int, split: str, test_fraction: float) -> bool:
    if not test_fraction or split == WHOLE:
        return True
    try:
        names = _image_names(record)
    except SkipSample:
        names = []
    digest = hashlib.sha256(json.dumps(names or _id(record, number)).encode("ascii")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return split == ("test", "validation", "train")[min(int(place / test_fraction), 2)]


# --- one record -------------------------------------------------------------------------------------------------------


def _id(record: Any, number: int) -> str:
    """The record's own id, a string or a number; its place in the file if it has none."""
    own = record.get("id") if isinstance(record, dict) else None
    return str(own) if isinstance(own, (str, int)) else str(number)


def _image_names(record: Any) -> list[str]:
    if not isinstance(record, dict):
        raise SkipSample("bad_record", f"expected an object, got {type(record).__name__}")
    names = record.get("image")
    names = [names] if isinstance(names, str) else names or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SkipSample("bad_record", "`image` is neither a name nor a list of names")
    return names


def _turns(conversation: Any, task: str) -> tuple[Turn, ...]:
    """The questions and answers of a `conversations` list. A last question without an answer is dropped."""
    if not isinstance(conversation, list) or not conversation:
        raise SkipSample("empty_conversation", "`conversations` is missing or empty")
    messages = [_message(message) for message in conversation]
    if sum(len(text) for _, text in messages) > MAX_CHARACTERS:
        raise SkipSample("too_long", f"more than {MAX_CHARACTERS} characters")
    if messages[0][0] == "answer":
        messages = messages[1:]
    if messages and messages[-1][0] == "question" and len(messages) % 2:
        messages = messages[:-1]
    if not messages:
        raise SkipSample("empty_conversation", "no question with an answer")
    for place, (kind, text) in enumerate(messages):
        expected = ("question", "answer")[place % 2]
        if kind != expected:
            raise SkipSample("turn_order", f"message {place} is {_article(kind)} where {_article(expected)} is due")
        if not text.strip():
            raise SkipSample(f"empty_{kind}", f"message {place} is empty")
    texts = [text for _, text in messages]
    return tuple(Turn(question, answer, task) for question, answer in zip(texts[::2], texts[1::2], strict=True))


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _message(message: Any) -> tuple[str, str]:
    """("question" or "answer", text) of one message."""
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise SkipSample("bad_record", "a message without a text in `value`")
    role, text = message.get("from"), message["value"]
    if not isinstance(role, str) or role not in _ROLES:
        raise SkipSample("unknown_role", f"`from` is {str(role)[:50]!r}; expected one of {', '.join(_ROLES)}")
    # A lone surrogate is no text at all, and tokenizers refuse it; NUL is a sign of a damaged file.
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise SkipSample("bad_text", "a NUL or a lone surrogate in a message")
    return _ROLES[role], text
