"""Our numbers at the paper's scale, kept in `benchmarks/results/paper/ENTRY.json`.

In: entries, and the folder of the runs that their commands made. Out: the numbers of the files.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_json, write_json

from .base import Cells, Entry

SHOWN = 12  # missing files that a message lists


def path_of(entry: Entry, results: Path) -> Path:
    """Returns the file of an entry's numbers."""
    return results / "paper" / f"{entry.name}.json"


def collect(entries: Sequence[Entry], runs: Path, results: Path, commit: str, *, each: bool) -> None:
    """Reads what the commands of entries have measured and keeps it; numbers of other rows and columns stay.

    Args:
      each: every entry must have a number below `runs`; otherwise one of them must.

    Raises:
      RequestError: the folder of the runs does not exist, or has no number. Then nothing is kept.
    """
    if not runs.is_dir():
        raise RequestError(f"--collect={runs}: no such folder; expected the folder of the runs, $RUNS of the commands")
    found = {entry.name: entry.paper.read(runs) for entry in entries}
    without = [entry for entry in entries if not found[entry.name]]
    if each and without:
        raise RequestError(nothing_of(without[0], runs))
    if len(without) == len(entries):
        names = ", ".join(entry.name for entry in entries)
        raise RequestError(
            f"--collect={runs}: has no number of {names}; expected the results of the commands that `python"
            " benchmarks/paper/run.py --entry NAME` prints; with this name, --collect lists the files of an entry"
        )
    for entry in entries:
        if found[entry.name]:
            keep(entry, found[entry.name], results, commit)


def keep(entry: Entry, found: Cells, results: Path, commit: str) -> None:
    """Keeps the numbers of an entry."""
    kept = {row: dict(columns) for row, columns in collected(entry, results).items()}
    for row, columns in found.items():
        kept.setdefault(row, {}).update(columns)
    write_json(path_of(entry, results), {"entry": entry.name, "commit": commit, "cells": kept})


def nothing_of(entry: Entry, runs: Path) -> str:
    """Says why a folder has no number of an entry: the files that it lacks, and the commands that make them."""
    files = entry.paper.files()
    if not files:
        return f"--collect={runs}: {entry.name} has nothing to collect, its numbers follow from formulas"
    missing = [file for file in files if not (runs / file).exists()]
    commands = (f"  {line}" for line in (f"RUNS={shlex.quote(str(runs))}", *entry.paper.commands()))
    if not missing:
        problem = "are there, but lack its budgets or levels. These commands make them:"
        return "\n".join([f"--collect={runs}: has no number of {entry.name}; all files {problem}", *commands])
    shown = missing[:SHOWN] + ([f"and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else [])
    partial = sum((runs / file).parent.joinpath("partial", Path(file).name).exists() for file in missing)
    lines = [
        f"--collect={runs}: has no number of {entry.name}; {len(files) - len(missing)} of {len(files)} files that its"
        f" numbers are read from are there. Expected{' also' if len(missing) < len(files) else ''}",
        *(f"  {line}" for line in shown),
        *([f"{partial} of them are in a folder partial/, which holds no whole results (--limit, --budget, --stage)"]
          if partial else []),
        ("A number that is a mean over benchmarks needs all of them. " if len(files) > 1 else "")
        + "These commands make the files:",
        *commands,
    ]  # fmt: skip
    return "\n".join(lines)


def collected(entry: Entry, results: Path) -> Cells:
    """Returns the numbers that were kept.

    Raises:
      RequestError: the file has a row or column that the entry does not have.
    """
    path = path_of(entry, results)
    if not path.exists():
        return {}
    cells: Cells = read_json(path)["cells"]
    rows, columns = {row.key for row in entry.rows}, {column.key for column in entry.columns}
    for row, numbers in cells.items():
        if row not in rows or not numbers.keys() <= columns:
            raise RequestError(f"{path}: row {row!r}: is not one of {entry.name}; remove it and collect it again")
    return cells
