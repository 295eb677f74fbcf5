"""Reads and writes conversations with their encoded pictures in ArrayRecord files: random access, one read per sample.

In: files that `write_array_record` wrote (`visor data build --format=array_record`). Out: a `StoredSource`.

Every record of a file is a block: 4 bytes with the length of a header (little-endian), the header as UTF-8 JSON, then
the files of its pictures and videos one after another. The header is a record in LLaVA's format, in which `image` and
`video` are lists of `{"path": name, "bytes": length}`, or of lists of a video's frames. The last block of a file is its
index, without pictures: format, version, and id and picture names of every record. So splits and ids are known without
reading a picture, and a file that was cut off or comes from another program is refused. Blocks hold data only; no
object is ever unpickled.
"""

from __future__ import annotations

import json
import re
import struct
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from visor_jax.config import Config
from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.media import VIDEO_MARKER, Picture, Video
from visor_jax.data.records import Record
from visor_jax.data.sample import SkipSample
from visor_jax.data.sources import files
from visor_jax.data.sources.stored import StoredSource
from visor_jax.errors import RequestError
from visor_jax.files.read_write import open_regular, parse_json

FORMAT = "visor_jax.conversations"
VERSION = 1
SUFFIX = ".array_record"

_LENGTH = struct.Struct("<I")
_WRITE = "group_size:1"  # one record per chunk: a random access decompresses only its own
_READ = "readahead_buffer_size:0,max_parallelism:0"  # for random access
_ERRORS = (RuntimeError, OSError, ValueError, TypeError, KeyError, IndexError, OverflowError)


class ArrayRecordShard:
    """A `RecordFile` over one ArrayRecord file."""

    def __init__(self, path: Path) -> None:
        """Reads the file's index.

        Raises:
            RequestError: the file is missing, is not ArrayRecord, or was not written by `write_array_record`.
        """
        self.path = path
        self._lock = threading.Lock()
        self._reader: Any = None
        try:
            open_regular(path).close()
            reader = self._opened()
            count = reader.num_records()
            if not reader.ok() or not count:
                raise ValueError("it is not an ArrayRecord file, or it is cut off")
            index = _index(reader.read([count - 1])[0])
        except _ERRORS as error:
            cause = getattr(error, "strerror", None) or str(error)
            raise RequestError(f"data.path: cannot read {path} as ArrayRecord: {cause[:300]}") from None
        if len(index) != count - 1:
            raise RequestError(f"data.path: {path}: its index names {len(index)} records, but it holds {count - 1}")
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def record(self, number: int) -> Any:
        """Returns a record with the bytes of its pictures.

        Raises:
            SkipSample: "broken_file".
        """
        return self._decoded(number, with_bytes=True)

    def outline(self, number: int) -> Any:
        """Returns a record with empty bytes for its pictures.

        Raises:
            SkipSample: "broken_file".
        """
        return self._decoded(number, with_bytes=False)

    def identity(self, number: int) -> Any:
        """Returns a record's id and picture names."""
        id, names = self._index[number]
        return {"id": id, "image": [{"bytes": b"", "path": name} for name in names]}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_index": self._index}  # other processes open the file themselves

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._index = state["path"], state["_index"]
        self._lock, self._reader = threading.Lock(), None

    def _decoded(self, number: int, *, with_bytes: bool) -> Any:
        try:
            return decode_block(self._opened().read([number])[0], with_bytes=with_bytes)
        except _ERRORS as error:
            raise SkipSample("broken_file", str(error)[:300]) from None

    def _opened(self) -> Any:
        with self._lock:
            if self._reader is None:
                self._reader = array_record_module.ArrayRecordReader(
                    str(self.path), _READ, file_reader_buffer_size=32768
                )
            return self._reader


def write_array_record(path: Path, items: Iterable[tuple[Record, Sequence[str]]]) -> int:
    """Writes conversations with their pictures to a new file; returns how many.

    Args:
        path: the file. It is complete when the function returns; a file that was cut off lacks its index.
        items: (record whose pictures and videos have their bytes, names of its pictures) in order, as
            `StoredSource.encoded` returns them.

    Raises:
        OSError: the file cannot be written.
    """
    index: list[tuple[str, list[str]]] = []
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), _WRITE)
        for record, names in items:
            writer.write(encode_block(record))
            index.append((record.id, list(names)))
        writer.write(_block({"format": FORMAT, "version": VERSION, "index": index}, ()))
        writer.close()
    except RuntimeError as error:  # what the library raises for a full disk, among others
        raise OSError(None, f"{path.name}: {error}") from error
    return len(index)


def encode_block(record: Record) -> bytes:
    """Returns the block of a conversation whose pictures and videos have their bytes."""
    contents: list[bytes] = []

    def described(picture: Picture) -> Any:
        if isinstance(picture, Video) and picture.frames:
            return [described(frame) for frame in picture.frames]
        if isinstance(picture, str):
            raise ValueError(f"{picture!r}: expected the picture's bytes")
        contents.append(picture.data)
        return {"path": picture.name, "bytes": len(picture.data)}

    markers = iter([VIDEO_MARKER if isinstance(picture, Video) else IMAGE_MARKER for picture in record.pictures])
    messages: list[dict[str, str]] = []
    for turn in record.turns:
        question = re.sub(re.escape(IMAGE_MARKER), lambda _: next(markers), turn.question)
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    header: dict[str, Any] = {"id": record.id, "conversations": messages}
    for key, is_video in (("image", False), ("video", True)):
        if media := [described(picture) for picture in record.pictures if isinstance(picture, Video) == is_video]:
            header[key] = media
    if record.system:
        header["system"] = record.system
    if task := record.turns[0].task:
        header["data_source"] = task
    return _block(header, contents)


def decode_block(block: bytes, *, with_bytes: bool = True) -> Any:
    """Returns the record in a block; without its bytes, every picture has empty ones.

    Raises:
        ValueError: the block is damaged or of another format.
    """
    record, place = _header(block)

    def restored(item: Any) -> Any:
        nonlocal place
        if isinstance(item, list):
            return [restored(frame) for frame in item]
        if not isinstance(item, dict) or type(length := item.get("bytes")) is not int or length < 0:
            raise ValueError("the header of a record does not say how long its pictures are")
        start, place = place, place + length
        return {"path": item.get("path"), "bytes": block[start:place] if with_bytes else b""}

    media = {key: restored(record[key]) for key in ("image", "video") if isinstance(record.get(key), list)}
    if place != len(block):
        raise ValueError(f"a record of {len(block)} bytes; its header says {place}")
    return {**record, **media}


def _block(header: dict[str, Any], contents: Iterable[bytes]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    return b"".join((_LENGTH.pack(len(text)), text, *contents))


def _header(block: bytes) -> tuple[dict[str, Any], int]:
    """Returns the header of a block, and where its pictures begin."""
    if len(block) < _LENGTH.size:
        raise ValueError("a record of fewer than 4 bytes")
    end = _LENGTH.size + _LENGTH.unpack_from(block)[0]
    if end > len(block):
        raise ValueError("records without the header that visor data build writes")
    header = parse_json(block[_LENGTH.size : end])
    if not isinstance(header, dict):
        raise ValueError("the header of a record is not a JSON object")
    return header, end


def _index(block: bytes) -> list[tuple[str, list[str]]]:
    """Returns (id, picture names) of every record, from a file's last block.

    Raises:
        ValueError: it is not an index that this version reads.
    """
    other = "expected a file that visor data build --format=array_record wrote (for others: data.source=tfds)"
    try:
        header = _header(block)[0]
    except ValueError as error:
        raise ValueError(f"{error}; {other}") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"its last record is not an index; {other}")
    if header.get("version") != VERSION:
        raise ValueError(f"version {header.get('version')!r} of the format; this version reads {VERSION}")
    index = header.get("index")
    if not isinstance(index, list) or not all(map(_is_entry, index)):
        raise ValueError("its index is damaged")
    return [(id, names) for id, names in index]


def _is_entry(entry: Any) -> bool:
    """Whether an entry of an index is an id and a list of names."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
        return False
    return all(isinstance(text, str) for text in (entry[0], *entry[1]))


def open_array_record(config: Config, split: str) -> StoredSource:
    """Opens the source that `config.data` describes; see `files.open_files`."""
    return files.open_files(config, split, ArrayRecordShard)


SOURCE = files.stored_kind(open_array_record, "ArrayRecord files")
