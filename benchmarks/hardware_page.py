"""Makes docs/hardware.md from the files that `accelerator.sh` has written.

    python benchmarks/hardware_page.py [--files=benchmarks/results/accelerator] [--out=docs/hardware.md]

The page shows every figure with its device, which parts failed or were skipped and why, and that nothing was run on
hardware where there are no files. Files of `--tiny` runs are refused: they measure nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from accelerator_files import PARTS, read_report

from visor_jax.errors import RequestError
from visor_jax.files.read_write import write_text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "hardware.md"
TITLES = {
    "kernels": "Attention kernels",
    "step": "Training step and MFU",
    "prefill": "Prefill and time to first token",
    "memory": "Peak memory of the training step",
    "specialize": "One program for all budgets against specialized programs",
}
NOTES = {
    "kernels": "Relative errors are those against the float32 reference, at an eighth of the lengths. Speed: times as"
    " fast as the baseline in the same rounds.",
    "step": "Shape of the 0.5B model, stage full, rows of 7,290 visual and 512 text tokens from 16 tiles, bfloat16,"
    " remat. MFU as [metrics.md](metrics.md) defines it.",
    "prefill": "Shape of the 0.5B model, 60 text tokens, cache included. Time to first token adds the vision tower once"
    " per tile. Faster: than transformers in the same rounds, decoder only.",
    "memory": "The peak in use so far, after a step under each budget in this order; program: arguments, outputs and"
    " temporaries as the compiler counts them.",
    "specialize": "Forward pass of the decoder, 2,929 visual and 64 text tokens. Overhead: time of the program that"
    " takes the budget as an input, divided by that of the specialized one.",
}
COLUMNS = {
    "kernels": (
        "case",
        "implementation",
        "relative_error",
        "seconds",
        "tflops_per_second",
        "baseline",
        "speed",
        "absent",
    ),
    "step": ("budget", "rows", "seconds", "teraflops", "mfu"),
    "prefill": ("name", "visual", "seconds", "seconds_to_first_token", "faster"),
    "memory": ("budget", "rows", "peak_bytes", "program_bytes", "temporary_bytes"),
    "specialize": ("budget", "dynamic", "specialized", "overhead", "max_difference"),
}


def page(folder: Path) -> str:
    """Returns the page for the files in a folder.

    Raises:
      RequestError: a file is that of a tiny run.
    """
    reports = {part: read_report(folder / f"{part}.json") for part in PARTS}
    lines = ["# On hardware", "", "Made by `python benchmarks/hardware_page.py` from the files that"]
    lines += ["`benchmarks/accelerator.sh` writes to `benchmarks/results/accelerator`, on one GPU or one TPU host.", ""]
    if not any(reports.values()):
        lines += ["**Not run on hardware yet**: there are no such files. The parts will be:", ""]
        return "\n".join([*lines, *(f"- {TITLES[part]}: not run on hardware yet" for part in PARTS), ""])
    for part, report in reports.items():
        lines += [f"## {TITLES[part]}", "", *section(part, report), ""]
    return "\n".join(lines)


def section(part: str, report: Mapping[str, Any] | None) -> list[str]:
    """Returns the lines of one part."""
    if report is None:
        return ["Not run on hardware yet."]
    if report.get("tiny"):
        raise RequestError(f"{part}.json: is of a run with --tiny, which measures nothing; expected a run without it")
    lines = [NOTES[part], ""]
    if "device" in report:
        lines += [f"{report['devices']} x {report['device']}, jax {report['jax']}."]
    if report["status"] != "done":
        lines += ["", f"**{report['status'].capitalize()}**: {report['reason']}. What follows was measured before."]
    if left_out := report.get("left_out"):
        lines += ["", f"Left out for want of time: {'; '.join(left_out)}.", ""]
    if "transformers" in report:
        lines += [f"transformers: {report['transformers']}."]
    rows, columns = report.get("rows", []), COLUMNS[part]
    used = [name for name in columns if any(name in row for row in rows)]
    if rows:
        lines += ["", f"| {' | '.join(name.replace('_', ' ') for name in used)} |", f"|{' --- |' * len(used)}"]
        lines += [f"| {' | '.join(shown(row.get(name)) for name in used)} |" for row in rows]
    return lines


def shown(value: Any) -> str:
    """Returns a figure with four digits, text as it is, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, default=harness.RESULTS / "accelerator")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    write_text(args.out, page(args.files))


if __name__ == "__main__":
    main()
