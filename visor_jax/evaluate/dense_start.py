"""Asks the dense model that a run started from the same questions, so that its accuracy stands beside the budgets'.

In: a run's configuration and workdir. Out: the dense model, and what `evaluate --json` has of it: the accuracies of
"dense", whose costs are counted by formula also without it, and their intervals. `evaluate.dense_start` turns it on.
"""

from __future__ import annotations

import logging
from typing import Any

from visor_jax.config import Config, stage_config
from visor_jax.config.schema import DENSE_STAGES, TRAINED_STAGES
from visor_jax.config.shipped import checkpoint_folder
from visor_jax.evaluate.intervals import budget_intervals
from visor_jax.evaluate.scoring import Scores
from visor_jax.evaluate.summary import level_means, task_accuracies
from visor_jax.loading import Visor, load_checkpoint, load_stage
from visor_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

DENSE_START = "dense start"  # name of the dense model's scored chunks


def dense_start(config: Config, model: Visor, workdir: Workdir) -> Visor | None:
    """Returns the dense model from which the adaptive stages of a run started.

    Returns:
      None, with a warning that says why, if there is none, or if it reads other visual tokens than `model`; without a
      warning if `model` is dense itself.
    """
    if not model.arch.num_slots:
        return None
    start = _start(config, workdir)
    problem = "" if start else "the run did not start from a dense model that is still there"
    if start and start.arch.plan != "dense":
        problem = "the run started from an adaptive model"
    elif (start and start.arch.whole != start.arch) or model.arch.whole != model.arch:
        problem = "packing or a reduction leaves the model fewer visual tokens, for which the questions are encoded"
    if problem:
        log.warning("evaluate.dense_start: the dense model is not asked: %s", problem)
    return None if problem else start


def _start(config: Config, workdir: Workdir) -> Visor | None:
    """Returns the model of the last dense stage, or else that from which the first trained stage starts."""
    trained = [stage for stage in config.stages if stage in TRAINED_STAGES]
    dense = [stage for stage in trained if stage in DENSE_STAGES]
    source = dense[-1] if dense else stage_config(config, trained[0]).init_from if trained else ""
    if (folder := checkpoint_folder(source)) is not None:
        return load_checkpoint(folder)
    return load_stage(workdir, source) if source in DENSE_STAGES and workdir.stage(source).is_complete() else None


def dense_figures(scores: Scores) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the accuracies of the dense model, by level and task, and their intervals, as of one budget."""
    tasks = task_accuracies(scores.correct[0], scores.tasks)
    row = {**level_means(tasks, scores.levels), "tasks": tasks}
    return row, budget_intervals(row, scores.tasks, scores.levels)
