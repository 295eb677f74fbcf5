"""Reads conversations in the `messages` and `images` layouts of ms-swift and TRL, from JSON, JSON lines or Parquet.

In: files whose records have `messages` (`role`, `content`; the content a text or a list of text and image parts) and
`images`: names below `data.root`, objects with `path` or `bytes`, or image parts that name a file. The content of a
file decides whether it is JSON or Parquet. Out: a `StoredSource`.

Pictures without any `<image>` or image part come before the first question, as both programs place them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.config import Config
from visor_jax.data.chat_template import IMAGE_MARKER, images_before
from visor_jax.data.records import CONVERSATION_KEYS, record_pictures
from visor_jax.data.sample import SkipSample
from visor_jax.data.sources import files
from visor_jax.data.sources.llava import open_json
from visor_jax.data.sources.parquet import ParquetShard
from visor_jax.data.sources.stored import RecordFile, StoredSource
from visor_jax.files.read_write import open_regular


@dataclass(frozen=True)
class MessageFile:
    """A `RecordFile` whose records get a marker for each picture, if they have none."""

    file: RecordFile

    @property
    def path(self) -> Path:
        return self.file.path

    def __len__(self) -> int:
        return len(self.file)

    def record(self, number: int) -> Any:
        """Returns a record with the bytes of its pictures."""
        return with_markers(self.file.record(number))

    def outline(self, number: int) -> Any:
        """Returns a record without the bytes of its pictures."""
        return with_markers(self.file.outline(number))

    def identity(self, number: int) -> Any:
        """Returns a record's id and picture names."""
        return self.file.identity(number)


def with_markers(record: Any) -> Any:
    """Returns a record of several pictures and no marker with all markers before its first question.

    Any other record is returned as it is; `parse_record` names what is wrong with a bad one.
    """
    try:
        count = len(record_pictures(record))
    except SkipSample:
        return record
    key = next((key for key in CONVERSATION_KEYS if record.get(key)), "")
    messages = record.get(key)
    if count < 2 or not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return record
    contents = [message.get("content") for message in messages]
    first = next((place for place, message in enumerate(messages) if message.get("role") == "user"), None)
    if first is None or not isinstance(contents[first], str) or any(map(_has_marker, contents)):
        return record
    asked = {**messages[first], "content": images_before(contents[first], count)}
    return {**record, key: [*messages[:first], asked, *messages[first + 1 :]]}


def _has_marker(content: Any) -> bool:
    """Whether a message's content marks the place of a picture."""
    return isinstance(content, list) or (isinstance(content, str) and IMAGE_MARKER in content)


def open_file(path: Path) -> MessageFile:
    """Opens a file of messages.

    Raises:
        RequestError: it is missing, or neither JSON nor Parquet.
    """
    try:
        with open_regular(path) as file:
            is_parquet = file.read(4) == b"PAR1"
    except OSError:
        is_parquet = False  # reading it as JSON names the cause
    return MessageFile(ParquetShard(path) if is_parquet else open_json(path))


def open_messages(config: Config, split: str) -> StoredSource:
    """Opens the source that `config.data` describes; see `files.open_files`."""
    return files.open_files(config, split, open_file)


SOURCE = files.stored_kind(open_messages, "JSON or Parquet files")
