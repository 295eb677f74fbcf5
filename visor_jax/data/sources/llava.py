"""Reads conversations from JSON or JSON-lines files, with picture files in a folder.

In: files as `json_records` reads them, whose records are in LLaVA's format or another that `records` parses:
`{"id", "image": name | [names] | absent, "conversations": [{"from": "human" | "gpt", "value"}], "data_source"?}`.
Out: a `StoredSource`.

A file that cannot be read raises `RequestError`; reading a record that cannot be used raises `SkipSample`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from visor_jax.config import Config
from visor_jax.data.json_records import read_records
from visor_jax.data.sources import files
from visor_jax.data.sources.stored import Reading, RecordList, StoredSource


def open_json(path: Path) -> RecordList:
    """Reads a JSON or JSON-lines file.

    Raises:
        RequestError: the file is missing or cannot be read as JSON.
    """
    return RecordList(path, read_records(path))


class LlavaSource(StoredSource):
    """A source over one file; its `name` is the file's name without the ending."""

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
            max_image_pixels, split, test_fraction, max_pictures, follow_links: as in `Reading`.

        Raises:
            RequestError: the file or folder is missing, the file cannot be read as JSON, or the split has no record.
        """
        reading = Reading(max_image_pixels, max_pictures, follow_links, split, test_fraction)
        files.check_root(root)
        super().__init__(path.stem, [open_json(path)], root, reading)

    @staticmethod
    def from_config(config: Config, split: str) -> StoredSource:
        """Opens the source that `config.data` describes; see `files.open_files`."""
        return files.open_files(config, split, open_json)


def check_splits(config: Config, splits: Collection[str]) -> None:
    """Checks that each of `splits` has records; see `files.check_splits`."""
    files.check_splits(config, splits, LlavaSource.from_config)


SOURCE = files.stored_kind(LlavaSource.from_config, "JSON file")
