"""Reads a benchmark from a local folder in the hub's layout: Parquet files with encoded pictures inside.

In: a `Benchmark`, and a folder that holds its repository's files, or one folder for each repository. Out: a `Table`,
whose questions are all checked when it is opened, and whose pictures are read when they are needed. Nothing is
downloaded.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from visor_jax.config.data_fields import DEFAULT_MAX_PIXELS
from visor_jax.data.fingerprint import MAX_BYTES
from visor_jax.data.images import decode_embedded
from visor_jax.data.sample import SkipSample
from visor_jax.data.sources.parquet import ParquetRows
from visor_jax.errors import RequestError
from visor_jax.evaluate.benchmarks.base import Benchmark, Item, Kind
from visor_jax.files.read_write import as_path, open_regular

EXPECTED = {
    "text": "text",
    "texts": "a list of texts",
    "number": "whole numbers, or texts of them",
    "picture": "pictures: {bytes, path}, bytes or base64",
    "pictures": "lists of pictures",
}
PICTURES = ("picture", "pictures")
# Older releases of `datasets` write a hash at the end.
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(?:-[0-9a-f]{16})?\.parquet")


class Rows(ParquetRows):
    """A file of a benchmark."""

    field = "--data"


class Table:
    """The questions of a benchmark in a folder.

    Attributes:
      benchmark: the benchmark.
      items: its questions, in the order of the rows.
    """

    def __init__(self, benchmark: Benchmark, data: str) -> None:
        """Reads all columns but the pictures.

        Args:
          benchmark: the benchmark.
          data: the folder of its repository, or one that holds the repository's folder.

        Raises:
          RequestError: files or columns are missing, a file cannot be read, a row is malformed, or rows are repeated.
        """
        self.benchmark = benchmark
        self._files = [Rows(path) for path in files_of(benchmark, data, benchmark.files)]
        self._starts = list(itertools.accumulate(map(len, self._files), initial=0))
        self._pictures: dict[str, tuple[Rows, int]] = {}
        texts = [name for name, kind in benchmark.columns.items() if kind not in PICTURES]
        for file in self._files:
            check_columns(file, benchmark, benchmark.columns)
        self._rows = [row for file in self._files for row in file.columns(texts)]
        if benchmark.images is not None:
            self._open_pictures(data)
        self.items = [self._item(number, row) for number, row in enumerate(self._rows)]
        if not self.items:
            raise RequestError(f"--data={data}: the files of {benchmark.name} have no row")
        self._check_ids()

    def __len__(self) -> int:
        return len(self.items)

    def place(self, number: int) -> str:
        """Returns the file and row of a question, for messages."""
        file, row = self._at(number)
        return f"{file.path}, row {row}"

    def pictures(self, number: int) -> list[np.ndarray]:
        """Returns the pictures of a question, uint8 [H, W, 3].

        Raises:
          SkipSample: "broken_file", "missing_file", "embedded", or one of `images.decode_image`'s reasons.
        """
        decoded = []
        for name in self.items[number].pictures:
            if (value := self._value(number, name)) == []:
                raise SkipSample("missing_file", f"{name} is an empty list; expected the pictures' files in it")
            for index, picture in enumerate(value if isinstance(value, list) else [value]):
                shown = f"{name}[{index}]" if isinstance(value, list) else name
                decoded.append(decode_embedded(encoded(picture, shown), DEFAULT_MAX_PIXELS, shown))
        return decoded

    def fingerprint(self) -> dict[str, str]:
        """Returns a sha256 of each file by folder and name, over its size and its first and last megabyte.

        The last megabyte holds the footer, which knows sizes and statistics of all columns.
        """
        files = {*self._files, *(file for file, _ in self._pictures.values())}
        paths = sorted(file.path for file in files)
        return {f"{path.parent.name}/{path.name}": _digest(path) for path in paths}

    def _at(self, number: int) -> tuple[Rows, int]:
        index = bisect.bisect_right(self._starts, number) - 1
        return self._files[index], number - self._starts[index]

    def _value(self, number: int, column: str) -> Any:
        """Returns the value of a column of pictures in a row."""
        images = self.benchmark.images
        if images is not None and column == images.picture:
            file, row = self._pictures[self._rows[number][images.refers]]
        else:
            file, row = self._at(number)
        return file.row(row, file.fields([column]))[column]

    def _item(self, number: int, row: Mapping[str, Any]) -> Item:
        for name, value in row.items():
            null = name if value is None and name not in self.benchmark.optional else ""
            if isinstance(value, list) and None in value:
                null = f"{name}[{value.index(None)}]"
            if null:
                expected = EXPECTED[self.benchmark.columns[name]]
                raise RequestError(f"--data: {self.place(number)}: {null} is null; expected {expected}")
        images = self.benchmark.images
        if images is not None and row[images.refers] not in self._pictures:
            raise RequestError(
                f"--data: {self.place(number)}: {images.refers}={row[images.refers]!r}: no row of"
                f" {images.files[0]} has this {images.key}"
            )
        try:
            item = self.benchmark.item(row)
        except ValueError as error:
            raise RequestError(f"--data: {self.place(number)}: {error}") from None
        if not is_reference(item.reference):
            raise RequestError(
                f"--data: {self.place(number)}: the right answer is {item.reference!r}; expected a text that is not"
                " empty, or a list of texts with one"
            )
        return item

    def _check_ids(self) -> None:
        """Checks that no id has more questions than the benchmark allows."""
        allowed = self.benchmark.questions_per_id
        if allowed is None:
            return
        rows: dict[str, list[int]] = {}
        for number, item in enumerate(self.items):
            same = rows.setdefault(item.id, [])
            same.append(number)
            if len(same) > allowed:
                raise RequestError(
                    f"--data: {self.place(number)}: the id {item.id!r} is also that of {self.place(same[0])}; expected"
                    f" at most {allowed} row{'s' * (allowed > 1)} with one id: remove what is there twice"
                )

    def _open_pictures(self, data: str) -> None:
        images = self.benchmark.images
        assert images is not None
        columns: dict[str, Kind] = {images.key: "text", images.picture: "picture"}
        for path in files_of(self.benchmark, data, images.files):
            file = Rows(path)
            check_columns(file, self.benchmark, columns)
            for row, key in enumerate(row[images.key] for row in file.columns([images.key])):
                if key is None:
                    raise RequestError(f"--data: {file.path}, row {row}: {images.key} is null; expected text")
                if key in self._pictures:
                    other, first = self._pictures[key]
                    raise RequestError(
                        f"--data: {file.path}, row {row}: {images.key}={key!r} is also that of {other.path}, row"
                        f" {first}; expected one picture for each: remove what is there twice"
                    )
                self._pictures[key] = file, row


def files_of(benchmark: Benchmark, data: str, patterns: Sequence[str]) -> list[Path]:
    """Returns the files of the first pattern that matches, in the repository's folder below `data` or in `data` itself.

    Raises:
      RequestError: there are none, a shard is missing, or a folder has more than one table.
    """
    root = as_path(data)
    if not root.is_dir():
        raise RequestError(f"--data={data}: is not a folder; expected one with the files of {benchmark.repo}")
    folder = benchmark.repo.rpartition("/")[2]
    for place, pattern in itertools.product((root / folder, root), patterns):
        if found := sorted(place.glob(pattern)):
            check_shards(found)
            return found
    raise RequestError(
        f"--data={data}: has no {' or '.join(patterns)}, nor has {folder}/ in it; expected the files of"
        f" {benchmark.repo}, as hf download --repo-type=dataset writes them"
    )


def check_shards(paths: Sequence[Path]) -> None:
    """Checks that of files named "...-00000-of-00002.parquet" all are there, and no file of another such table.

    Raises:
      RequestError: one is missing, or a folder also has another file whose name begins like theirs.
    """
    matches = {path: SHARD.fullmatch(path.name) for path in paths}
    tables: dict[tuple[Path, str, str], dict[int, Path]] = {}
    for path, match in matches.items():
        if match:
            tables.setdefault((path.parent, match[1], match[3]), {}).setdefault(int(match[2]), path)
    for (folder, stem, count), shards in tables.items():
        for number in range(int(count)):
            if number not in shards:
                missing = folder / f"{stem}-{number:05d}-of-{count}.parquet"
                raise RequestError(f"--data: {missing}: no such file; expected all {int(count)} files of the table")
        own = [shards[number] for number in range(int(count))]
        for path in paths:
            if path.parent == folder and path.name.startswith(f"{stem}-") and path not in own:
                raise RequestError(
                    f"--data: {folder}: has {path.name} beside {own[0].name}; expected the files of one table: move"
                    " away those of the other"
                )


def check_columns(file: Rows, benchmark: Benchmark, columns: Mapping[str, Kind]) -> None:
    """Checks that a file has columns of these kinds.

    Raises:
      RequestError: one is missing or holds something else.
    """
    for name, kind in columns.items():
        if name not in file.schema.names:
            shown = ", ".join(repr(column[:30]) for column in file.schema.names[:20]) or "(none)"
            raise RequestError(
                f"--data: {file.path} has the columns {shown}; expected also {name!r}, {EXPECTED[kind]}, as in"
                f" {benchmark.repo}"
            )
        if not is_kind(found := file.schema.field(name).type, kind):
            raise RequestError(f"--data: {file.path}: the column {name!r} of type {found}; expected {EXPECTED[kind]}")


def is_kind(found: pa.DataType, kind: Kind) -> bool:
    """Whether a column of an Arrow type holds values of a kind; a column of nulls may hold any."""
    if pa.types.is_null(found):
        return True
    if kind in ("texts", "pictures"):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and is_kind(found.value_type, "text" if kind == "texts" else "picture")
    is_text = pa.types.is_string(found) or pa.types.is_large_string(found)
    if kind == "picture":
        is_bytes = pa.types.is_binary(found) or pa.types.is_large_binary(found)
        return is_text or is_bytes or (pa.types.is_struct(found) and found.get_field_index("bytes") >= 0)
    return is_text or (kind == "number" and pa.types.is_integer(found))


def is_reference(reference: Any) -> bool:
    """Whether this is a text, or a list of texts, with more than white space."""
    texts = reference if isinstance(reference, list | tuple) else [reference]
    return all(isinstance(text, str) for text in texts) and any(text.strip() for text in texts)


def encoded(picture: Any, shown: str) -> bytes:
    """Returns the bytes of a picture's file: as they are, beside a path, or in base64.

    Raises:
      SkipSample: there are none; `shown` names the picture.
    """
    if isinstance(picture, dict):
        picture = picture.get("bytes")
    if isinstance(picture, str):
        try:
            return base64.b64decode(picture, validate=True)
        except (binascii.Error, ValueError):
            raise SkipSample("embedded", f"{shown} is not base64") from None
    if not picture:
        raise SkipSample("missing_file", f"{shown} has no bytes; expected the picture's file inside the table")
    return picture


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - MAX_BYTES))
        ending = file.read()
        file.seek(0)
        return hashlib.sha256(f"{size}\0".encode() + file.read(MAX_BYTES) + ending).hexdigest()
