"""Sources whose `data.path` names files: one, or the shards that a pattern matches.

In: a configuration, and how a file of the format is opened. Out: a `StoredSource`, and the format's row of the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from visor_jax.config import Config, architecture
from visor_jax.data.sample import SkipSample, Source
from visor_jax.data.sampling import Select
from visor_jax.data.source_kind import SPLITS, SourceKind
from visor_jax.data.sources.stored import WHOLE, Reading, RecordFile, StoredSource
from visor_jax.errors import RequestError
from visor_jax.files.patterns import expand, is_pattern
from visor_jax.files.read_write import as_path

SPLIT_MARK = "{split}"

OpenFile = Callable[[Path], RecordFile]
OpenSource = Callable[[Config, str], StoredSource]


def data_files(data: Any, split: str) -> list[Path]:
    """Returns the files of a split: `data.path` below `data.root`, or an absolute path or one with `~`.

    Raises:
        RequestError: a pattern matches no file.
    """
    name = data.path.replace(SPLIT_MARK, split)
    found = expand(data.root, name)
    if not found:
        raise RequestError(f"data.path={name!r}: matches no file below data.root={data.root!r}; expected at least one")
    return found


def open_files(config: Config, split: str, open_file: OpenFile) -> StoredSource:
    """Opens the source that `config.data` describes.

    `{split}` in `data.path` is replaced by the split: each split has its own files, and `data.test_fraction` is not
    used. Without a `data.root`, picture names are relative to the first file's folder.

    Args:
        config: `config.data` is read.
        split: "train", "validation", "test", or "all".
        open_file: opens one file; raises `RequestError` for one that it cannot read.

    Raises:
        RequestError: the folder or a file is missing or cannot be read, or the split has no record.
    """
    data = config.data
    paths = data_files(data, split)
    root = check_root(as_path(data.root) if data.root else paths[0].parent)
    return StoredSource(
        source_name(data.path.replace(SPLIT_MARK, split)),
        [open_file(path) for path in paths],
        root,
        reading(config, split, divided=SPLIT_MARK not in data.path),
    )


def reading(config: Config, split: str, *, divided: bool = True) -> Reading:
    """Returns how `config.data` says that records are read; `divided`: whether the same files hold other splits too."""
    data = config.data
    return Reading(
        max_image_pixels=data.max_image_pixels,
        max_pictures=data.tiles,  # each picture takes at least one tile
        follow_links=data.follow_links,
        reduce_to=_longest_sides(config) if data.reduced_jpeg else (0, 0),
        split=split,
        max_frames=data.max_frames,
        test_fraction=data.test_fraction if divided else 0.0,
        select=None if data.sampling == "all" else Select(data.sampling, config.seed, data.path),
    )


def _longest_sides(config: Config) -> tuple[int, int]:
    """Returns the longest side in pixels that a record's only picture, and one of several, may have as tiles."""
    arch = architecture(config)
    tile = arch.vision.tile_size
    return max(map(max, arch.anyres.pinpoints), default=tile), tile


def check_root(root: Path) -> Path:
    """Returns `root`.

    Raises:
        RequestError: it is not a folder.
    """
    if not root.is_dir():
        raise RequestError(f"data.root: {root} is not a folder")
    return root


def source_name(path: str) -> str:
    """Returns a source's name: that of its file without the ending, of a pattern without its special characters.

    A pattern of nothing else ("ai2d/*.parquet") has the name of its folder, or "records".
    """
    stem = Path(path).stem
    if not is_pattern(path):
        return stem
    folder = Path(path).parent.name
    plain = re.sub(r"[*?\[\]{}]+", "", re.sub(r"-[^-]*-of-[^-]*$", "", stem)).strip("-_., ")
    return plain or ("records" if not folder or is_pattern(folder) else folder)


def stored_kind(open_source: OpenSource, what: str) -> SourceKind:
    """Returns the row of the table for a format that `open_source` opens; `what` describes its files in messages."""

    def check(config: Config) -> None:
        if not config.data.path:
            raise RequestError(
                f"data.path='': expected the {what} that data.source={config.data.source!r} reads, relative to"
                " data.root"
            )

    return SourceKind(
        open=open_source,
        check=check,
        check_splits=lambda config, splits: check_splits(config, splits, open_source),
        stored_splits=_stored_splits,
        split_files=_split_files,
        from_file=_from_file,
    )


def check_splits(config: Config, splits: Collection[str], open_source: OpenSource) -> None:
    """Checks that each of `splits` has records, so that a run does not fail on an empty one after hours of training.

    "validation" and "test" also need one usable record; training reads "train" immediately, so it is not tried here.
    Files that hold all splits are opened once.

    Raises:
        RequestError: a split is empty or has no usable record, or its file cannot be read.
    """
    if SPLIT_MARK in config.data.path:
        for split in sorted({*splits} - {"train"}):
            source = open_source(config, split)
            require_usable(source, split, range(len(source)))
        return
    source = open_source(config, WHOLE)
    members: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index in range(len(source)):
        for split in source.splits_of(index):
            members[split].append(index)
    if missing := [split for split in SPLITS if split in splits and not members[split]]:
        raise source.empty_split(*missing)
    for split in sorted({*splits} - {"train"}):
        require_usable(source, split, members[split])


def require_usable(source: Source, split: str, indices: Iterable[int]) -> None:
    """Checks that one of the records is usable.

    Raises:
        RequestError: none is.
    """
    last = None
    for index in indices:
        try:
            source[index]
        except SkipSample as why:
            last = why
        else:
            return
    raise RequestError(f"data: split {split!r} has no usable record; see visor data check; the last one: {last}")


def _split_files(config: Config) -> Mapping[str, str]:
    """Returns {split: file name} if `data.path` names a file for each split; else {}."""
    path = config.data.path
    return {split: path.replace(SPLIT_MARK, split) for split in SPLITS} if SPLIT_MARK in path else {}


def _stored_splits(config: Config) -> Sequence[str]:
    """Returns the splits whose files exist, else the first split; files that hold all splits are read as a whole."""
    data = config.data
    if SPLIT_MARK not in data.path:
        return [WHOLE]
    found = {split: expand(data.root, data.path.replace(SPLIT_MARK, split)) for split in SPLITS}
    return [split for split, paths in found.items() if paths and paths[0].exists()] or SPLITS[:1]


def _from_file(file: Path) -> dict[str, Any]:
    """Returns fields of `config.data` that evaluate on all records of one file."""
    return {"root": str(file.parent), "path": file.name, "test_fraction": 0.0}
