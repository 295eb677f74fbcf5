"""Runs analyses of layers on questions, and averages what they measure by task.

In: a model with a dense plan, questions, analyses. Out: `LayerTable`.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from visor_jax.analysis.base import LayerAnalysis, LayerTable, Measures
from visor_jax.analysis.passes import Probe, answers_of
from visor_jax.architecture import Architecture
from visor_jax.config import Config
from visor_jax.data.questions import Place, Questions
from visor_jax.data.tile_pools import without_tower_inputs
from visor_jax.errors import RequestError
from visor_jax.evaluate.scoring import padded
from visor_jax.evaluate.visual_tokens import visual_tokens
from visor_jax.generate.visor import Visor
from visor_jax.model.layers import in_dtype
from visor_jax.scale.mesh import scoring_mesh
from visor_jax.scale.sharding import param_shardings, place_batch
from visor_jax.workdir.supervision import beat

log = logging.getLogger(__name__)

RIGHT = "right"  # what the unchanged model scores, [1, B]
ACCURACIES = "accuracy"  # how the names of columns begin that are scores too


def check_dense(model: Visor) -> None:
    """Raises RequestError unless the model has a dense plan, all of whose layers read all visual tokens."""
    if model.arch.plan != "dense":
        raise RequestError(
            f"{model.source}: stage {model.stage!r} has the plan {model.arch.plan!r}; layers are analyzed in a dense"
            " model: name the checkpoint that it started from with --model"
        )
    if model.arch.dropping.active:
        raise RequestError(
            f"{model.source}: has model.dropping.method={model.arch.dropping.method!r}; the analyses compare layers"
            " that read all visual tokens: name a checkpoint without it"
        )


def check_inputs(config: Config, expected: Architecture, model: Visor) -> None:
    """Checks that questions that are encoded for one architecture fit the model.

    Raises:
      RequestError: tiles, tokens of a picture or the vocabulary differ.
    """

    def inputs(arch: Architecture) -> dict[str, object]:
        sizes = {"tile_size": arch.vision.tile_size, "patch_size": arch.vision.patch_size}
        return {
            "model.text.vocab_size": arch.text.vocab_size,
            "model.text.num_layers": arch.text.num_layers,
            **{f"model.vision.{name}": size for name, size in sizes.items()},
            **{f"model.anyres.{name}": value for name, value in dataclasses.asdict(arch.anyres).items()},
            "model.reduction": arch.reduction,
        }

    of_model = inputs(model.arch)
    for name, value in inputs(expected).items():
        if value != of_model[name]:
            raise RequestError(
                f"--config: {name} of {config.name!r} is {value}, and {model.source} has {of_model[name]}; expected the"
                " configuration of this model"
            )


def analyze_layers(
    config: Config,
    model: Visor,
    questions: Questions,
    levels: Mapping[str, str],
    analyses: Sequence[LayerAnalysis],
    scores: Sequence[float] | None = None,
) -> LayerTable:
    """Measures the layers of a dense model on questions.

    Args:
      levels: task -> "easy", "middle" or "hard"; other tasks have none.
      scores: what the given answer of each sample of the source is worth, in [0, 1]; None: 1, it is the reference.

    Raises:
      RequestError: the plan is not dense, the questions do not fit the model, or none of them has a picture.
    """
    check_dense(model)
    check_inputs(config, questions.arch, model)
    tasks: list[str] = []
    values: dict[str, list[np.ndarray]] = {}
    for of_batch, ids, measures in _batches(config, model, questions, analyses):
        tasks += of_batch
        worth = np.array([1.0 if scores is None else scores[Place.of(id).index] for id in ids])
        for name, of_measure in measures.items():
            is_score = name == RIGHT or name.startswith(ACCURACIES)
            values.setdefault(name, []).append(of_measure * worth if is_score else of_measure)
    if not tasks:
        raise RequestError("data: no question has a picture; expected questions about pictures")
    log.info("%d questions about pictures, %d tasks", len(tasks), len(set(tasks)))
    return layer_table(tasks, {name: np.concatenate(parts, axis=1) for name, parts in values.items()}, levels)


def _batches(
    config: Config, model: Visor, questions: Questions, analyses: Sequence[LayerAnalysis]
) -> Iterator[tuple[list[str], list[str], Measures]]:
    """Yields tasks and ids of a batch's questions with pictures, and the measures of all analyses [L, rows]."""
    mesh = scoring_mesh(config)
    params = in_dtype(jax.device_put(model.params, param_shardings(model.params, mesh)), config.model.dtype)
    observers = {name: observer for analysis in analyses for name, observer in analysis.observers.items()}
    for batch in questions.batches(config.evaluate.batch_size):
        beat()
        rows = np.flatnonzero(batch.arrays["loss_mask"].any(axis=1) & (batch.arrays["visual_segments"] > 0).any(axis=1))
        if not len(rows):
            continue
        arrays = padded(batch.arrays, mesh)
        placed = place_batch(without_tower_inputs(arrays, model.arch), mesh)
        visual = visual_tokens(params, arrays, model.arch, mesh)
        with jax.set_mesh(mesh):  # kernels split their work over it
            probe = Probe(params, visual, placed, answers_of(arrays), model.arch, observers)
            measures: Measures = {RIGHT: np.asarray(probe.effect().right)[None], **probe.observed}
            for analysis in analyses:
                measures |= analysis.measure(probe)
        tasks, ids = [batch.tasks[row][0] for row in rows], [batch.ids[row] for row in rows]
        yield tasks, ids, {name: x[:, rows] for name, x in measures.items()}


def layer_table(tasks: Sequence[str], values: Measures, levels: Mapping[str, str]) -> LayerTable:
    """Averages over the questions of each task.

    Args:
      tasks: of each question.
      values: `RIGHT` [1, N], and column -> [L, N]; NaN, as CKA of a constant, does not count.
      levels: task -> level.
    """
    names, of_task = sorted(set(tasks)), np.asarray(tasks)

    def means(column: str) -> dict[str, np.ndarray]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mean of empty slice")  # NaN, as it should be
            return {task: np.nanmean(values[column][:, of_task == task].astype(np.float64), axis=1) for task in names}

    measures = {column: means(column) for column in values if column != RIGHT}
    return LayerTable(
        num_layers=max((len(of_measure) for of_measure in values.values()), default=0),
        samples={task: int(np.sum(of_task == task)) for task in names},
        levels={task: levels.get(task, "") for task in names},
        accuracy={task: float(mean[0]) for task, mean in means(RIGHT).items()},
        measures=measures,
    )
