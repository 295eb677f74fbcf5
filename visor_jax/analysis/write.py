"""Writes the tables and pictures of an analysis to a folder.

In: a dense model with a configuration of data, or an evaluated workdir. Out: CSV, PNG and SVG files (docs/analyze.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from visor_jax.analysis import figures, tables
from visor_jax.analysis.dense import analyze_layers
from visor_jax.config import Config
from visor_jax.errors import RequestError
from visor_jax.generate.visor import Visor
from visor_jax.report.facts import read_evaluation
from visor_jax.workdir.folder import Workdir

TEXT_TOKENS = 80  # of the question whose cost is drawn against visual tokens
LAYER_CURVES = {
    "attention_share": [("attention_share", "Where the answer attends", "share of attention on visual tokens")],
    "cka": [
        ("cka_before", "A layer's change of visual tokens", "CKA with V before the layer"),
        ("cka_first", "Change since the first layer", "CKA with V(0)"),
    ],
    "contribution": [
        ("loss_increase", "The layer's text sees no picture", "rise of the loss per token, nats"),
        ("contribution", "The layer leaves V as it is", "KL divergence per token, nats"),
    ],
}


def analyze_model(config: Config, model: Visor, out: Path, split: str, samples: int) -> list[Path]:
    """Observes a dense model's layers; returns the files written.

    Raises:
      RequestError: the plan is not dense, no question has a picture, or `out` cannot be written.
    """
    table = analyze_layers(config, model, split, samples)
    make_folder(out)
    tables.write_csv(out / "layers.csv", list(tables.layer_rows(table)))
    drawings = {name: figures.layer_curves(table, curves) for name, curves in LAYER_CURVES.items()}
    return [out / "layers.csv", *saved(out, {**drawings, "vision_drop": figures.vision_drop(table)}.items())]


def analyze_run(workdir: Workdir, model: Visor, out: Path) -> list[Path]:
    """Analyzes the evaluation of a run; returns the files written.

    Raises:
      RequestError: the run is not evaluated, or `out` cannot be written.
    """
    evaluation = read_evaluation(workdir)
    lengths = list(tables.length_rows(model.arch, model.viable_budgets, TEXT_TOKENS))
    of_tables = {
        "budgets": list(tables.budget_rows(evaluation)),
        "costs": list(tables.cost_rows(evaluation)),
        "lengths": lengths,
    }
    drawings = {
        "budgets": figures.budget_map(evaluation),
        "costs": figures.accuracy_against_cost(evaluation),
        "lengths": figures.cost_of_length(lengths),
    }
    if evaluation.get("routes"):
        drawings["routes"] = figures.route_shares(evaluation)
    make_folder(out)
    for name, rows in of_tables.items():
        tables.write_csv(out / f"{name}.csv", rows)
    return [*(out / f"{name}.csv" for name in of_tables), *saved(out, drawings.items())]


def make_folder(out: Path) -> None:
    """Creates the folder for the files.

    Raises:
      RequestError: it is a file, or cannot be created.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out={out}: cannot be created ({error.strerror}); expected a folder") from error


def saved(out: Path, drawings: Iterable[tuple[str, Figure]]) -> list[Path]:
    """Writes figures as PNG and SVG; returns their paths."""
    paths = []
    for name, drawing in drawings:
        figures.save(out, name, drawing)
        paths += [out / f"{name}.png", out / f"{name}.svg"]
    return paths
