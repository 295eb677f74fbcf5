"""Describes a kind of data source: how it is opened, and how each consumer draws from it.

In: nothing. Out: `SourceKind`, one row of the table in `visor_jax.data.sources`; `RecordSource`, the protocol of
sources over stored records; and `as_records`, which gives any source that protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from visor_jax.config import Config
from visor_jax.data.sample import Sample, Sheet, Source
from visor_jax.errors import RequestError

if TYPE_CHECKING:
    from visor_jax.data.sample import Part

SPLITS = ("train", "validation", "test")
LEVELS = ("easy", "middle", "hard")  # of questions


@runtime_checkable
class RecordSource(Source, Protocol):
    """A source over stored records. Messages name the place of a record."""

    def place(self, index: int) -> str:
        """Returns where sample `index` is stored, for messages."""
        ...

    def record_facts(self, index: int) -> tuple[str | None, int | None]:
        """Returns the id and the number of pictures of sample `index`, None if unknown; opens no picture."""
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

    def picture_files(self, index: int) -> Iterable[tuple[str, Path | bytes | None]]:
        """Returns (name, content) of each picture of sample `index`: a file, bytes, or None if it cannot be read."""
        ...


@dataclass(frozen=True)
class _Samples:
    """A source without stored records as a `RecordSource`; all its samples belong to `split`."""

    source: Source
    split: str

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample | Sheet:
        return self.source[index]

    def place(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def record_facts(self, index: int) -> tuple[str | None, int | None]:
        return None, None

    def duplicate_ids(self) -> int:
        return 0

    def splits_of(self, index: int) -> tuple[str, ...]:
        return (self.split,)

    def empty_split(self, *splits: str) -> RequestError:
        return RequestError(f"data: {self.name} has no sample in split {' and '.join(map(repr, splits))}")

    def picture_files(self, index: int) -> Iterable[tuple[str, Path | None]]:
        return ()


def as_records(source: Source, split: str) -> RecordSource:
    """Returns `source` if it stores records; else a view of it whose records have no id and belong to `split`."""
    return source if isinstance(source, RecordSource) else _Samples(source, split)


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
      parts: (config, stage) -> the parts of a stage's training stream; None: the split "train" as one part.
      held_out: (config, stage) -> (name, source) of each part of the data that a stage is validated on; None: the split
        "validation" as one part.
      levels: task -> one of `LEVELS`; other tasks have no level.
      controls: whether an evaluation also asks its questions about gray pictures and about those of other questions
        (`visor_jax.data.controls`).
      tasks: (config) -> the tasks that questions for labels and evaluation are about; None: all that have a level.
      for_labels: (config) -> the source that the label stage asks questions from; None: the training split.
      for_evaluation: (config, split) -> the source that search and evaluate ask questions from; None: the split itself.
      check: (config) -> raises RequestError if `config.data` does not fit this kind.
      check_splits: (config, splits) -> raises RequestError if one of the splits has no usable record.
      stored_splits: (config) -> the splits that `visor data` reads by default.
      split_files: (config) -> {split: file name} if every split has its own file; else empty.
      from_file: (file) -> fields of `config.data` that evaluate on that file; None if the kind reads no file.
    """

    open: Callable[[Config, str], Source]
    endless: bool = False
    parts: Callable[[Config, str], list[Part]] | None = None
    held_out: Callable[[Config, str], list[tuple[str, Source]]] | None = None
    levels: Mapping[str, str] = field(default_factory=dict)
    controls: bool = False
    tasks: Callable[[Config], Sequence[str]] | None = None
    for_labels: Callable[[Config], Source] | None = None
    for_evaluation: Callable[[Config, str], Source] | None = None
    check: Callable[[Config], None] = _accept
    check_splits: Callable[[Config, Collection[str]], None] = _accept
    stored_splits: Callable[[Config], Sequence[str]] = _every_split
    split_files: Callable[[Config], Mapping[str, str]] = lambda _: {}
    from_file: Callable[[Path], dict[str, Any]] | None = None


def split_read_by(stage: str) -> str:
    """Returns the split that a stage reads; the evaluation after all stages reads "test"."""
    return "validation" if stage == "search" else "train"
