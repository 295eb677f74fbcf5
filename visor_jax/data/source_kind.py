"""What a kind of data source is: how it is opened, and how each consumer draws from it.

In: nothing. Out: `SourceKind`, one row of the table in `visor_jax.data.sources`, and `RecordSource`, what a source over
stored records offers besides samples.
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
    """A source over stored records, each of which has a place that messages name."""

    def place(self, index: int) -> str:
        """Where sample `index` is stored, for messages."""
        ...

    def record_facts(self, index: int) -> tuple[str, int | None]:
        """Id and number of pictures of sample `index`; opens no picture."""
        ...

    def duplicate_ids(self) -> int:
        """How many records have an id that an earlier one has."""
        ...

    def splits_of(self, index: int) -> tuple[str, ...]:
        """The splits that sample `index` belongs to."""
        ...

    def empty_split(self, *splits: str) -> RequestError:
        """The error that names splits without records."""
        ...

    def picture_files(self, index: int) -> Iterable[tuple[str, Path | None]]:
        """(name, path) of each picture of sample `index`; the path is None where there is no such file."""
        ...


def _accept(*_: Any) -> None:
    """A check that every configuration passes."""


def _every_split(_: Any) -> Sequence[str]:
    return SPLITS


@dataclass(frozen=True)
class SourceKind:
    """One kind of data source: a row of the table.

    Attributes:
      open: (config, split) -> the conversations of a split.
      endless: generated without end. Each consumer reads a range of its own (`visor_jax.data.draws`), in order; a
        finite source is shuffled and repeated.
      levels: task -> "easy" or "hard"; tasks that it does not name have no level.
      for_labels: (config) -> what the label stage asks about; None: the training split.
      for_evaluation: (config, split) -> what search and evaluate ask about; None: the split itself.
      has_patch_labels: whether stage "base" can learn from it.
      check: (config) -> raises RequestError where `config.data` does not fit this kind.
      check_splits: (config, splits) -> raises RequestError where one of the splits has no usable record.
      stored_splits: (config) -> the splits that `visor data` reads where none is asked for.
      split_files: (config) -> {split: name of its file}, where every split has a file of its own; else empty.
      from_file: (file) -> fields of `config.data` to evaluate on that file; None where the kind reads no file.
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
    """The split that a stage learns from or asks about; the evaluation after all stages reads "test"."""
    return "validation" if stage == "search" else "train"
