"""Runs analyses and writes their tables and pictures to a folder.

In: a dense model with questions, or an evaluated workdir. Out: a CSV, a PNG and an SVG file for each analysis
(docs/analyze.md), and for a dense model `slots.csv`, the order in which a search should try slots.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from visor_jax.analysis import lengths
from visor_jax.analysis.api import LAYER_ANALYSES, RUN_ANALYSES, chosen
from visor_jax.analysis.base import LayerAnalysis, Run, RunAnalysis
from visor_jax.analysis.layers import analyze_layers
from visor_jax.analysis.slots import slot_rows
from visor_jax.architecture import Architecture
from visor_jax.budget import by_count
from visor_jax.config import Config, architecture
from visor_jax.data.questions import Questions
from visor_jax.errors import RequestError
from visor_jax.files.read_write import write_bytes, write_text
from visor_jax.generate.visor import Visor
from visor_jax.report import figures
from visor_jax.report.results import read_evaluation
from visor_jax.workdir.folder import Workdir

DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a dense model is asked.

    Attributes:
      questions: with their answers.
      levels: task -> "easy", "middle" or "hard".
      scores: of the answers, by index of the sample; None: they are the references.
    """

    questions: Questions
    levels: Mapping[str, str]
    scores: Sequence[float] | None = None


def analyze_model(config: Config, model: Visor, out: Path, asked: Asked, only: Sequence[str] = ()) -> dict[str, Any]:
    """Analyzes the layers of a dense model.

    Args:
      only: names of analyses; empty: all.

    Returns:
      {"written": files, "slots": the slots of the adaptive plan, most promising first; [] if they were not ordered}.

    Raises:
      RequestError: a name is unknown, the plan is not dense, no question has a picture, or `out` cannot be written.
    """
    known = (*LAYER_ANALYSES, lengths.ANALYSIS)
    analyses = chosen(only, known)
    make_folder(out)
    adaptive, written, slots = adaptive_plan(config), [], []
    of_layers = [analysis for analysis in analyses if isinstance(analysis, LayerAnalysis)]
    if of_layers:
        table = analyze_layers(config, model, asked.questions, asked.levels, of_layers, asked.scores)
        for analysis in of_layers:
            written += write(out, analysis.name, list(analysis.rows(table)), analysis.draw(table))
        if slots := slot_rows(table, adaptive):
            written.append(write_csv(out / "slots.csv", slots))
    if lengths.ANALYSIS in analyses:
        written += write_run_analysis(out, lengths.ANALYSIS, Run(adaptive, by_count(adaptive.num_slots)))
    return {"written": [str(path) for path in written], "slots": [row["slot"] for row in slots]}


def adaptive_plan(config: Config) -> Architecture:
    """Returns the adaptive model that the configuration would make of its dense one; dense if it is too shallow."""
    arch = architecture(config)
    visor = dataclasses.replace(arch, plan="visor")
    return visor if visor.num_slots else dataclasses.replace(arch, plan="dense")


def analyze_run(workdir: Workdir, model: Visor, out: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Analyzes the evaluation of a run.

    Raises:
      RequestError: a name is unknown, the run is not evaluated, or `out` cannot be written.
    """
    analyses = chosen(only, RUN_ANALYSES)
    run = Run(model.arch, model.viable_budgets, read_evaluation(workdir))
    make_folder(out)
    written = []
    for analysis in analyses:
        assert isinstance(analysis, RunAnalysis)
        written += write_run_analysis(out, analysis, run)
    return {"written": [str(path) for path in written]}


def write_run_analysis(out: Path, analysis: RunAnalysis, run: Run) -> list[Path]:
    """Writes one analysis of a run; nothing if the run does not have what it needs."""
    rows = analysis.rows(run)
    return write(out, analysis.name, rows, analysis.draw(run, rows)) if rows else []


def make_folder(out: Path) -> None:
    """Creates the folder for the files.

    Raises:
      RequestError: it is a file, or cannot be created.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out={out}: cannot be created ({error.strerror}); expected a folder") from error


def write(out: Path, name: str, rows: Sequence[Mapping[str, Any]], drawing: Figure) -> list[Path]:
    """Writes a table and its picture; returns the files."""
    paths = [write_csv(out / f"{name}.csv", rows), out / f"{name}.png", out / f"{name}.svg"]
    for path, content in zip(paths[1:], pictures(drawing), strict=True):
        write_bytes(path, content)
    return paths


def rounded(value: float) -> float:
    """Returns a number with `DIGITS` decimals, never -0."""
    return round(value, DIGITS) + 0.0


@figures.styled  # which also sets how SVG is written
def pictures(drawing: Figure) -> tuple[bytes, bytes]:
    """Returns a figure as PNG and SVG."""
    return figures.png(drawing), figures.svg(drawing)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows with equal fields; returns the file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: rounded(x) if isinstance(x, float) else x for name, x in row.items()})
    write_text(path, text.getvalue())
    return path
