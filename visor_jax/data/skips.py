"""What was skipped, why, and when that is too much.

In: one call per sample tried, one per sample skipped. Out: counts by source and reason for the metrics, one line per
skipped record in `data/skipped.jsonl`, and a `RunError` once more than the allowed fraction was skipped.

Batches are made ahead of the steps that use them, and perhaps in other processes. So a `Tally` travels with each batch
and counts when a step takes the batch (`SkipLog.use`): metrics and checkpoints say the same whether or not a run was
interrupted.
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
from visor_jax.files.read_write import parse_json, read_regular

MINIMUM_TRIED = 50  # below this many samples a fraction says nothing
MAX_BYTES = 2**30  # of a log of what was skipped
_DETAIL_CHARACTERS = 500


class Skip(NamedTuple):
    """A skipped sample: its place in its source, and why."""

    source: str
    index: int
    reason: str
    detail: str


@dataclass
class Tally:
    """How many samples were tried, how many were skipped by (source, reason), and which (`skips`)."""

    tried: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    skips: list[Skip] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.tried += other.tried
        self.counts += other.counts
        self.skips += other.skips

    def skip(self, source: str, index: int, why: SkipSample) -> None:
        self.counts[source, why.reason] += 1
        self.skips.append(Skip(source, index, why.reason, why.detail))

    @property
    def skipped(self) -> int:
        return self.counts.total()

    def by_reason(self) -> dict[str, int]:
        """{"source/reason": count}, most frequent first."""
        return {f"{source}/{reason}": count for (source, reason), count in self.counts.most_common()}

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"tried": self.tried, "skipped": [[*key, count] for key, count in sorted(self.counts.items())]}

    @classmethod
    def of(cls, state: Any) -> Tally:
        """The tally that `state` gave; an empty one where it is none, as in checkpoints of earlier versions."""
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
        first: for each reason what was wrong with the first such sample.
    """

    def __init__(self, path: Path | None = None, max_fraction: float = 1.0, minimum: int = MINIMUM_TRIED) -> None:
        """
        Args:
            path: the JSON-lines file to append to; None keeps counts only. A record that it names already (from the
                same run before it was resumed, or from an earlier epoch) is counted but not written again.
            max_fraction: more than this fraction of `tried` raises.
            minimum: but not before so many were tried.
        """
        self._total = Tally()
        self.first: dict[str, str] = {}
        self._path, self._max_fraction, self._minimum = path, max_fraction, minimum
        self._written: set[tuple[str, int, str]] | None = None
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
        """{"source/reason": count}, most frequent first."""
        return self._total.by_reason()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the counts, as JSON values."""
        return self._total.state()

    def restore(self, state: Any) -> None:
        """Continue from `state`, before anything is tried: the allowed fraction holds over all starts of a run."""
        self._total = Tally.of(state)

    def use(self, tally: Tally) -> None:
        """Count what was tried and skipped for a batch that a step takes.

        Raises:
            RunError: too many samples were skipped, or one cannot be written down.
        """
        with self._lock:
            self._total.tried += tally.tried
            for skip in tally.skips:
                self._count(skip)

    def count_tried(self) -> None:
        with self._lock:
            self._total.tried += 1

    def count_skipped(self, source: str, index: int, why: SkipSample) -> None:
        """Counts a sample that `count_tried` has counted already, and writes it down.

        Raises:
            RunError: too many samples were skipped, or this one cannot be written down.
        """
        with self._lock:
            self._count(Skip(source, index, why.reason, why.detail))

    def _count(self, skip: Skip) -> None:
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
            raise RunError(
                f"{skipped} of {self.tried} samples could not be used ({reasons}), more than "
                f"data.max_skipped_fraction={self._max_fraction:g} allows; last: {skip.source} {skip.index}, {why}"
            )

    def _write(self, skip: Skip) -> None:
        if self._path is None:
            return
        if self._written is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._written = _already_written(self._path)
        key = (skip.source, skip.index, skip.reason)
        if key in self._written:
            return
        self._written.add(key)
        record = skip._asdict() | {"detail": printable(skip.detail[:_DETAIL_CHARACTERS])}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _already_written(path: Path) -> set[tuple[str, int, str]]:
    """The records that a log names. A last line cut short by a kill is ended, so that the next one stays whole."""
    if not path.exists():
        return set()
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
    if text and not text.endswith("\n"):
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
