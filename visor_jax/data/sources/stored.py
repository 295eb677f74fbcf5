"""The common base of sources that read stored records: files of records, with pictures in a folder or in the records.

In: `RecordFile`s, one per shard, whose records are in a layout that `visor_jax.data.records` parses. Out: a
`RecordSource`: samples by index, splits, ids, places for messages.

A format implements `RecordFile` and makes its row of the table with `stored_kind`. Reading a record that cannot be used
raises `SkipSample`. Records about the same pictures always belong to the same split.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from visor_jax.config.data_fields import DEFAULT_MAX_PIXELS
from visor_jax.data.images import byte_limit, decode_embedded, open_under
from visor_jax.data.json_records import BadLine
from visor_jax.data.media import EmbeddedPicture, Picture, Video, names_of
from visor_jax.data.picture_paths import plain_name, resolve_under
from visor_jax.data.records import Record, named_pictures, parse_record, record_id
from visor_jax.data.sample import NO_PICTURE, NO_VIDEO, Sample, SkipSample
from visor_jax.data.source_kind import SPLITS
from visor_jax.data.video_limits import VideoLimits
from visor_jax.data.videos import decode_video, frame_files, open_video_under, stack_frames
from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_regular

WHOLE = "all"  # every record of the files, besides the splits
MAX_VIDEO_BYTES = 1 << 30  # of a video's file that is copied


class EmptySplit(RequestError):
    """A split has no record."""


class RecordFile(Protocol):
    """One file of records with random access; thread-safe.

    Records are values as `json.load` returns them, in which a picture may also be `{"bytes": bytes, "path": name}`, or
    a `BadLine`.
    """

    @property
    def path(self) -> Path: ...

    def __len__(self) -> int: ...

    def record(self, number: int) -> Any:
        """Returns record `number`, with the bytes of its pictures."""
        ...

    def outline(self, number: int) -> Any:
        """Returns record `number`; the bytes of its pictures may be empty."""
        ...

    def identity(self, number: int) -> Any:
        """Returns record `number` reduced to its id and the names of its pictures. Called for every record."""
        ...


@dataclass(frozen=True)
class RecordList:
    """A `RecordFile` over records in memory."""

    path: Path
    records: Sequence[Any]

    def __len__(self) -> int:
        return len(self.records)

    def record(self, number: int) -> Any:
        return self.records[number]

    def outline(self, number: int) -> Any:
        return self.records[number]

    def identity(self, number: int) -> Any:
        return self.records[number]


@dataclass(frozen=True)
class Reading:
    """How a source reads its records.

    Attributes:
        max_image_pixels: a picture with more is skipped. All pictures of a record together may have
            max(`max_image_pixels`, `DEFAULT_MAX_PIXELS`).
        max_pictures: a record with more is skipped before any picture is opened; None for any number.
        follow_links: whether links inside the root may lead out of it.
        split: "train", "validation", "test", or "all".
        test_fraction: 0 puts every record into every split. Otherwise about this fraction of the records is "test", the
            same fraction "validation", and the rest "train". A hash of the record's picture names (of its id if it has
            none) decides, so adding records moves no other record.
        max_frames: frames used of one video.
        select: number of records -> the indices that are used, ascending; None for all. Applied before the split.
        reduce_to: `images.decode_image`'s, of a picture that is its record's only one and of one among several.
    """

    max_image_pixels: int = DEFAULT_MAX_PIXELS
    max_pictures: int | None = None
    follow_links: bool = False
    split: str = "train"
    test_fraction: float = 0.0
    max_frames: int = 32
    select: Callable[[int], Sequence[int]] | None = None
    reduce_to: tuple[int, int] = (0, 0)


class StoredSource:
    """A `RecordSource` over record files, in order."""

    def __init__(self, name: str, files: Sequence[RecordFile], root: Path, reading: Reading) -> None:
        """
        Args:
            name: of the source, in samples, metrics and messages.
            files: the shards; at least one.
            root: the folder that holds pictures which records name.
            reading: how records are read, and which.

        Raises:
            RequestError: the folder is missing, the split is unknown or has no record.
        """
        if reading.split not in (*SPLITS, WHOLE):
            raise RequestError(f"data: unknown split {reading.split!r}; expected one of {', '.join(SPLITS)}")
        if not root.is_dir():
            raise RequestError(f"data.root: {root} is not a folder")
        self.name, self.files = name, tuple(files)
        self._root, self._reading = root, reading
        self._starts = list(itertools.accumulate((len(file) for file in files), initial=0))
        self._selected = range(self._starts[-1]) if reading.select is None else reading.select(self._starts[-1])
        self._chosen = self._chosen_numbers()
        if not len(self._chosen):
            raise self.empty_split(reading.split)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        """Returns sample `index` of the split; raises `SkipSample` for a bad record, `IndexError` outside 0..len-1."""
        return self._sample(index, outline=False)

    def outline(self, index: int) -> Sample:
        """Returns sample `index` with `NO_PICTURE` for each picture and `NO_VIDEO` for each video; opens none."""
        return self._sample(index, outline=True)

    def place(self, index: int) -> str:
        """Returns the place of sample `index`: "set.json[17]" is the 18th record of the file."""
        file, number = self._locate(self._number(index))
        return f"{file.path.name}[{number}]"

    def record_facts(self, index: int) -> tuple[str, int | None]:
        """Returns the id of sample `index` and how many pictures it has, None for a bad record; opens no picture."""
        number = self._number(index)
        file, local = self._locate(number)
        record = pictures = None
        try:
            record = file.outline(local)
            pictures = len(_parsed(record, number).pictures)
        except SkipSample:
            pass
        return record_id(record, number), pictures

    def splits_of(self, index: int) -> tuple[str, ...]:
        """Returns the splits that contain sample `index`: one, or all of them without a `test_fraction`."""
        return self._splits(self._number(index))

    def empty_split(self, *splits: str) -> RequestError:
        """Returns the error for splits that have no record."""
        names, files = " and ".join(map(repr, splits)), self.files
        where = str(files[0].path) if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more files"
        if not len(self._selected):
            return EmptySplit(f"data.path: {where} has no record; expected at least one")
        return EmptySplit(
            f"data.test_fraction={self._reading.test_fraction:g} leaves split {names} without any of the "
            f"{len(self._selected)} records of {where}; expected more pictures (all records about a picture belong "
            "to one split), another fraction, or a file for each split ({split} in data.path)"
        )

    def duplicate_ids(self) -> int:
        """Returns how many records of the split repeat the id of an earlier one. They are kept."""
        ids = Counter(record_id(self._identity(number), number) for number in self._chosen)
        return sum(count - 1 for count in ids.values())

    def picture_files(self, index: int) -> list[tuple[str, Path | bytes | None]]:
        """Returns (name, content) of the pictures of sample `index`.

        The content is a file, the bytes of a picture that the record holds, or None if the file may not be read. Of a
        video it is its file or folder, or its first frame where the record lists frames.
        """
        number = self._number(index)
        file, local = self._locate(number)
        try:
            pictures = _parsed(file.record(local), number).pictures
        except SkipSample:
            return []
        found: list[tuple[str, Path | bytes | None]] = []
        for picture in pictures:
            stored = picture.frames[0] if isinstance(picture, Video) and picture.frames else picture
            name = next(iter(names_of(stored)), "")
            if not isinstance(stored, str) and stored.data:
                found.append((name, stored.data))
                continue
            try:
                found.append((name, resolve_under(self._root, name, self._reading.follow_links)))
            except SkipSample:
                found.append((name, None))
        return found

    def encoded(self, index: int) -> tuple[Record, list[str]]:
        """Returns the record of sample `index` with the encoded files of its pictures, and its pictures' names.

        Decodes nothing. A video that is a folder becomes its frames.

        Raises:
            SkipSample: the record or a file cannot be read.
        """
        number = self._number(index)
        file, local = self._locate(number)
        try:
            record = _parsed(file.record(local), number)
            pictures = tuple(map(self._held, record.pictures))
        except SkipSample as why:
            raise SkipSample(why.reason, f"{self.place(index)}: {why.detail}") from None
        return dataclasses.replace(record, pictures=pictures), named_pictures(file.identity(local))

    def _held(self, picture: Picture) -> Picture:
        """Returns a picture or a video with the bytes of its files."""
        if isinstance(picture, str):
            return EmbeddedPicture(self._content(picture, byte_limit(self._reading.max_image_pixels)), picture)
        if isinstance(picture, EmbeddedPicture) or picture.data:
            return picture
        frames: Sequence[str | EmbeddedPicture] = picture.frames
        if not frames:
            folder = resolve_under(self._root, picture.name, self._reading.follow_links)
            if not folder.is_dir():
                return Video(picture.name, self._content(picture.name, MAX_VIDEO_BYTES))
            frames = [f"{picture.name.rstrip('/')}/{name}" for name in frame_files(folder)]
        return Video(frames=tuple(frame for frame in map(self._held, frames) if isinstance(frame, EmbeddedPicture)))

    def _content(self, name: str, max_bytes: int) -> bytes:
        path = resolve_under(self._root, name, self._reading.follow_links)
        try:
            return read_regular(path, max_bytes)
        except OSError as error:
            raise SkipSample("missing_file", f"{name[:200]!r}: {error.strerror or error}") from None

    def _sample(self, index: int, *, outline: bool) -> Sample:
        number = self._number(index)
        file, local = self._locate(number)
        try:
            record = _parsed(file.outline(local) if outline else file.record(local), number)
            images = tuple(map(_placeholder, record.pictures)) if outline else self._images(record)
            return Sample(record.id, images, record.turns, self.name, system=record.system)
        except SkipSample as why:
            raise SkipSample(why.reason, f"{self.place(index)}: {why.detail}") from None

    def _number(self, index: int) -> int:
        """Returns the number, over all files, of the record of sample `index`."""
        if not 0 <= index < len(self._chosen):
            raise IndexError(f"{self.name}: no sample {index}, there are {len(self._chosen)}")
        return int(self._chosen[index])

    def _locate(self, number: int) -> tuple[RecordFile, int]:
        """Returns the file of a record, and the record's number in it."""
        place = bisect.bisect_right(self._starts, number) - 1
        return self.files[place], number - self._starts[place]

    def _identity(self, number: int) -> Any:
        """Returns a record's id and picture names; None if the file is damaged there."""
        file, local = self._locate(number)
        try:
            return file.identity(local)
        except SkipSample:
            return None

    def _images(self, record: Record) -> tuple[np.ndarray, ...]:
        """Decodes the record's pictures one by one, within one limit on the sum of their pixels."""
        most = self._reading.max_pictures
        if most is not None and len(record.pictures) > most:
            raise SkipSample("too_long", f"{len(record.pictures)} pictures; data.tiles={most} holds fewer")
        images: list[np.ndarray] = []
        allowed = self._reading.max_image_pixels
        room = max(allowed, DEFAULT_MAX_PIXELS)
        reduce_to = self._reading.reduce_to[sum(not isinstance(picture, Video) for picture in record.pictures) > 1]
        for picture in record.pictures:
            try:
                if isinstance(picture, Video):
                    image = self._decode_video(picture, min(allowed, room), room)
                else:
                    image = self._decode(picture, min(allowed, room), reduce_to)
            except SkipSample as why:
                if why.reason == "too_many_pixels" and room < allowed:
                    raise SkipSample(why.reason, f"{why.detail}, after the record's other pictures") from None
                raise
            images.append(image)
            room -= image.size // 3
        return tuple(images)

    def _decode(self, picture: str | EmbeddedPicture, max_pixels: int, reduce_to: int) -> np.ndarray:
        if isinstance(picture, EmbeddedPicture):
            return decode_embedded(picture.data, max_pixels, picture.name, reduce_to)
        return open_under(self._root, picture, max_pixels, self._reading.follow_links, reduce_to)

    def _decode_video(self, video: Video, max_pixels: int, room: int) -> np.ndarray:
        limits = VideoLimits(self._reading.max_frames, max_pixels, room, self._reading.max_pictures)
        if video.frames:
            shown = f"the video of {names_of(video)[:1]}"
            return stack_frames(video.frames, lambda frame: self._decode(frame, max_pixels, 0), limits, shown)
        if video.data:
            return decode_video(video.data, limits, repr(video.name[:200]) if video.name else "the record's video")
        return open_video_under(self._root, video.name, limits, self._reading.follow_links)

    def _chosen_numbers(self) -> Sequence[int]:
        split = self._reading.split
        if split == WHOLE or not self._reading.test_fraction:
            return self._selected
        return [number for number in self._selected if split in self._splits(number)]

    def _splits(self, number: int) -> tuple[str, ...]:
        fraction = self._reading.test_fraction
        if not fraction:
            return SPLITS
        record = self._identity(number)
        key = [plain_name(self._root, name) for name in named_pictures(record)] or record_id(record, number)
        digest = hashlib.sha256(json.dumps(key).encode("ascii")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        return (("test", "validation", "train")[min(int(place / fraction), 2)],)


def _placeholder(picture: Picture) -> np.ndarray:
    return NO_VIDEO if isinstance(picture, Video) else NO_PICTURE


def _parsed(record: Any, number: int) -> Record:
    if isinstance(record, BadLine):
        raise SkipSample("bad_json", record.error)
    return parse_record(record, number)
