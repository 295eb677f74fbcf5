"""The interface of an analysis: what it measures, its table, its picture.

`LayerAnalysis` looks at the layers of a dense model while it answers questions, `RunAnalysis` at the budgets of a run.
Each is an object named `ANALYSIS` in a file of its own, which `api.py` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from visor_jax.analysis.passes import Observer, Probe
from visor_jax.architecture import Architecture
from visor_jax.budget import Bits

Row = dict[str, Any]
Measures = dict[str, Float[np.ndarray, "L B"]]  # column -> values by layer and question
Evaluation = Mapping[str, Any]  # `eval/test.json` (docs/metrics.md)


@dataclass(frozen=True)
class LayerTable:
    """Means over the questions of each task; questions without a picture are left out.

    Attributes:
      num_layers: of the decoder.
      samples: task -> number of questions.
      levels: task -> "easy", "middle" or "hard"; "" where the source does not say so.
      accuracy: task -> of the unchanged model.
      measures: column -> task -> value per layer.
    """

    num_layers: int
    samples: dict[str, int]
    levels: dict[str, str]
    accuracy: dict[str, float]
    measures: dict[str, dict[str, Float[np.ndarray, " L"]]]

    def mean(self, column: str) -> Float[np.ndarray, " L"]:
        """Returns the mean of a column over the tasks, each counting equally."""
        return np.nanmean(np.stack(list(self.measures[column].values())), axis=0)


def nothing(probe: Probe) -> Measures:
    """Measures nothing but what observers see."""
    del probe
    return {}


def no_facts(table: LayerTable) -> dict[str, Row]:
    """Adds no columns."""
    return {task: {} for task in table.samples}


@dataclass(frozen=True)
class LayerAnalysis:
    """An analysis of the layers of a dense model.

    Attributes:
      name: of its CSV and its pictures.
      columns: of the CSV, with their meaning and unit.
      draw: the picture.
      observers: column -> what is seen in each layer of the unchanged model.
      measure: one batch -> the other columns, from passes of changed models.
      task_facts: table -> task -> further columns that are the same for all layers.
    """

    name: str
    columns: Mapping[str, str]
    draw: Callable[[LayerTable], Figure]
    observers: Mapping[str, Observer] = field(default_factory=dict)
    measure: Callable[[Probe], Measures] = nothing
    task_facts: Callable[[LayerTable], dict[str, Row]] = no_facts

    def rows(self, table: LayerTable) -> Iterator[Row]:
        """Yields one row per task and layer."""
        facts = self.task_facts(table)
        for task, samples in table.samples.items():
            about = {"task": task, "level": table.levels[task], "samples": samples, "accuracy": table.accuracy[task]}
            for layer in range(table.num_layers):
                values = {column: float(table.measures[column][task][layer]) for column in self.columns}
                yield {**about, **facts[task], "layer": layer, **values}


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
      arch: of its model.
      budgets: the viable ones, cheapest first.
      evaluation: its `eval/test.json`; empty for a checkpoint that is not a run.
    """

    arch: Architecture
    budgets: Sequence[Bits]
    evaluation: Evaluation = field(default_factory=dict)


@dataclass(frozen=True)
class RunAnalysis:
    """An analysis of the budgets of a run.

    Attributes:
      name: of its CSV and its pictures.
      rows: the table; no row if the run does not have what it needs.
      draw: the picture of a table with rows.
    """

    name: str
    rows: Callable[[Run], list[Row]]
    draw: Callable[[Run, Sequence[Row]], Figure]
