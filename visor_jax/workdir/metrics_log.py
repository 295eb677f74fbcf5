"""Reads `metrics.jsonl` (one JSON object per step) and removes the rows of steps that a kill discarded.

In: the path of a stage's `metrics.jsonl`. Out: its rows, each step once; or the file without the discarded steps.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from visor_jax.errors import RequestError
from visor_jax.files.json_shape import AMOUNT, COUNT, NUMBER, TEXT, check_shape, each, optional
from visor_jax.files.read_write import parse_json, read_regular, write_bytes

log = logging.getLogger(__name__)

MAX_BYTES = 2**31  # of a metrics.jsonl
ROW = {
    "step": COUNT,
    "loss": optional(NUMBER),
    "budget": optional(TEXT),
    "seconds": optional(AMOUNT),
    "gradient_norm": optional(NUMBER),
    "learning_rate": optional(NUMBER),
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`; skips an incomplete last line."""
    return [row for row, _ in _rows(path)]


def drop_rows(path: Path, first_step: int) -> float:
    """Atomically rewrites `metrics.jsonl` without the rows of `first_step` and later.

    Returns:
      The seconds of the dropped steps.
    """
    if not path.exists():
        return 0.0
    kept: list[bytes] = []
    dropped: list[dict[str, Any]] = []
    for row, line in _rows(path):
        if row["step"] < first_step:
            kept.append(line)
        else:
            dropped.append(row)
    text = b"".join(kept)
    if text != _content(path):
        write_bytes(path, text)
    return sum(float(row.get("seconds") or 0.0) for row in dropped)


def _rows(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Returns (row, line) of every complete line; of duplicate steps the later one."""
    rows: dict[int, tuple[dict[str, Any], bytes]] = {}
    for number, line in enumerate(_content(path).splitlines(keepends=True), start=1):
        row = _whole_row(line)
        if row is None:
            log.warning("%s: line %d is damaged and skipped", path, number)
        else:
            rows[row["step"]] = (row, line)
    return [rows[step] for step in sorted(rows)]


def _whole_row(line: bytes) -> dict[str, Any] | None:
    """Parses a line; None if it is incomplete or not a row."""
    try:
        row = parse_json(line)
        check_shape(row, ROW, "a line")
        check_shape(
            {k: v for k, v in row.items() if k.startswith(("accuracy/", "loss/source="))},
            each(optional(NUMBER)),
            "a line",
        )
    except (ValueError, RequestError):
        return None
    return row if line.endswith(b"\n") else None


def _content(path: Path) -> bytes:
    """Reads the file.

    Raises:
      RequestError: it is missing or cannot be read.
    """
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
