"""Runs a check over all records of a source: in parallel, and continued where an earlier one was killed.

In: a `RecordChecker`. Out: `Findings` of successive ranges of `RANGE` records, in order. With workers, every range is
checked by another process, each of which has its own copy of the source.

Finished ranges are kept in a file of the user's cache folder, `$XDG_CACHE_HOME/visor_jax/data_check`
(`~/.cache/visor_jax/data_check`), one line of JSON per range, until the check is complete. The file's name is a hash of
the data's fingerprint (the pictures' of `visor_jax.data.fingerprint`, size and time of the files of records) and of
every setting that a finding depends on, so a check of other data never continues it. A source of one range keeps none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from visor_jax.data.check_records import Findings, RecordChecker
from visor_jax.data.fingerprint import picture_fingerprint
from visor_jax.data.source_kind import RecordSource
from visor_jax.errors import RunError
from visor_jax.files.read_write import open_regular, parse_json
from visor_jax.workdir.provenance import plain, tokenizer_checksum, versions

RANGE = 64  # records that are checked as one piece of work
SECONDS = 30.0  # between two lines about the state of a long check
# Fields on which no finding depends.
_FREE = ("workers", "max_skipped_fraction", "batch_size", "pack_window", "pool_rows", "pool_tiles")

_log = logging.getLogger(__name__)


class Progress:
    """The finished ranges of one check, by their first index, in a file."""

    def __init__(self, path: Path | None) -> None:
        """`path`: the file; None keeps nothing."""
        self.path = path
        self.finished = _read(path) if path is not None else {}

    @classmethod
    def of(cls, checker: RecordChecker, limit: int, *, restart: bool = False) -> Progress:
        """Returns the progress of an earlier check of the same records, if it was killed; with `restart`, none."""
        if limit <= RANGE:
            return cls(None)
        path = folder() / f"{identity(checker, limit)}.jsonl"
        if restart:
            path.unlink(missing_ok=True)
        return cls(path)

    def add(self, start: int, findings: Findings) -> None:
        """Keeps the findings of one range; where the file cannot be written, warns and keeps none from then on."""
        if self.path is None:
            return
        line = json.dumps({"start": start, "findings": findings.state()}) + "\n"
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            _log.warning("%s: cannot be written (%s): a check that is killed now starts again", self.path, error)
            self.path = None

    def remove(self) -> None:
        """Deletes the file: the check is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def folder() -> Path:
    """Returns the folder that keeps the progress of checks."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "visor_jax" / "data_check"


def identity(checker: RecordChecker, limit: int) -> str:
    """Returns a hash of everything that decides the findings: data, settings, and versions."""
    config, source = checker.config, checker.source
    settings = {section: plain(config)[section] for section in ("data", "loss", "model", "tokenizer")}
    settings["data"] = {name: value for name, value in settings["data"].items() if name not in _FREE}
    facts = {
        "versions": versions(),
        "settings": settings,
        "tokenizer": tokenizer_checksum(plain(config)),
        "source": [checker.name, source.name, len(source), limit, checker.listing],
        "files": _file_facts(source),
        "pictures": picture_fingerprint(source, with_text=True),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _file_facts(source: RecordSource) -> list[Any]:
    """Returns path, size and time of the files that hold the records."""
    paths = [Path(file.path) for file in getattr(source, "files", ())]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.exists()]


def _read(path: Path) -> dict[int, Findings]:
    """Returns the ranges that a file holds; a line that was cut off by a kill counts as none."""
    finished: dict[int, Findings] = {}
    try:
        with open_regular(path) as file:
            for line in file:
                try:
                    record = parse_json(line)
                    finished[record["start"]] = Findings.of(record["findings"])
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue
    except OSError:
        return {}
    return finished


# --- running ----------------------------------------------------------------------------------------------------------


def check_ranges(checker: RecordChecker, limit: int, workers: int, progress: Progress) -> Generator[Findings]:
    """Yields the findings of every range of `RANGE` records up to `limit`, in order; close it, which stops the workers.

    Args:
        checker: checks the records.
        limit: number of records.
        workers: processes; 0 checks in this one.
        progress: ranges in it are not checked again; new ones are added to it.

    Raises:
        RunError: a worker died; what it has finished is kept.
    """
    starts = range(0, limit, RANGE)
    waiting = {start: progress.finished[start] for start in starts if start in progress.finished}
    if waiting:
        _log.info("%s: continues with %d of %d ranges checked already", progress.path, len(waiting), len(starts))
    missing = [start for start in starts if start not in waiting]
    results = _in_processes(checker, missing, limit, workers) if workers else _here(checker, missing, limit)
    done, begin, said = len(waiting), time.monotonic(), time.monotonic()
    with contextlib.closing(results):
        for start in starts:
            while start not in waiting:
                finished, findings = next(results)
                progress.add(finished, findings)
                waiting[finished], done = findings, done + 1
                if time.monotonic() - said > SECONDS:
                    said = time.monotonic()
                    rate = (done - len(starts) + len(missing)) * RANGE / (said - begin)
                    _log.info("checked %d of %d records, %.0f per second", done * RANGE, limit, rate)
            yield waiting.pop(start)


def _indices(start: int, limit: int) -> range:
    return range(start, min(start + RANGE, limit))


def _here(checker: RecordChecker, starts: list[int], limit: int) -> Generator[tuple[int, Findings]]:
    for start in starts:
        yield start, checker.check(_indices(start, limit))


def _in_processes(
    checker: RecordChecker, starts: list[int], limit: int, workers: int
) -> Generator[tuple[int, Findings]]:
    """Yields (first index, findings) of each range, in the order in which they are finished."""
    # A process is started afresh: a copy of this one would share open files and locks with it.
    context = multiprocessing.get_context("spawn")
    stopped, stop = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(workers, len(starts)) or 1, context, _begin, (checker, stopped))
    futures: dict[Future[Findings], int] = {}
    try:
        futures = {pool.submit(_check, _indices(start, limit)): start for start in starts}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise RunError(
            "data check: a worker process died, perhaps for lack of memory; finished ranges are kept: run it again,"
            " with fewer --workers"
        ) from None
    finally:
        if futures:
            stop.send_bytes(b"stop")  # otherwise they would finish what they have begun, which may take long
        pool.shutdown(cancel_futures=True)
        stop.close()
        stopped.close()


_checker: RecordChecker | None = None  # of a worker process


def _begin(checker: RecordChecker, stopped: Any) -> None:
    """Prepares a worker: it leaves interrupts to its parent, and ends with its parent or when `stopped` is readable."""
    global _checker
    _checker = checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_when, args=(stopped,), daemon=True).start()


def _end_when(stopped: Any) -> None:
    parent = multiprocessing.parent_process()
    wait([stopped, *([parent.sentinel] if parent is not None else [])])
    os._exit(1)


def _check(indices: range) -> Findings:
    assert _checker is not None  # set by _begin
    return _checker.check(indices)
