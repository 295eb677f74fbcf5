"""Reads the records of a JSON or JSON-lines file; the content decides which, not the file's ending.

In: a path. Out: a list of records. A file that starts with "[" is one list; a file that starts with "{" holds one
object per line, or is a single conversation. A file that cannot be read raises a `RequestError` that names line and
column; a single bad line becomes a `BadLine` among the records.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.data.records import CONVERSATION_KEYS
from visor_jax.errors import RequestError
from visor_jax.files.read_write import open_regular

_BLOCK_BYTES = 1 << 24
_BOM = b"\xef\xbb\xbf"
_WHITE = b" \t\r\n"

# First bytes of files that are not JSON, and the message for each.
_FOREIGN = (
    (b"\xff\xfe", "is UTF-16 text; expected UTF-8: save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text; expected UTF-8: save it as UTF-8"),
    (b"[\0", "is UTF-16 text; expected UTF-8: save it as UTF-8"),
    (b"{\0", "is UTF-16 text; expected UTF-8: save it as UTF-8"),
    (b"\0[", "is UTF-16 text; expected UTF-8: save it as UTF-8"),
    (b"\0{", "is UTF-16 text; expected UTF-8: save it as UTF-8"),
    (b"\x1f\x8b", "is compressed by gzip; expected JSON: unpack it first"),
    (b"BZh", "is compressed by bzip2; expected JSON: unpack it first"),
    (b"\xfd7zXZ", "is compressed by xz; expected JSON: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; expected JSON: unpack it first"),
    (b"version https://git-lfs", "is a Git LFS pointer; expected JSON: fetch the file itself, with `git lfs pull`"),
    (b"SQLite format 3", "is an SQLite database; expected JSON: write its rows as JSON lines first"),
    (b"<", "is HTML or XML, perhaps an error page that was downloaded; expected JSON"),
    (b"PK\3\4", "is a zip archive; expected JSON: unpack it first"),
    (b"PAR1", "is a Parquet file; expected JSON: read it with data.source=parquet"),
    (b"ARROW1", "is an Arrow file; expected JSON: write its rows as JSON lines first"),
    (b"datasets:", "is a YAML mixture; expected JSON: name it as data.mixture instead"),
)


@dataclass(frozen=True)
class BadLine:
    """Replaces the record of a line that is not JSON."""

    error: str


def read_records(path: Path) -> list[Any]:
    """Returns the records of a file.

    Raises:
      RequestError: the file is missing, not a regular file, or not JSON.
    """
    data = _read(path).removeprefix(_BOM)
    first = data[:4096].lstrip(_WHITE)[:1]
    if first == b"[":
        return _parse_list(data, path)
    if first == b"{":
        return _parse_objects(data, path)
    if not data.strip(_WHITE):
        raise RequestError(f"data.path: {path} is empty; expected a JSON list of conversations, or one object per line")
    _decode(data[:4096], path, partial=True)
    blank = data[: len(data) - len(data.lstrip(_WHITE))].decode()
    line, column = _place(blank, len(blank))
    raise RequestError(
        f"data.path: {path} line {line} column {column}: not JSON: expected '[' (a list) or '{{' (one object per line)"
    )


def _read(path: Path) -> bytes:
    """Returns the file's bytes; refuses the file at the first block of mostly NUL bytes, as in a sparse file."""
    blocks: list[bytes] = []
    try:
        with open_regular(path) as file:
            while block := file.read(_BLOCK_BYTES if blocks else 4096):
                if not blocks:
                    _refuse_foreign(block, path)
                if block.count(0) * 2 > len(block):
                    place = sum(map(len, blocks)) + block.index(0)
                    raise RequestError(f"data.path: {path}: NUL bytes from byte {place + 1} on; the file is damaged")
                blocks.append(block)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return b"".join(blocks)


def _unreadable(path: Path, error: Exception) -> RequestError:
    if isinstance(error, IsADirectoryError):
        return RequestError(f"data.path: {path} is a folder; expected a JSON file")
    cause = getattr(error, "strerror", None) or str(error)
    return RequestError(f"data.path: cannot read {path}: {cause}")


def _refuse_foreign(head: bytes, path: Path) -> None:
    for start, message in _FOREIGN:
        if head.startswith(start):
            raise RequestError(f"data.path: {path} {message}")


def _decode(data: bytes, path: Path, *, partial: bool = False) -> str:
    """Decodes UTF-8; `partial` data may end inside a character, then the text is ""."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if partial and error.end == len(data):
            return ""
        line, column = _place(data[: error.start].decode("utf-8"), error.start)
        raise RequestError(f"data.path: {path} line {line} column {column}: not UTF-8") from None


def _place(text: str, position: int) -> tuple[int, int]:
    """Returns line and column, counted from 1, of a position in a text."""
    before = text[:position]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _parse_list(data: bytes, path: Path) -> list[Any]:
    records = _parse_whole(data, path)
    if not records:
        raise RequestError(f"data.path: {path} holds an empty list; expected a list of conversations")
    return records


def _parse_whole(data: bytes, path: Path) -> Any:
    text = _decode(data, path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise RequestError(f"data.path: {path} {place}: not JSON: {_explain(text, error)}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"data.path: {path}: not JSON: {error}") from None


def _explain(text: str, error: json.JSONDecodeError) -> str:
    """Returns the parser's message, with the likely cause if there is one."""
    here = text[error.pos : error.pos + 1]
    if here == "\0":
        return "a NUL byte; the file is damaged"
    if not text[error.pos :].strip() or error.msg.startswith("Unterminated"):
        return f"{error.msg}; the file seems to be cut off"
    if here in ("]", "}") and text[: error.pos].rstrip().endswith(","):
        return f"{error.msg}: a comma before {here!r}"
    if error.msg == "Extra data":
        return "Extra data: a second value; expected one list, or one object per line"
    return error.msg


def _parse_objects(data: bytes, path: Path) -> list[Any]:
    """Returns one record per line, or one conversation that spans the file."""
    records: list[Any] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            records.append(_parse_line(line, number))
    if isinstance(records[0], BadLine):  # the file may be one object over several lines
        records = _whole_object(data, path) or records
    if len(records) == 1 and isinstance(records[0], dict) and not _is_conversation(records[0]):
        raise RequestError(
            f"data.path: {path} holds one object {_describe(records[0])}; expected a list of conversations"
        )
    if not any(isinstance(record, dict) for record in records):
        _parse_whole(data, path)  # raises with the line and column of the error
        raise RequestError(f"data.path: {path} holds no record; expected one JSON object per line")
    return records


def _parse_line(line: bytes, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return BadLine(f"line {number} column {error.colno}: {_explain(error.doc, error)}")
    except (ValueError, RecursionError) as error:
        return BadLine(f"line {number}: {error}")


def _whole_object(data: bytes, path: Path) -> list[Any]:
    """Returns a conversation written over several lines as the only record; [] if the file is not one JSON value."""
    try:
        return [_parse_whole(data, path)]
    except RequestError:
        return []


def _is_conversation(record: dict[str, Any]) -> bool:
    return any(key in record for key in CONVERSATION_KEYS)


def _describe(record: dict[str, Any]) -> str:
    """Returns which keys an object has, for the message; a key that holds a list comes alone."""
    lists = [key for key, value in record.items() if isinstance(value, list) and value]
    if lists:
        return f"with a list under {lists[0]!r:.40}"
    return "with the keys " + (", ".join(repr(key)[:30] for key in list(record)[:5]) or "(none)")
