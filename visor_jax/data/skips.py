"""Counts skipped samples by reason, and stops a run that skips too many.

In: one call per sample tried, one per sample skipped. Out: counts by source and reason for the metrics, one line per
skipped record in `data/skipped.jsonl`, and a `RunError` once more than the allowed fraction was skipped.

Batches are prefetched, perhaps in other processes. So a `Tally` travels with each batch and is counted when a step
takes the batch (`SkipLog.use`). Metrics and checkpoints do not depend on whether the run was interrupted.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from visor_jax.data.sample import SkipSample
from visor_jax.errors import RequestError, RunError, printable
from visor_jax.files.bucket import is_bucket
from visor_jax.files.growing import GrowingFile, open_growing
from visor_jax.files.read_write import parse_json, read_regular

MINIMUM_TRIED = 50  # samples; the fraction of fewer is not significant
MAX_BYTES = 2**30  # limit for reading `data/skipped.jsonl`
_DETAIL_CHARACTERS = 500


class Skip(NamedTuple):
    """A skipped sample: its index in its source, and the reason."""

    source: str
    index: int
    reason: str
    detail: str


@dataclass
class Tally:
    """The number of samples tried, the number skipped by (source, reason), and the skipped samples (`skips`)."""

    tried: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    skips: list[Skip] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Adds the counts of `other`."""
        self.tried += other.tried
        self.counts += other.counts
        self.skips += other.skips

    def skip(self, source: str, index: int, why: SkipSample) -> None:
        """Counts a sample as skipped and records it."""
        self.counts[source, why.reason] += 1
        self.skips.append(Skip(source, index, why.reason, why.detail))

    @property
    def skipped(self) -> int:
        """The number of samples skipped."""
        return self.counts.total()

    def by_reason(self) -> dict[str, int]:
        """Returns {"source/reason": count}, most frequent first."""
        return {f"{source}/{reason}": count for (source, reason), count in self.counts.most_common()}

    def state(self) -> dict[str, Any]:
        """Returns the counts as JSON values."""
        return {"tried": self.tried, "skipped": [[*key, count] for key, count in sorted(self.counts.items())]}

    def report(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {"tried": self.tried, "skips": [list(skip) for skip in self.skips]}

    @classmethod
    def of_report(cls, report: dict[str, Any]) -> Tally:
        """Restores a tally from `report()`."""
        skips = [Skip(*skip) for skip in report["skips"]]
        return cls(report["tried"], Counter((skip.source, skip.reason) for skip in skips), skips)

    @classmethod
    def of(cls, state: Any) -> Tally:
        """Restores a tally from `state()`; returns an empty one for any other value, as in older checkpoints."""
        try:
            counts = {(str(source), str(reason)): _count(n) for source, reason, n in state["skipped"]}
            return cls(_count(state["tried"]), Counter(counts))
        except (TypeError, ValueError, KeyError):
            return cls()


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r}: expected a count")
    return value


class SkipLog:
    """Counts tried and skipped samples; safe to use from several threads.

    Attributes:
        first: reason -> detail of the first sample skipped for it.
    """

    def __init__(self, path: Path | None = None, max_fraction: float = 1.0, minimum: int = MINIMUM_TRIED) -> None:
        """
        Args:
            path: the JSON-lines file to append to; None keeps counts only. A record that is already in it (from an
                earlier epoch, or from before the run was resumed) is counted but not written again.
            max_fraction: raises RunError if more than this fraction of `tried` is skipped.
            minimum: number of samples tried before `max_fraction` applies.
        """
        self._total = Tally()
        self.first: dict[str, str] = {}
        self._path, self._max_fraction, self._minimum = path, max_fraction, minimum
        self._written: set[tuple[str, int, str]] | None = None
        self._file: GrowingFile | None = None
        self._lock = threading.Lock()

    @property
    def tried(self) -> int:
        return self._total.tried

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        return self._total.counts

    @property
    def skipped(self) -> int:
        return self._total.skipped

    def by_reason(self) -> dict[str, int]:
        """Returns {"source/reason": count}, most frequent first."""
        return self._total.by_reason()

    def state(self) -> dict[str, Any]:
        """Returns the counts as JSON values, for a checkpoint."""
        return self._total.state()

    def restore(self, state: Any) -> None:
        """Continues from `state`; call it before any sample is tried. The limit covers all starts of a run."""
        self._total = Tally.of(state)

    def use(self, tally: Tally, where: str = "") -> None:
        """Counts the samples tried and skipped for a batch that a step takes.

        Args:
            where: they were read, for the error.

        Raises:
            RunError: too many samples were skipped, or the log cannot be written.
        """
        with self._lock:
            self._total.tried += tally.tried
            for skip in tally.skips:
                self._count(skip, where)

    def count_tried(self) -> None:
        """Counts a sample as tried."""
        with self._lock:
            self._total.tried += 1

    def count_skipped(self, source: str, index: int, why: SkipSample) -> None:
        """Counts a tried sample as skipped and writes it to the log. Call `count_tried` first.

        Raises:
            RunError: too many samples were skipped, or the log cannot be written.
        """
        with self._lock:
            self._count(Skip(source, index, why.reason, why.detail))

    def _count(self, skip: Skip, where: str = "") -> None:
        self._total.counts[skip.source, skip.reason] += 1
        self.first.setdefault(skip.reason, skip.detail)
        try:
            self._write(skip)
        except OSError as error:
            raise RunError(f"{self._path}: cannot be written: {error.strerror or error}") from error
        skipped = self.skipped
        if self.tried >= self._minimum and skipped > self._max_fraction * self.tried:
            reasons = ", ".join(f"{name} {count}" for name, count in self.by_reason().items())
            why = f"{skip.reason}: {skip.detail}" if skip.detail else skip.reason
            last = f"{skip.source} {skip.index}{where}, {why}"
            raise RunError(
                f"{skipped} of {self.tried} samples could not be used ({reasons}), more than "
                f"data.max_skipped_fraction={self._max_fraction:g} allows; last: {last}"
            )

    def _write(self, skip: Skip) -> None:
        if self._path is None:
            return
        if self._written is None or self._file is None:
            self._written = _already_written(self._path)
            self._file = open_growing(self._path)
        key = (skip.source, skip.index, skip.reason)
        if key in self._written:
            return
        self._written.add(key)
        record = skip._asdict() | {"detail": printable(skip.detail[:_DETAIL_CHARACTERS])}
        self._file.write((json.dumps(record) + "\n").encode())

    def flush(self) -> None:
        """Stores the log, which a bucket receives as a whole; before each checkpoint.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock:
            if self._file is not None:
                self._file.flush()


def _already_written(path: Path) -> set[tuple[str, int, str]]:
    """Returns the records in a log. Ends a last line that was cut off by a kill, so that the next line stays intact."""
    if not path.exists():
        return set()
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
    if text and not text.endswith("\n") and not is_bucket(path):  # an object is written as a whole
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    written = set()
    for line in text.splitlines():
        try:
            record = parse_json(line)
            written.add((record["source"], record["index"], record["reason"]))
        except (ValueError, KeyError, TypeError):
            continue
    return written
