"""Mixtures of stored sources: one stream for training, one list of records for everything else.

In: a configuration with `data.mixture` or `data.parts` (`visor_jax.config.mixture`). Out: the parts of the training
stream with their weights; or a `MixedSource`, which search, label, evaluate and `visor data` read. Each entry is a
source of its own: its strategy chooses records of its files, then `data.test_fraction` divides those into splits.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from visor_jax.config import Config
from visor_jax.config.mixture import Entry, Mixture, read_mixture
from visor_jax.data.records import Record
from visor_jax.data.sample import Part, Sample, Sheet, outline
from visor_jax.data.source_kind import SPLITS, SourceKind
from visor_jax.data.sources import SOURCES, SUFFIXES, named_kind, source_of_file
from visor_jax.data.sources.files import require_usable
from visor_jax.data.sources.stored import WHOLE, EmptySplit, RecordFile, StoredSource
from visor_jax.errors import RequestError, nearest


class MixedSource:
    """The records of several sources as one `RecordSource`; samples keep the names of their own sources.

    Sources are interleaved in proportion to their sizes, so that the first records of the whole, which is what a pass
    over fewer samples reads, represent every source.
    """

    def __init__(self, name: str, sources: Sequence[StoredSource]) -> None:
        """
        Args:
            name: of the mixture, in messages.
            sources: at least one.
        """
        self.name, self.sources = name, tuple(sources)
        sizes = [len(source) for source in sources]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        ranks = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        self._order = np.argsort(ranks, kind="stable")

    @property
    def files(self) -> tuple[RecordFile, ...]:
        """The files of all sources."""
        return tuple(file for source in self.sources for file in source.files)

    def __len__(self) -> int:
        return len(self._order)

    def locate(self, index: int) -> tuple[StoredSource, int]:
        """Returns the source of sample `index`, and the sample's index there; `IndexError` outside 0..len-1."""
        if not 0 <= index < len(self._order):
            raise IndexError(f"{self.name}: no sample {index}, there are {len(self._order)}")
        position = int(self._order[index])
        place = bisect.bisect_right(self._starts, position) - 1
        return self.sources[place], position - int(self._starts[place])

    def __getitem__(self, index: int) -> Sample | Sheet:
        """Returns sample or sheet `index`; raises `SkipSample` for a bad record."""
        source, own = self.locate(index)
        return source[own]

    def outline(self, index: int) -> Sample | Sheet:
        """Returns sample `index` without its pictures; opens none."""
        return outline(*self.locate(index))

    def encoded(self, index: int) -> tuple[Record, list[str]]:
        """Returns the record of sample `index` with the encoded files of its pictures, and its pictures' names."""
        source, own = self.locate(index)
        return source.encoded(own)

    def place(self, index: int) -> str:
        """Returns where sample `index` is stored, for messages."""
        source, own = self.locate(index)
        return source.place(own)

    def record_facts(self, index: int) -> tuple[str, int | None]:
        """Returns the id and the number of pictures of sample `index`."""
        source, own = self.locate(index)
        return source.record_facts(own)

    def duplicate_ids(self) -> int:
        """Returns how many records repeat the id of an earlier record of the same source."""
        return sum(source.duplicate_ids() for source in self.sources)

    def splits_of(self, index: int) -> tuple[str, ...]:
        """Returns the splits that contain sample `index`."""
        source, own = self.locate(index)
        return source.splits_of(own)

    def empty_split(self, *splits: str) -> RequestError:
        """Returns the error that names splits without records."""
        names = " and ".join(map(repr, splits))
        return RequestError(
            f"data.mixture: {self.name} has no record in split {names}; expected more pictures (all records about a"
            " picture belong to one split), another data.test_fraction, or files for each split ({split} in a path)"
        )

    def picture_files(self, index: int) -> Iterable[tuple[str, Path | bytes | None]]:
        """Returns (name, content) of each picture of sample `index`."""
        source, own = self.locate(index)
        return source.picture_files(own)


# --- from a configuration ---------------------------------------------------------------------------------------------


def mixture_of(config: Config) -> tuple[Mixture, list[Config]]:
    """Returns the configured mixture, and for each entry the configuration of its source alone.

    Raises:
        RequestError: the mixture cannot be read, or an entry's source is unknown or cannot be mixed.
    """
    mixture = read_mixture(dataclasses.asdict(config.data))
    return mixture, [_entry_config(config, mixture, entry) for entry in mixture.entries]


def _entry_config(config: Config, mixture: Mixture, entry: Entry) -> Config:
    name = entry.source or source_of_file(entry.path)
    if name is None:
        raise RequestError(
            f"{entry.place}: {entry.path!r}: no source and an unknown ending; expected one of {', '.join(SUFFIXES)}, or"
            f" `source` with one of {', '.join(_mixable())}"
        )
    if name not in _mixable():
        hint = nearest(name, _mixable())
        raise RequestError(
            f"{entry.place}: source={name!r}: expected one of {', '.join(_mixable())}" + (f"; {hint}" if hint else "")
        )
    fields = {"source": name, "path": entry.path, "sampling": entry.sampling, "mixture": "", "parts": ()}
    data = dataclasses.replace(config.data, root=str(mixture.root_of(entry)), **fields)
    return dataclasses.replace(config, data=data)


def _mixable() -> list[str]:
    """Returns the names of the sources that read stored records."""
    return [name for name in SOURCES if named_kind(name).from_file is not None]


def open_entries(config: Config, split: str) -> list[tuple[Entry, StoredSource]]:
    """Opens the sources of a mixture that have records in a split; for "train" and "all" that is every source.

    Raises:
        RequestError: a source cannot be opened, or has no record to train on; the message begins with its place.
    """
    mixture, configs = mixture_of(config)
    opened: list[tuple[Entry, StoredSource]] = []
    for entry, own in zip(mixture.entries, configs, strict=True):
        kind = named_kind(own.data.source)
        if split in ("validation", "test") and not {split, WHOLE} & {*kind.stored_splits(own)}:
            continue
        try:
            source = kind.open(own, split)
        except EmptySplit as error:
            if split in ("train", WHOLE):
                raise RequestError(f"{entry.place}: {error}") from None
            continue
        except RequestError as error:
            raise RequestError(f"{entry.place}: {error}") from None
        assert isinstance(source, StoredSource)
        opened.append((entry, source))
    return opened


def open_mixture(config: Config, split: str) -> MixedSource:
    """Opens a split ("train", "validation", "test", or "all") of the configured mixture.

    Raises:
        RequestError: as `open_entries`; or the split has no record.
    """
    name, sources = mixture_of(config)[0].name, [source for _, source in open_entries(config, split)]
    if not sources:
        raise RequestError(f"data.mixture: {name} has no record in split {split!r}")
    return MixedSource(name, sources)


def training_parts(config: Config) -> list[Part]:
    """Returns the parts of the training stream: the sources of the mixture, with their weights or sizes.

    Raises:
        RequestError: as `open_entries`.
    """
    return [Part(source, entry.weight or float(len(source))) for entry, source in open_entries(config, "train")]


# --- the row of the table ---------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    """Checks what needs no file: the sources of a list in the configuration. The YAML file is read when it is used."""
    for own in () if config.data.mixture else mixture_of(config)[1]:
        named_kind(own.data.source).check(own)


def _own_splits(config: Config) -> list[str]:
    """Returns the splits that some entry stores apart from the others; empty if every entry is divided."""
    apart: set[str] = set()
    for own in mixture_of(config)[1]:
        apart |= {*named_kind(own.data.source).stored_splits(own)} - {WHOLE}
    return [split for split in SPLITS if split in apart]


def _stored_splits(config: Config) -> Sequence[str]:
    apart = _own_splits(config)
    return [split for split in SPLITS if split in apart or config.data.test_fraction] if apart else [WHOLE]


def _split_files(config: Config) -> Mapping[str, str]:
    return dict.fromkeys(SPLITS, f"of the mixture {mixture_of(config)[0].name}") if _own_splits(config) else {}


def check_splits(config: Config, splits: Collection[str]) -> None:
    """Checks that each split has records, and those that are read late a usable one.

    Raises:
        RequestError: a source cannot be opened, or a split is empty or has no usable record.
    """
    for split in sorted(splits):
        source = open_mixture(config, split)
        if split != "train":
            require_usable(source, split, range(len(source)))


SOURCE = SourceKind(
    open=open_mixture,
    parts=training_parts,
    check=_check,
    check_splits=check_splits,
    stored_splits=_stored_splits,
    split_files=_split_files,
)
