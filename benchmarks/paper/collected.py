"""Our numbers at the paper's scale, kept in `benchmarks/results/paper/ENTRY.json`.

In: an entry, and the folder of the runs that its commands made. Out: the numbers of the file.
"""

from __future__ import annotations

from pathlib import Path

from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_json, write_json

from .base import Cells, Entry


def path_of(entry: Entry, results: Path) -> Path:
    """Returns the file of an entry's numbers."""
    return results / "paper" / f"{entry.name}.json"


def collect(entry: Entry, runs: Path, results: Path, commit: str) -> None:
    """Reads what an entry's commands have measured and keeps it; numbers of other rows and columns stay.

    Raises:
      RequestError: the folder of the runs does not exist.
    """
    if not runs.is_dir():
        raise RequestError(f"--collect={runs}: no such folder; expected the folder of the runs, $RUNS of the commands")
    found = entry.paper.read(runs)
    if not found:
        return
    kept = {row: dict(columns) for row, columns in collected(entry, results).items()}
    for row, columns in found.items():
        kept.setdefault(row, {}).update(columns)
    write_json(path_of(entry, results), {"entry": entry.name, "commit": commit, "cells": kept})


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
