"""The files of `accelerator.sh`: one JSON object per part, with its status, and a summary of all of them.

    python benchmarks/accelerator_files.py failed FILE PART STATUS LIMIT
    python benchmarks/accelerator_files.py summary FOLDER

`failed` marks a part whose process ended with a status other than 0, and keeps what it had measured. Imports no JAX.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_json, write_json

PARTS = ("kernels", "step", "prefill", "memory", "specialize")
TIMED_OUT = (124, 137)  # statuses of `timeout`


def mark_failed(file: Path, part: str, status: int, limit: str) -> None:
    """Writes that a part failed, and why, into its file."""
    reason = (
        f"took longer than {limit} s" if status in TIMED_OUT else f"ended with status {status}; its output says why"
    )
    report = read_report(file) or {"part": part}
    write_json(file, {**report, "status": "failed", "reason": reason})


def read_report(file: Path) -> dict[str, Any] | None:
    """Reads a part's file; None if there is none, or it is damaged."""
    try:
        report = read_json(file)
    except (OSError, RequestError):
        return None
    return report if isinstance(report, dict) else None


def summary_lines(folder: Path) -> list[str]:
    """Returns one line per part: its status, and its most important figure or the reason why there is none."""
    lines = []
    for part in PARTS:
        report = read_report(folder / f"{part}.json")
        if report is None:
            lines.append(f"{part}: not run")
        elif report["status"] != "done":
            lines.append(f"{part}: {report['status']}: {report.get('reason', '')}")
        else:
            lines.append(f"{part}: {headline(part, report)} ({report['seconds']:.0f} s)")
    return lines


def headline(part: str, report: Mapping[str, Any]) -> str:
    """Returns the figures of a part that was measured, in one line."""
    rows = report["rows"]
    if part == "kernels":
        timed = [row for row in rows if "speed" in row and row["implementation"] != row["baseline"]]
        return (
            ", ".join(f"{x['case']} {x['implementation']} {x['speed']:.2f} x {x['baseline']}" for x in timed) or "ran"
        )
    if part == "step":
        return ", ".join(f"{x['budget']} {x['seconds']:.3f} s" + _percent(x.get("mfu")) for x in rows)
    if part == "prefill":
        return ", ".join(
            f"{x['name']} {x['seconds_to_first_token']:.3f} s" for x in rows if x["visual"] == rows[-1]["visual"]
        )
    if part == "memory":
        return ", ".join(f"{x['budget']} {(x['peak_bytes'] or x['program_bytes']) / 1e9:.2f} GB" for x in rows)
    return ", ".join(f"{x['budget']} {x['overhead']:.3f} x" for x in rows)


def _percent(mfu: float | None) -> str:
    return "" if mfu is None else f" (MFU {100 * mfu:.1f} %)"


def main(argv: list[str]) -> None:
    if argv[0] == "failed":
        mark_failed(Path(argv[1]), argv[2], int(argv[3]), argv[4])
    else:
        print("\n".join(summary_lines(Path(argv[1]))))


if __name__ == "__main__":
    main(sys.argv[1:])
