"""Mixtures of sources: one stream for training, one list of records for everything else.

In: a configuration with `data.mixture` or `data.parts` (`visor_jax.config.mixture`). Out: the parts of the training
stream with their weights; or a `MixedSource`, which search, label, evaluate and `visor data` read. Each entry is a
source of its own: its strategy chooses records of its files, then `data.test_fraction` divides those into splits.

Some of `data.parts` may be generated: each is read in order, every consumer in its own range (`visor_jax.data.draws`).
Then search, label and evaluate ask one generated part (`data.question_part`), and everything else reads a sample of
each part in turn (`TurnsOfParts`).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from visor_jax.config import Config, stage_config
from visor_jax.config.mixture import GENERATED, Entry, Mixture, generated_parts, read_mixture
from visor_jax.data.draws import Within, index_range
from visor_jax.data.records import Record
from visor_jax.data.sample import Part, Sample, Sheet, Source, outline, samples_of
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


class NamedPart:
    """A generated source whose samples are named after the exercise, so that metrics tell the parts apart."""

    def __init__(self, source: Source, name: str) -> None:
        self._source, self.name = source, name

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample | Sheet:
        record = self._source[index]
        samples = tuple(dataclasses.replace(sample, source=self.name) for sample in samples_of(record))
        return Sheet(samples) if isinstance(record, Sheet) else samples[0]


class TurnsOfParts:
    """A sample of each of several sources in turn, as one endless source; stored ones begin again at their end."""

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        """
        Args:
            name: of the whole, in messages.
            sources: at least one of them endless; none is empty.
        """
        self.name, self.sources = name, tuple(sources)

    def __len__(self) -> int:
        return len(self.sources) * max(map(len, self.sources))

    def locate(self, index: int) -> tuple[Source, int]:
        """Returns the source of sample `index`, and the sample's index there; `IndexError` outside 0..len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: no sample {index}, there are {len(self)}")
        turn, place = divmod(index, len(self.sources))
        source = self.sources[place]
        return source, turn % len(source)

    def __getitem__(self, index: int) -> Sample | Sheet:
        """Returns sample `index`; raises `SkipSample` for a bad record."""
        source, own = self.locate(index)
        return source[own]

    def outline(self, index: int) -> Sample | Sheet:
        """Returns sample `index`, of a stored source without its pictures."""
        return outline(*self.locate(index))


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
    names = _mixable() if mixture.file else [*_mixable(), *(name for name in GENERATED if name in SOURCES)]
    if name not in names:
        hint = nearest(name, names)
        raise RequestError(
            f"{entry.place}: source={name!r}: expected one of {', '.join(names)}" + (f"; {hint}" if hint else "")
        )
    fields = {"source": name, "path": entry.path, "sampling": entry.sampling, "mixture": "", "parts": ()}
    data = dataclasses.replace(config.data, root=str(mixture.root_of(entry)), **fields)
    return dataclasses.replace(config, data=data)


def _mixable() -> list[str]:
    """Returns the names of the sources that read stored records."""
    return [name for name in SOURCES if named_kind(name).from_file is not None]


def open_entries(config: Config, split: str) -> list[tuple[Entry, Source]]:
    """Opens the sources of a mixture that have records in a split; for "train" and "all" that is every source.

    A generated source has every split; of "all" it gives the training split.

    Raises:
        RequestError: a source cannot be opened, or has no record to train on; the message begins with its place.
    """
    mixture, configs = mixture_of(config)
    opened: list[tuple[Entry, Source]] = []
    for entry, own in zip(mixture.entries, configs, strict=True):
        kind = named_kind(own.data.source)
        if entry.is_generated:
            opened.append((entry, NamedPart(kind.open(own, "train" if split == WHOLE else split), entry.path)))
            continue
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
    stored = [source for source in sources if isinstance(source, StoredSource)]
    if not stored:
        raise RequestError(f"data.mixture: {name} has no record in split {split!r}")
    return MixedSource(name, stored)


def training_parts(config: Config, stage: str) -> list[Part]:
    """Returns the parts of a stage's training stream: the sources of the mixture, with their weights or sizes.

    Of a generated source the stage reads its own range, in order.

    Raises:
        RequestError: as `open_entries`.
    """
    parts = []
    for entry, source in open_entries(config, "train"):
        if entry.is_generated:
            part = Part(Within(source, index_range(stage)[1]), entry.weight, shuffle=False, path=entry.path)
        else:
            part = Part(source, entry.weight or float(len(source)), path=entry.path)
        parts.append(part)
    return parts


# --- the row of the table ---------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    """Checks what needs no file: the sources of a list in the configuration. The YAML file is read when it is used."""
    if config.data.mixture:
        return
    mixture, configs = mixture_of(config)
    for own in configs:
        named_kind(own.data.source).check(own)
    generated = [(entry.source, entry.path) for entry in mixture.entries if entry.is_generated]
    if repeated := next((part for part in generated if generated.count(part) > 1), None):
        raise RequestError(
            f"data.parts: the generated part {repeated} stands {generated.count(repeated)} times, which repeats its"
            " samples; expected it once, with the sum of the weights"
        )


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


# --- with generated parts ---------------------------------------------------------------------------------------------


def kind_of(config: Config) -> SourceKind:
    """Returns the kind of source of a configured mixture; `levels` are those of the part that questions are from."""
    return _generated_kind(config) if generated_parts(vars(config.data)) else SOURCE


def question_config(config: Config) -> Config:
    """Returns the configuration of the generated part alone that search, label and evaluate ask.

    That is the one that `data.question_part` names, or else the first.

    Raises:
        RequestError: `data.question_part` names a stored part.
    """
    mixture, configs = mixture_of(config)
    wanted = config.data.question_part
    generated = [own for entry, own in zip(mixture.entries, configs, strict=True) if entry.is_generated]
    own = next((own for own in generated if not wanted or own.data.path == wanted), None)
    if own is None:
        raise RequestError(
            f"data.question_part={wanted!r}: names a stored part; expected a generated one"
            f" ({', '.join(own.data.path for own in generated)})"
        )
    return own


def _generated_kind(config: Config) -> SourceKind:
    asked = question_config(config)
    kind = named_kind(asked.data.source)

    def for_labels(config: Config) -> Source:
        own = question_config(config)
        return kind.for_labels(own) if kind.for_labels else kind.open(own, "train")

    def for_evaluation(config: Config, split: str) -> Source:
        own = question_config(config)
        return kind.for_evaluation(own, split) if kind.for_evaluation else kind.open(own, split)

    return SourceKind(
        open=open_turns,
        endless=True,
        parts=training_parts,
        held_out=held_out_parts,
        levels=kind.levels,
        controls=kind.controls,
        tasks=None if (tasks := kind.tasks) is None else lambda config: tasks(question_config(config)),
        for_labels=for_labels,
        for_evaluation=for_evaluation,
        check=_check,
        check_splits=_check_stored_parts,
    )


def held_out_parts(config: Config, stage: str) -> list[tuple[str, Source]]:
    """Returns (path, source) of the validation split of every part that the stage trains on.

    Raises:
        RequestError: as `open_entries`.
    """
    opened, curriculum = open_entries(config, "validation"), stage_config(config, stage).curriculum
    used = {path for _, weights in curriculum for path, weight in weights if weight}
    everything = not curriculum or curriculum[0][0] > 0
    return [(entry.path, source) for entry, source in opened if everything or entry.path in used]


def open_turns(config: Config, split: str) -> TurnsOfParts:
    """Opens a split of every part that has records in it; see `TurnsOfParts`.

    Raises:
        RequestError: as `open_entries`.
    """
    return TurnsOfParts(mixture_of(config)[0].name, [source for _, source in open_entries(config, split)])


def _check_stored_parts(config: Config, splits: Collection[str]) -> None:
    """Checks that the stored parts can be trained on: only training reads them.

    Raises:
        RequestError: a source cannot be opened, or has no record to train on.
    """
    if "train" in splits:
        open_entries(config, "train")
