"""Numbers of `visor analyze`: a table by layer and task, made into one row per level.

In: the name of an analysis and how its rows become numbers. Out: the commands for a checkpoint at the paper's scale and
for the shipped base, and the numbers of the CSV files that they write.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_json, write_json

from .base import Cells, Settings
from .runs import DOWNLOAD, asked

Line = Mapping[str, str]  # of a CSV file
BASE = "almanac-base"
LEVELS = ("easy", "hard")


@dataclass(frozen=True)
class Analyzed:
    """An analysis of a dense model at the paper's scale.

    Attributes:
      only: its name.
      summary: makes numbers of the lines of its table.
    """

    only: str
    summary: Callable[[Sequence[Line]], Cells]

    def commands(self) -> list[str]:
        """Returns the commands."""
        return [DOWNLOAD, asked(), f"visor analyze --model=$HF_DIR $B --only={self.only} --out=$RUNS/analysis"]

    def files(self) -> list[str]:
        """Returns the table that the numbers are read from."""
        return [f"analysis/{self.only}.csv"]

    def read(self, runs: Path) -> Cells:
        """Returns the numbers of its table, if it was written."""
        path = runs / self.files()[0]
        return self.summary(lines_of(path)) if path.exists() else {}


@dataclass(frozen=True)
class AnalyzedBase:
    """The same of the shipped base, whose numbers are kept in a file of their own."""

    name: str
    only: str
    summary: Callable[[Sequence[Line]], Cells]

    def commands(self, settings: Settings) -> list[str]:
        """Returns the command, if its numbers are not there."""
        if self.path(settings).exists():
            return []
        return [
            f"visor analyze --model={BASE} --samples={settings.samples} --only={self.only} --out={self.out(settings)}"
        ]

    def run(self, settings: Settings) -> None:
        """Analyzes the base and keeps the numbers, unless they are there.

        Raises:
          RequestError: the analysis failed; it has said why.
        """
        from visor_jax.__main__ import main

        if self.path(settings).exists():
            return
        (command,) = self.commands(settings)
        if main(command.split()[1:]) != 0:
            raise RequestError(f"{command}: failed")
        self.keep(settings)

    def keep(self, settings: Settings) -> None:
        """Keeps the numbers of the table that the analysis has written."""
        cells = self.summary(lines_of(self.out(settings) / f"{self.only}.csv"))
        write_json(self.path(settings), {"model": BASE, "samples": settings.samples, "cells": cells})

    def read(self, settings: Settings) -> Cells:
        """Returns the numbers that were kept."""
        path = self.path(settings)
        return read_json(path)["cells"] if path.exists() else {}

    def out(self, settings: Settings) -> Path:
        """Returns the folder that the analysis is written to."""
        return settings.runs / "analysis"

    def path(self, settings: Settings) -> Path:
        """Returns the file of the numbers."""
        return settings.results / "paper" / "small" / f"{self.name}.json"


def lines_of(path: Path) -> list[Line]:
    """Returns the lines of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_layer(lines: Sequence[Line], column: str, level: str) -> list[float]:
    """Returns a number for each layer: the mean over the tasks of a level."""
    layers: dict[int, list[float]] = {}
    for line in lines:
        if line["level"] == level:
            layers.setdefault(int(line["layer"]), []).append(float(line[column]))
    return [float(np.mean(values)) for _, values in sorted(layers.items())]


def over_layers(**columns: tuple[str, Callable[[Sequence[float]], float]]) -> Callable[[Sequence[Line]], Cells]:
    """Returns a summary: column = (column of the table, what is made of its layers), for each level."""

    def summary(lines: Sequence[Line]) -> Cells:
        present = {line["level"] for line in lines}
        return {
            level: {key: float(made_of(by_layer(lines, source, level))) for key, (source, made_of) in columns.items()}
            for level in LEVELS
            if level in present
        }

    return summary


def clusters(lines: Sequence[Line]) -> Cells:
    """Returns the share of each level's tasks, in percent, that are in the cluster "robust"."""
    cells = {}
    for level in LEVELS:
        of_task = {line["task"]: line["cluster"] for line in lines if line["level"] == level}
        if of_task:
            robust = sum(cluster == "robust" for cluster in of_task.values())
            cells[level] = {"tasks": float(len(of_task)), "robust": 100 * robust / len(of_task)}
    return cells
