"""Reads conversations from a JSON or JSON-lines file, with picture files in a folder.

In: a file as `json_records` reads it, whose records are in LLaVA's format or another that `records` reads:
`{"id", "image": name | [names] | absent, "conversations": [{"from": "human" | "gpt", "value"}], "data_source"?}`.
Out: a `Source`.

A file that cannot be read raises `RequestError`; reading a record that cannot be used raises `SkipSample`. Records
about the same pictures always belong to the same split.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visor_jax.config import Config
from visor_jax.config.schema import DEFAULT_MAX_PIXELS
from visor_jax.data.images import open_under
from visor_jax.data.json_records import BadLine, read_records
from visor_jax.data.picture_paths import plain_name, resolve_under
from visor_jax.data.records import Record, named_pictures, parse_record, record_id
from visor_jax.data.sample import NO_PICTURE, Sample, SkipSample
from visor_jax.data.source_kind import SPLITS, SourceKind
from visor_jax.errors import RequestError
from visor_jax.files.read_write import as_path

WHOLE = "all"  # every record of the file, besides the splits
SPLIT_MARK = "{split}"


class LlavaSource:
    """A `Source` over one file; its `name` is the file's name without the ending."""

    def __init__(
        self,
        path: Path,
        root: Path,
        *,
        max_image_pixels: int,
        split: str = "train",
        test_fraction: float = 0.0,
        max_pictures: int | None = None,
        follow_links: bool = False,
    ) -> None:
        """Reads the file; pictures are read with their samples.

        Args:
            path: the JSON or JSON-lines file.
            root: the folder that holds the records' pictures.
            max_image_pixels: a picture with more is skipped. All pictures of a record together may have
                max(`max_image_pixels`, `DEFAULT_MAX_PIXELS`).
            split: "train", "validation", "test", or "all".
            test_fraction: 0 puts every record into every split. Otherwise about this fraction of the records is "test",
                the same fraction "validation", and the rest "train". A hash of the record's picture names (of its id if
                it has none) decides, so adding records moves no other record.
            max_pictures: a record with more is skipped before any picture is opened; None for any number.
            follow_links: whether links inside `root` may lead out of it.

        Raises:
            RequestError: the file or folder is missing, the file cannot be read as JSON, or the split has no record.
        """
        if split not in (*SPLITS, WHOLE):
            raise RequestError(f"data: unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        self.name = path.stem
        self._path, self._root, self._follow_links = path, root, follow_links
        self._max_image_pixels, self._max_pictures = max_image_pixels, max_pictures
        self._test_fraction = test_fraction
        if not root.is_dir():
            raise RequestError(f"data.root: {root} is not a folder")
        self._records = read_records(path)
        self._chosen = [number for number in range(len(self._records)) if split in (WHOLE, *self._splits(number))]
        if not self._chosen:
            raise self.empty_split(split)

    @classmethod
    def from_config(cls, config: Config, split: str) -> LlavaSource:
        """Opens the source that `config.data` describes.

        `{split}` in `data.path` is replaced by the split: each split has its own file, and `data.test_fraction` is not
        used. Without a `data.root`, picture names are relative to the file's folder.

        Raises:
            RequestError: as the constructor.
        """
        data = config.data
        root, path = as_path(data.root), data_file(data, split)
        return cls(
            path,
            root if data.root else path.parent,
            max_image_pixels=data.max_image_pixels,
            split=split,
            test_fraction=0.0 if SPLIT_MARK in data.path else data.test_fraction,
            max_pictures=data.tiles,  # each picture takes at least one tile
            follow_links=data.follow_links,
        )

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        """Returns sample `index` of the split; raises `SkipSample` for a bad record, `IndexError` outside 0..len-1."""
        return self._at(index, self._images)

    def outline(self, index: int) -> Sample:
        """Returns sample `index` with `NO_PICTURE` for each picture; opens none."""
        return self._at(index, lambda record: (NO_PICTURE,) * len(record.pictures))

    def _at(self, index: int, images: Callable[[Record], tuple[np.ndarray, ...]]) -> Sample:
        if not 0 <= index < len(self._chosen):
            raise IndexError(f"{self.name}: no sample {index}, there are {len(self._chosen)}")
        try:
            record = self._parsed(self._chosen[index])
            return Sample(record.id, images(record), record.turns, self.name, system=record.system)
        except SkipSample as why:
            raise SkipSample(why.reason, f"{self.place(index)}: {why.detail}") from None

    def place(self, index: int) -> str:
        """Returns the place of sample `index`: "set.json[17]" is the 18th record of the file."""
        return f"{self._path.name}[{self._chosen[index]}]"

    def record_facts(self, index: int) -> tuple[str, int | None]:
        """Returns the id of sample `index` and how many pictures it names, None for a bad record; opens no file."""
        record = self._records[self._chosen[index]]
        try:
            pictures = len(self._parsed(self._chosen[index]).pictures)
        except SkipSample:
            pictures = None
        return record_id(record, self._chosen[index]), pictures

    def splits_of(self, index: int) -> tuple[str, ...]:
        """Returns the splits that contain sample `index`: one, or all of them without a `test_fraction`."""
        return self._splits(self._chosen[index])

    def empty_split(self, *splits: str) -> RequestError:
        """Returns the error for splits that have no record."""
        names = " and ".join(map(repr, splits))
        return RequestError(
            f"data.test_fraction={self._test_fraction:g} leaves split {names} without any of the "
            f"{len(self._records)} records of {self._path}; expected more pictures (all records about a picture belong "
            "to one split), another fraction, or a file for each split ({split} in data.path)"
        )

    def picture_files(self, index: int) -> list[tuple[str, Path | None]]:
        """Returns (name, file) of the pictures that sample `index` names; the file is None if it may not be read."""
        try:
            names = self._parsed(self._chosen[index]).pictures
        except SkipSample:
            return []
        files: list[tuple[str, Path | None]] = []
        for name in names:
            try:
                files.append((name, resolve_under(self._root, name, self._follow_links)))
            except SkipSample:
                files.append((name, None))
        return files

    def duplicate_ids(self) -> int:
        """Returns how many records of the split repeat the id of an earlier one. They are kept."""
        ids = Counter(record_id(self._records[number], number) for number in self._chosen)
        return sum(count - 1 for count in ids.values())

    def _parsed(self, number: int) -> Record:
        record = self._records[number]
        if isinstance(record, BadLine):
            raise SkipSample("bad_json", record.error)
        return parse_record(record, number)

    def _images(self, record: Record) -> tuple[np.ndarray, ...]:
        """Decodes the record's pictures one by one, within one limit on the sum of their pixels."""
        if self._max_pictures is not None and len(record.pictures) > self._max_pictures:
            raise SkipSample(
                "too_long", f"{len(record.pictures)} pictures; data.tiles={self._max_pictures} holds fewer"
            )
        images: list[np.ndarray] = []
        room = max(self._max_image_pixels, DEFAULT_MAX_PIXELS)
        for name in record.pictures:
            try:
                image = open_under(self._root, name, min(self._max_image_pixels, room), self._follow_links)
            except SkipSample as why:
                if why.reason == "too_many_pixels" and room < self._max_image_pixels:
                    raise SkipSample(why.reason, f"{why.detail}, after the record's other pictures") from None
                raise
            images.append(image)
            room -= image.shape[0] * image.shape[1]
        return tuple(images)

    def _splits(self, number: int) -> tuple[str, ...]:
        if not self._test_fraction:
            return SPLITS
        record = self._records[number]
        names = [plain_name(self._root, name) for name in named_pictures(record)]
        key = names or record_id(record, number)
        digest = hashlib.sha256(json.dumps(key).encode("ascii")).digest()
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        return (("test", "validation", "train")[min(int(fraction / self._test_fraction), 2)],)


def data_file(data: Any, split: str) -> Path:
    """Returns the file of a split: `data.path` relative to `data.root`, or an absolute path or one with `~`."""
    name = data.path.replace(SPLIT_MARK, split)
    return as_path(name) if name.startswith("~") else as_path(data.root) / name


def check_splits(config: Config, splits: Collection[str]) -> None:
    """Checks that each of `splits` has records, so that a run does not fail on an empty one after hours of training.

    "validation" and "test" also need one usable record; training reads "train" immediately, so it is not tried here. A
    single file is read once for all splits.

    Raises:
        RequestError: a split is empty or has no usable record, or its file cannot be read.
    """
    if SPLIT_MARK in config.data.path:
        for split in sorted({*splits} - {"train"}):
            source = LlavaSource.from_config(config, split)
            _require_usable(source, split, range(len(source)))
        return
    source = LlavaSource.from_config(config, WHOLE)
    members: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index in range(len(source)):
        for split in source.splits_of(index):
            members[split].append(index)
    if missing := [split for split in SPLITS if split in splits and not members[split]]:
        raise source.empty_split(*missing)
    for split in sorted({*splits} - {"train"}):
        _require_usable(source, split, members[split])


def _require_usable(source: LlavaSource, split: str, indices: Iterable[int]) -> None:
    last = None
    for index in indices:
        try:
            source[index]
        except SkipSample as why:
            last = why
        else:
            return
    raise RequestError(f"data: split {split!r} has no usable record; see visor data check; the last one: {last}")


def _check(config: Config) -> None:
    data = config.data
    if not data.path:
        raise RequestError(
            f"data.path='': expected the JSON file that data.source={data.source!r} reads, relative to data.root"
        )


def _split_files(config: Config) -> Mapping[str, str]:
    """Returns {split: file name} if `data.path` names a file for each split; else {}."""
    path = config.data.path
    return {split: path.replace(SPLIT_MARK, split) for split in SPLITS} if SPLIT_MARK in path else {}


def _stored_splits(config: Config) -> Sequence[str]:
    """Returns the splits whose files exist, else the first split; a single file is read as a whole."""
    if SPLIT_MARK not in config.data.path:
        return [WHOLE]
    return [split for split in SPLITS if data_file(config.data, split).exists()] or SPLITS[:1]


def _from_file(file: Path) -> dict[str, Any]:
    """Returns fields of `config.data` that evaluate on all records of one file."""
    return {"root": str(file.parent), "path": file.name, "test_fraction": 0.0}


SOURCE = SourceKind(
    open=LlavaSource.from_config,
    check=_check,
    check_splits=check_splits,
    stored_splits=_stored_splits,
    split_files=_split_files,
    from_file=_from_file,
)
