"""The records of a JSON or JSON-lines file, told apart by content and not by the file's ending.

In: a path. Out: a list of records. A file that starts with "[" is one list; a file that starts with "{" holds one
object a line, or is a single conversation. A file that cannot be read as a whole is a `RequestError` that names line
and column; a single bad line stands among the records as a `BadLine`.
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

# First bytes of files that are no JSON, and what to do with them.
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
    (b"PAR1", "is a Parquet file; expected JSON: write its rows as JSON lines first"),
    (b"ARROW1", "is an Arrow file; expected JSON: write its rows as JSON lines first"),
    (b"datasets:", "is a YAML mixture; expected JSON: name one of its files, or join them into one"),
)


@dataclass(frozen=True)
class BadLine:
    """Stands among the records for a line that is no JSON."""

    error: str


def read_records(path: Path) -> list[Any]:
    """The records of a file.

    Raises:
      RequestError: the file is missing, no regular file, or cannot be read as JSON.
    """
    data = _read(path).removeprefix(_BOM)
    first = data[:4096].lstrip(_WHITE)[:1]
    if first == b"[":
        return _parse_list(data, path)
    if first == b"{":
        return _parse_objects(data, path)
    if not data.strip(_WHITE):
        raise RequestError(f"data.path: {path} is empty; expected a JSON list of conversations, or one object a line")
    _decode(data[:4096], path, partial=True)
    blank = data[: len(data) - len(data.lstrip(_WHITE))].decode()
    line, column = _place(blank, len(blank))
    raise RequestError(
        f"data.path: {path} line {line} column {column}: not JSON: expected '[' (a list) or '{{' (one object a line)"
    )


def _read(path: Path) -> bytes:
    """The file's bytes; reading stops at once where a block is mostly NUL bytes, as in a sparse file."""
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
    for start, what in _FOREIGN:
        if head.startswith(start):
            raise RequestError(f"data.path: {path} {what}")


def _decode(data: bytes, path: Path, *, partial: bool = False) -> str:
    """UTF-8 text; `partial` data may end inside a character."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if partial and error.end == len(data):
            return ""
        line, column = _place(data[: error.start].decode("utf-8"), error.start)
        raise RequestError(f"data.path: {path} line {line} column {column}: not UTF-8") from None


def _place(text: str, position: int) -> tuple[int, int]:
    """Line and column, counted from 1, of a position in a text."""
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
        raise RequestError(f"data.path: {path}: not JSON that can be read: {error}") from None


def _explain(text: str, error: json.JSONDecodeError) -> str:
    """The parser's message, with the usual cause where it shows."""
    here = text[error.pos : error.pos + 1]
    if here == "\0":
        return "a NUL byte; the file is damaged"
    if not text[error.pos :].strip() or error.msg.startswith("Unterminated"):
        return f"{error.msg}; the file seems to be cut off"
    if here in ("]", "}") and text[: error.pos].rstrip().endswith(","):
        return f"{error.msg}: a comma before {here!r}"
    if error.msg == "Extra data":
        return "Extra data: a second value; expected one list, or one object a line"
    return error.msg


def _parse_objects(data: bytes, path: Path) -> list[Any]:
    """One record a line, or one conversation over the whole file."""
    records: list[Any] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            records.append(_parse_line(line, number))
    if isinstance(records[0], BadLine):  # its first line alone is no JSON
        records = _whole_object(data, path) or records
    if len(records) == 1 and isinstance(records[0], dict) and not _is_conversation(records[0]):
        raise RequestError(
            f"data.path: {path} holds one object {_describe(records[0])}; expected a list of conversations"
        )
    if not any(isinstance(record, dict) for record in records):
        _parse_whole(data, path)  # names the place where it stops being JSON
        raise RequestError(f"data.path: {path} holds no record; expected one JSON object a line")
    return records


def _parse_line(line: bytes, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return BadLine(f"line {number} column {error.colno}: {_explain(error.doc, error)}")
    except (ValueError, RecursionError) as error:
        return BadLine(f"line {number}: {error}")


def _whole_object(data: bytes, path: Path) -> list[Any]:
    """A conversation written over several lines, as the only record; empty if the file is no single JSON value."""
    try:
        return [_parse_whole(data, path)]
    except RequestError:
        return []


def _is_conversation(record: dict[str, Any]) -> bool:
    return any(key in record for key in CONVERSATION_KEYS)


def _describe(found: dict[str, Any]) -> str:
    lists = [key for key, value in found.items() if isinstance(value, list) and value]
    if lists:
        return f"with a list under {lists[0]!r:.40}"
    return "with the keys " + (", ".join(repr(key)[:30] for key in list(found)[:5]) or "(none)")
