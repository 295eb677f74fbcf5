"""Checks records one by one, as training would read them; `visor_jax.data.check` adds up what this finds.

In: a `RecordSource` and a range of its indices. Out: `Findings`, which are sums: findings of neighboring ranges add up
to those of the whole, whoever made them. They are JSON values too, so that they can be kept on disk.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from visor_jax.config import Config, architecture
from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.collate import Example, RowShape, count_text
from visor_jax.data.from_config import make_tokenizer, sample_encoder, training_row_shape
from visor_jax.data.sample import Sample, Sheet, SkipSample, samples_of
from visor_jax.data.sheets import encode_record
from visor_jax.data.source_kind import SPLITS, RecordSource
from visor_jax.data.tiles import layout_of

Entry = dict[str, Any]

FIRST = 5  # ids that are named for each reason
NO_KEY = 0  # of the content of a record that cannot be used
# Limits of a row -> their fields in a configuration.
LIMITS = {"tiles": "data.tiles", "visual": "data.visual_length", "text": "data.text_length"}

# An answer that occurs in its question is reported if it is at least this long; shorter ones occur by chance.
_LEAK_WORDS, _LEAK_CHARACTERS = 3, 12
_OPTION_WORDS = 8  # an offered choice has at most this many words, unless it follows a letter on a line of its own
_OPTION_LETTER = r"^\s*[(\[]?[a-z0-9]{1,2}[.):\]]\s*"


@dataclass
class Named:
    """How many records have something in common, the ids of the first ones, and the first one's detail."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    detail: str = ""

    def add(self, id: str, detail: str = "") -> None:
        """Counts one more record."""
        self.add_all(Named(1, [id], detail))

    def add_all(self, later: Named) -> None:
        """Adds the records of a later range."""
        self.detail = self.detail if self.count else later.detail
        self.count += later.count
        self.first = [*self.first, *later.first][:FIRST]


@dataclass
class OfSource:
    """What was found in the records of one source of a mixture: how many there are, and those that are skipped."""

    samples: int = 0
    skipped: dict[str, Named] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        """Returns how many records can be used."""
        return self.samples - sum(named.count for named in self.skipped.values())

    def add(self, later: OfSource) -> None:
        """Adds what was found in a later range."""
        self.samples += later.samples
        for reason, named in later.skipped.items():
            self.skipped.setdefault(reason, Named()).add_all(named)

    def state(self) -> dict[str, Any]:
        """Returns the counts as JSON values."""
        return {"samples": self.samples, "skipped": {reason: vars(named) for reason, named in self.skipped.items()}}

    @classmethod
    def of(cls, state: Any) -> OfSource:
        """Restores the counts from `state()`."""
        return cls(state["samples"], {reason: Named(**named) for reason, named in state["skipped"].items()})


@runtime_checkable
class Mixed(Protocol):
    """A mixture of sources."""

    def locate(self, index: int) -> tuple[RecordSource, int]:
        """Returns the source of sample `index`, and the sample's index there."""
        ...


@dataclass
class Findings:
    """What was found in a range of records.

    Attributes:
        tried, usable: records by split; a record may belong to several.
        sources: name of a source -> its records, and those that cannot be used. A mixture has several sources.
        without_picture: usable records without a picture.
        too_large: field of a configuration -> [records whose sample exceeds it, the largest of them].
        leaks: usable records with an answer that occurs in its question or in the system text.
        ids, contents: one 64-bit key per record, of its id, and of its pictures, system text and questions.
        entries: the listing's lines, if one is asked for.
    """

    tried: Counter[str] = field(default_factory=Counter)
    usable: Counter[str] = field(default_factory=Counter)
    sources: dict[str, OfSource] = field(default_factory=dict)
    without_picture: int = 0
    too_large: dict[str, list[int]] = field(default_factory=dict)
    leaks: Named = field(default_factory=Named)
    ids: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Returns how many records were tried."""
        return sum(of_source.samples for of_source in self.sources.values())

    @property
    def skipped(self) -> dict[str, Named]:
        """Returns reason -> records that cannot be used, of all sources, most frequent first."""
        total = OfSource()
        for of_source in self.sources.values():
            total.add(of_source)
        return dict(sorted(total.skipped.items(), key=lambda item: -item[1].count))

    def add(self, later: Findings) -> None:
        """Adds the findings of the range after this one, except its entries."""
        self.tried += later.tried
        self.usable += later.usable
        self.without_picture += later.without_picture
        for name, of_source in later.sources.items():
            self.sources.setdefault(name, OfSource()).add(of_source)
        for limit, (count, largest) in later.too_large.items():
            before = self.too_large.get(limit, [0, 0])
            self.too_large[limit] = [before[0] + count, max(before[1], largest)]
        self.leaks.add_all(later.leaks)
        self.ids += later.ids
        self.contents += later.contents

    def state(self) -> dict[str, Any]:
        """Returns the findings as JSON values."""
        sources = {name: of_source.state() for name, of_source in self.sources.items()}
        return {**vars(self), "sources": sources, "leaks": vars(self.leaks)}

    @classmethod
    def of(cls, state: Any) -> Findings:
        """Restores findings from `state()`; raises ValueError, TypeError, KeyError or AttributeError for others."""
        findings = cls(**state)
        findings.tried, findings.usable = Counter(findings.tried), Counter(findings.usable)
        findings.sources = {name: OfSource.of(of_source) for name, of_source in state["sources"].items()}
        findings.leaks = Named(**state["leaks"])
        if not len(findings.ids) == len(findings.contents) == findings.samples:
            raise ValueError("not as many keys as records")
        return findings


class RecordChecker:
    """Checks records of one source; picklable, so that other processes can check too."""

    def __init__(self, config: Config, name: str, source: RecordSource, *, listing: bool) -> None:
        """
        Args:
            config: the configuration of the training.
            name: the split that `source` is, or "all".
            source: the records.
            listing: whether findings have entries.
        """
        self.config, self.name, self.source, self.listing = config, name, source, listing
        self._tokenizer = make_tokenizer(config)
        self._encode = sample_encoder(config, self._tokenizer, training_row_shape(config))

    def check(self, indices: Iterable[int]) -> Findings:
        """Returns what is found in the records of these indices."""
        findings = Findings()
        for index in indices:
            splits = (self.name,) if self.name in SPLITS else self.source.splits_of(index)
            source = (self.source.locate(index)[0] if isinstance(self.source, Mixed) else self.source).name
            findings.sources.setdefault(source, OfSource()).samples += 1
            findings.tried.update(splits)
            outcome = self._try(index, findings, source)
            if not isinstance(outcome, SkipSample):
                findings.usable.update(splits)
            if self.listing:
                findings.entries.append(_entry(self.source, index, outcome))
        return findings

    def _try(self, index: int, findings: Findings, source: str) -> SkipSample | tuple[tuple[Sample, ...], Example]:
        """Encodes one record and adds what is found to `findings`, except what depends on its splits."""
        record = None
        try:
            record = self.source[index]
            example = self._encode(record)
        except SkipSample as why:
            detail = why.detail if record is None else f"{self.source.place(index)}: {why.detail}"
            id = _id(self.source, index)
            findings.sources[source].skipped.setdefault(why.reason, Named()).add(id, detail)
            findings.ids.append(_key(source, id))
            findings.contents.append(NO_KEY)
            if record is not None and why.reason == "too_long":
                self._note_size(record, findings)
            return SkipSample(why.reason, detail)
        samples = samples_of(record)
        findings.without_picture += not any(sample.images for sample in samples)
        findings.ids.append(_key(source, samples[0].id))
        findings.contents.append(_content_key(samples))
        said = ((turn, f"{sample.system}\n{turn.question}") for sample in samples for turn in sample.turns)
        if any(leaks(turn.answer, prompt) for turn, prompt in said):
            findings.leaks.add(samples[0].id)
        return samples, example

    def _size(self, record: Sample | Sheet) -> RowShape:
        """Returns what a sample or sheet would fill; reads no pixel of a sample."""
        arch, system = architecture(self.config), self.config.tokenizer.system or None
        independent = self.config.data.independent_turns
        if isinstance(record, Sheet):
            return encode_record(record, self._tokenizer, arch, system=system, independent_turns=independent).size
        layout = layout_of([image.shape[:-1] for image in record.images], arch, record.origin)
        text = count_text(record, self._tokenizer, system, independent_turns=independent)
        return RowShape(layout.num_tiles, sum(layout.lengths), text)

    def _note_size(self, record: Sample | Sheet, findings: Findings) -> None:
        """Adds the limits that a sample or sheet exceeds."""
        size = self._size(record)
        for limit, most in asdict(training_row_shape(self.config)).items():
            if (amount := getattr(size, limit)) > most:
                count, largest = findings.too_large.get(LIMITS[limit], [0, 0])
                findings.too_large[LIMITS[limit]] = [count + 1, max(largest, amount)]


def _id(source: RecordSource, index: int) -> str:
    """Returns a record's id, or its place where none is known."""
    return source.record_facts(index)[0] or source.place(index)


def _entry(source: RecordSource, index: int, outcome: SkipSample | tuple[tuple[Sample, ...], Example]) -> Entry:
    """Returns the listing's entry of a record; lengths are known only if it can be used."""
    entry: Entry = {"place": source.place(index)}
    if isinstance(outcome, SkipSample):
        id, pictures = source.record_facts(index)
        entry |= {"id": id, "usable": False, "reason": outcome.reason, "detail": outcome.detail, "pictures": pictures}
        return entry | {"visual_tokens": None, "text_tokens": None}
    samples, example = outcome
    pictures = sum(len(sample.images) for sample in samples)
    entry |= {"id": samples[0].id, "usable": True, "reason": "", "detail": "", "pictures": pictures}
    return entry | {"visual_tokens": example.size.visual, "text_tokens": example.size.text}


# --- duplicates -------------------------------------------------------------------------------------------------------


def _content_key(samples: Sequence[Sample]) -> int:
    """Returns the key of a record's pictures (their pixels, so that copies of files are equal) and questions."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        for image in sample.images:
            digest.update(f"{image.shape}".encode())
            digest.update(np.ascontiguousarray(image).data)
        said = "\0".join([sample.system, *(turn.question for turn in sample.turns)])
        digest.update(said.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "big") or 1


def _key(source: str, id: str) -> int:
    text = f"{source}\0{id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") or 1


def repeated(keys: list[int]) -> list[tuple[int, int]]:
    """Returns (position, position of the first one with the same key) of every repetition, ascending."""
    values = np.array(keys, np.uint64)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    again = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != NO_KEY)) + 1
    begins = np.searchsorted(ordered, ordered[again])
    return sorted(zip(order[again].tolist(), order[begins].tolist(), strict=True))


# --- answers in prompts -----------------------------------------------------------------------------------------------


def leaks(answer: str, prompt: str) -> bool:
    """Whether an answer of several words occurs in its prompt, other than as one of the choices that are offered."""
    answer = " ".join(answer.split()).casefold().rstrip(".!")
    words = len(answer.split())
    if words < _LEAK_WORDS or len(answer) < _LEAK_CHARACTERS:
        return False
    prompt = prompt.replace(IMAGE_MARKER, " ").casefold()
    lines = [" ".join(line.split()) for line in prompt.splitlines()]
    text = "\n".join(lines)
    if answer not in text and answer not in text.replace("\n", " "):
        return False
    options = [line for line in lines if re.match(_OPTION_LETTER, line)]
    if len(options) > 1 and any(re.sub(_OPTION_LETTER, "", line).rstrip(".!;,") == answer for line in options):
        return False
    if words > _OPTION_WORDS:
        return True
    between, end = r"(?:[,;/]|\bor\b|\band\b)", r"(?:$|[,;:()/\n\"'?.])"
    choice = re.escape(answer)
    return not re.search(rf"{between}\s*{choice}\s*(?:{between}|{end})|(?:^|{end})\s*{choice}\s*{between}", text)
