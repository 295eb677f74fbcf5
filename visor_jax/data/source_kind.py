"""Describes a kind of data source: how it is opened, and how each consumer draws from it.

In: nothing. Out: `SourceKind`, one row of the table in `visor_jax.data.sources`, and `RecordSource`, the protocol of
sources over stored records.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from visor_jax.config import Config
from visor_jax.data.sample import Source
from visor_jax.errors import RequestError

SPLITS = ("train", "validation", "test")


@runtime_checkable
class RecordSource(Source, Protocol):
    """A source over stored records. Messages name the place of a record."""

    def place(self, index: int) -> str:
        """Returns where sample `index` is stored, for messages."""
        ...

    def record_facts(self, index: int) -> tuple[str, int | None]:
        """Returns the id and the number of pictures of sample `index`; opens no picture."""
        ...

    def duplicate_ids(self) -> int:
        """Returns how many records repeat the id of an earlier record."""
        ...

    def splits_of(self, index: int) -> tuple[str, ...]:
        """Returns the splits that contain sample `index`."""
        ...

    def empty_split(self, *splits: str) -> RequestError:
        """Returns the error that names splits without records."""
        ...

    def picture_files(self, index: int) -> Iterable[tuple[str, Path | None]]:
        """Returns (name, path) of each picture of sample `index`; the path is None if the file does not exist."""
        ...


def _accept(*_: Any) -> None:
    """Accepts every configuration."""


def _every_split(_: Any) -> Sequence[str]:
    return SPLITS


@dataclass(frozen=True)
class SourceKind:
    """One kind of data source: a row of the table.

    Attributes:
      open: (config, split) -> the source of a split's conversations.
      endless: True for a generated source. Each consumer reads a separate range in order (`visor_jax.data.draws`); a
        finite source is shuffled and repeated.
      levels: task -> "easy" or "hard"; other tasks have no level.
      for_labels: (config) -> the source that the label stage asks questions from; None: the training split.
      for_evaluation: (config, split) -> the source that search and evaluate ask questions from; None: the split itself.
      has_patch_labels: whether stage "base" can train on it.
      check: (config) -> raises RequestError if `config.data` does not fit this kind.
      check_splits: (config, splits) -> raises RequestError if one of the splits has no usable record.
      stored_splits: (config) -> the splits that `visor data` reads by default.
      split_files: (config) -> {split: file name} if every split has its own file; else empty.
      from_file: (file) -> fields of `config.data` that evaluate on that file; None if the kind reads no file.
    """

    open: Callable[[Config, str], Source]
    endless: bool = False
    levels: Mapping[str, str] = field(default_factory=dict)
    for_labels: Callable[[Config], Source] | None = None
    for_evaluation: Callable[[Config, str], Source] | None = None
    has_patch_labels: bool = False
    check: Callable[[Config], None] = _accept
    check_splits: Callable[[Config, Collection[str]], None] = _accept
    stored_splits: Callable[[Config], Sequence[str]] = _every_split
    split_files: Callable[[Config], Mapping[str, str]] = lambda _: {}
    from_file: Callable[[Path], dict[str, Any]] | None = None


def split_read_by(stage: str) -> str:
    """Returns the split that a stage reads; the evaluation after all stages reads "test"."""
    return "validation" if stage == "search" else "train"
