"""Reads conversations from Parquet files, with encoded pictures inside, as `datasets` writes them for the hub.

In: files with the columns of `lmms-lab/LLaVA-OneVision-Data` (`id`, `image`: {bytes, path} or null, `conversations`,
`data_source`), or with `images` and `messages`; a row is a record that `records` parses. Out: a `StoredSource`.

A row is read with its whole row group (100 rows, as `datasets` writes pictures); the last few groups stay in memory, at
most `CACHE_BYTES` of them. Ids and picture names are read without the pictures. `ParquetRows` reads the rows of any
table, also those of benchmarks.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from visor_jax.config import Config
from visor_jax.data.media import PICTURE_KEYS, VIDEO_KEYS
from visor_jax.data.records import CONVERSATION_KEYS
from visor_jax.data.sample import SkipSample
from visor_jax.data.sources import files
from visor_jax.data.sources.stored import StoredSource
from visor_jax.errors import RequestError
from visor_jax.files.read_write import open_regular

CACHE_BYTES = 256 << 20  # of row groups that stay in memory, over all files of a process
MAX_GROUP_BYTES = 2 << 30  # of one row group
_MEDIA_KEYS = (*PICTURE_KEYS, *VIDEO_KEYS)
_BLOCK = 4096  # rows whose ids are converted at once
_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError)


class _GroupCache:
    """The row groups that were read last; thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._lock = max_bytes, threading.Lock()
        self._groups: OrderedDict[tuple[Any, ...], pa.Table] = OrderedDict()

    def get(self, key: tuple[Any, ...], read: Callable[[], pa.Table]) -> pa.Table:
        """Returns the group of `key`, which `read` reads if it is not in memory."""
        with self._lock:
            if (table := self._groups.get(key)) is not None:
                self._groups.move_to_end(key)
                return table
        table = read()
        with self._lock:
            self._groups[key] = table
            while len(self._groups) > 1 and sum(group.nbytes for group in self._groups.values()) > self._max_bytes:
                self._groups.popitem(last=False)
        return table


_CACHE = _GroupCache(CACHE_BYTES)


class ParquetRows:
    """One Parquet file, by rows: a row is read with its whole row group.

    Attributes:
        path: the file.
        schema: its columns, as Arrow types.
    """

    field = "data.path"  # what named the file, for messages

    def __init__(self, path: Path) -> None:
        """Reads the file's footer.

        Raises:
            RequestError: the file is missing, is not Parquet, or has large row groups.
        """
        self.path = path
        self._lock = threading.Lock()
        self._file: pq.ParquetFile | None = None
        metadata = self._opened().metadata
        self.schema: pa.Schema = self._opened().schema_arrow
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self._starts = list(itertools.accumulate((group.num_rows for group in groups), initial=0))
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_GROUP_BYTES:
            raise RequestError(
                f"{self.field}: {path}: a row group of {largest:,} bytes; expected at most {MAX_GROUP_BYTES:,}: write"
                " the table again with a smaller row_group_size, such as 100"
            )
        leaves = [metadata.schema.column(number) for number in range(metadata.num_columns)]
        self._texts = {leaf.path: leaf.logical_type.type == "STRING" for leaf in leaves}
        self._leaves = list(self._texts)

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, number: int, leaves: tuple[str, ...] | None = None) -> Any:
        """Returns a row as Python values.

        Args:
            number: of the row.
            leaves: the columns to read, or fields of them; None: all.

        Raises:
            SkipSample: "broken_file".
        """
        group = bisect.bisect_right(self._starts, number) - 1
        try:
            table = _CACHE.get((self.path, group, leaves), lambda: self._read([group], leaves))
            return table.slice(number - self._starts[group], 1).to_pylist()[0]
        except (*_ERRORS, IndexError) as error:
            raise SkipSample("broken_file", f"row group {group}: {_one_line(error)}") from None

    def fields(self, names: Collection[str]) -> tuple[str, ...]:
        """Returns the leaves of these columns, for `row`."""
        return tuple(leaf for leaf in self._leaves if leaf.partition(".")[0] in names)

    def columns(self, names: Collection[str]) -> list[dict[str, Any]]:
        """Returns all rows with these columns only.

        Raises:
            RequestError: the file is damaged.
        """
        return self._whole(self.fields(names), ", ".join(sorted(names))).to_pylist()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # other processes open the file themselves

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def _read(self, groups: Sequence[int], leaves: tuple[str, ...] | None) -> pa.Table:
        file = self._opened()
        with self._lock:
            return file.read_row_groups(groups, columns=None if leaves is None else list(leaves), use_threads=False)

    def _whole(self, leaves: tuple[str, ...], what: str) -> pa.Table:
        """Returns columns of all rows; `what` names them in messages.

        Raises:
            RequestError: the file is damaged.
        """
        try:
            return self._read(range(len(self._starts) - 1), leaves)
        except _ERRORS as error:
            raise RequestError(f"{self.field}: {self.path}: {what} cannot be read: {_one_line(error)}") from None

    def _opened(self) -> pq.ParquetFile:
        with self._lock:
            if self._file is None:
                try:
                    open_regular(self.path).close()
                    self._file = pq.ParquetFile(self.path, memory_map=False, pre_buffer=False)
                except _ERRORS as error:
                    cause = getattr(error, "strerror", None) or _one_line(error)
                    raise RequestError(f"{self.field}: cannot read {self.path} as Parquet: {cause}") from None
            return self._file


class ParquetShard(ParquetRows):
    """A `RecordFile` over one Parquet file."""

    def __init__(self, path: Path) -> None:
        """Reads the file's footer.

        Raises:
            RequestError: as `ParquetRows`; or the file lacks a column of conversations.
        """
        super().__init__(path)
        columns = self.schema.names
        if not any(key in columns for key in CONVERSATION_KEYS):
            shown = ", ".join(repr(column[:30]) for column in columns[:8]) or "(none)"
            raise RequestError(f"data.path: {path} has the columns {shown}; expected `conversations` or `messages`")
        schema = self._opened().metadata.schema
        leaves = [schema.column(number) for number in range(len(self._leaves))]
        flat = {leaf.path: leaf.physical_type for leaf in leaves if leaf.path in CONVERSATION_KEYS}
        if all(key in flat for key in CONVERSATION_KEYS if key in columns):
            kinds = " and ".join(f"`{key}` of type {kind}" for key, kind in flat.items())
            raise RequestError(f"data.path: {path}: the column {kinds}; expected a list of messages in every row")
        self._pictures = [key for key in _MEDIA_KEYS if key in columns]

    def record(self, number: int) -> Any:
        """Returns a row with the bytes of its pictures.

        Raises:
            SkipSample: "broken_file".
        """
        return self.row(number)

    def outline(self, number: int) -> Any:
        """Returns a row without the bytes of its pictures.

        Raises:
            SkipSample: "broken_file".
        """
        return self._without_bytes(self.row(number, tuple(filter(self._is_small, self._leaves))))

    def identity(self, number: int) -> Any:
        """Returns a row's id and picture names, for a file without picture columns its outline."""
        if not self._pictures:
            return self.outline(number)
        block, place = divmod(number, _BLOCK)
        return self._block(block)[place]

    def _is_small(self, leaf: str) -> bool:
        """Whether a column is anything but the bytes of the record's pictures, whose names stand beside them."""
        struct, _, field = leaf.rpartition(".")
        return not (field == "bytes" and leaf.partition(".")[0] in _MEDIA_KEYS and f"{struct}.path" in self._leaves)

    def _is_name(self, leaf: str) -> bool:
        """Whether a column holds names of the record's pictures."""
        return leaf.partition(".")[0] in self._pictures and self._texts[leaf]

    def _without_bytes(self, row: Any) -> Any:
        """Adds empty bytes to pictures, whose bytes were not read."""
        for key in self._pictures:
            row[key] = _emptied(row.get(key))
        return row

    @functools.cached_property
    def _identities(self) -> pa.Table:
        """Ids and picture names of all rows.

        Raises:
            RequestError: the file is damaged.
        """
        return self._whole(tuple(leaf for leaf in self._leaves if leaf == "id" or self._is_name(leaf)), "ids")

    def _block(self, block: int) -> list[Any]:
        """Returns the identities of `_BLOCK` rows; those that were converted last stay in memory."""
        last = self.__dict__.get("_last_block")
        if last is None or last[0] != block:
            rows = self._identities.slice(block * _BLOCK, _BLOCK).to_pylist()
            last = self.__dict__["_last_block"] = (block, [self._without_bytes(row) for row in rows])
        return last[1]


def _emptied(value: Any) -> Any:
    """Returns the value of a picture column with empty bytes for bytes that were not read."""
    if isinstance(value, list):
        return [_emptied(item) for item in value]
    return {"bytes": b"", **value} if isinstance(value, dict) else value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def open_parquet(config: Config, split: str) -> StoredSource:
    """Opens the source that `config.data` describes; see `files.open_files`."""
    return files.open_files(config, split, ParquetShard)


SOURCE = files.stored_kind(open_parquet, "Parquet files")
