"""Analyzes a dense model on questions: what every layer does with the picture, by task.

In: a model with a dense plan and a configuration of data. Out: `LayerTable`, from which `tables.py` writes CSV and
`figures.py` pictures (docs/analyze.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, linkage

from visor_jax.analysis.layers import Effect, answers_of, programs
from visor_jax.config import Config
from visor_jax.data.questions import single_questions
from visor_jax.data.sources import source_kind
from visor_jax.errors import RequestError
from visor_jax.evaluate.scoring import padded
from visor_jax.evaluate.scoring import programs as scoring_programs
from visor_jax.generate.visor import Visor
from visor_jax.model.layers import in_dtype
from visor_jax.scale.mesh import scoring_mesh
from visor_jax.scale.sharding import param_shardings, place_batch
from visor_jax.workdir.supervision import beat

MEASURES = {
    "attention_share": "share of the answer's attention on visual tokens",
    "cka_before": "CKA of V with V before the layer",
    "cka_first": "CKA of V with V(0)",
    "accuracy_without": "accuracy if the layer's text sees no picture",
    "accuracy_without_from": "accuracy if the text of this and all later layers sees no picture",
    "loss_increase": "rise of the answer's loss per token if the layer's text sees no picture, nats",
    "contribution": "KL divergence if the layer leaves V as it is, nats",
}
CLUSTERS = ("robust", "sensitive")  # by the loss of accuracy without vision


@dataclass(frozen=True)
class LayerTable:
    """Means over the questions of each task; questions without a picture are left out.

    Attributes:
      num_layers: of the decoder.
      samples: task -> number of questions.
      levels: task -> "easy", "middle" or "hard", where the source says so.
      accuracy: task -> of the unchanged model.
      measures: name of `MEASURES` -> task -> value per layer.
      clusters: task -> one of `CLUSTERS`; empty if there are fewer than three tasks.
    """

    num_layers: int
    samples: dict[str, int]
    levels: dict[str, str]
    accuracy: dict[str, float]
    measures: dict[str, dict[str, Float[np.ndarray, " L"]]]
    clusters: dict[str, str] = field(default_factory=dict)


def analyze_layers(config: Config, model: Visor, split: str, samples: int) -> LayerTable:
    """Runs `samples` questions of a split through the model, 3 L + 2 passes for L layers.

    Raises:
      RequestError: the model's plan is not dense, or no question has a picture.
    """
    if model.arch.plan != "dense":
        raise RequestError(
            f"{model.source}: stage {model.stage!r} has the plan {model.arch.plan!r}; layers are analyzed in a dense"
            " model: name the checkpoint that it started from with --model"
        )
    questions = single_questions(config, split, samples)
    tasks: list[str] = []
    right: list[np.ndarray] = []
    values: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
    for of_batch, base, measured in _batches(config, model, questions.batches(config.evaluate.batch_size)):
        tasks += of_batch
        right.append(base)
        for name, of_measure in measured.items():
            values[name].append(of_measure)
    if not tasks:
        raise RequestError("data: no question has a picture; expected questions about pictures")
    joined = {name: np.concatenate(of_measure, axis=1) for name, of_measure in values.items()}  # [L, N]
    return layer_table(tasks, np.concatenate(right), joined, dict(source_kind(config).levels))


def _batches(config: Config, model: Visor, batches) -> Iterator[tuple[list[str], np.ndarray, dict[str, np.ndarray]]]:
    """Yields the tasks of a batch's questions with pictures, which are right, and the measures [L, rows]."""
    mesh = scoring_mesh(config)
    params = in_dtype(jax.device_put(model.params, param_shardings(model.params, mesh)), config.model.dtype)
    encode = scoring_programs(model.arch)[0]
    for batch in batches:
        beat()
        rows = np.flatnonzero(batch.arrays["loss_mask"].any(axis=1) & (batch.arrays["visual_segments"] > 0).any(axis=1))
        if not len(rows):
            continue
        arrays = padded(batch.arrays, mesh)
        answers = answers_of(arrays)
        placed = place_batch(arrays, mesh)
        with jax.set_mesh(mesh):
            base, measures = _measure(params, encode(params, placed), placed, answers, model)
        of_rows = {name: x[:, rows] for name, x in measures.items()}
        yield [batch.tasks[row][0] for row in rows], base[rows], of_rows


def _measure(params, visual, placed, answers, model: Visor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns which rows the unchanged model answers [B], and all measures [L, B]."""
    observe, ablate = programs(model.arch)
    observed = observe(params, visual, placed, answers)
    layers = np.arange(len(model.arch.layers))
    none = np.zeros(len(layers), bool)

    def effect(dropped: np.ndarray, frozen: np.ndarray) -> Effect:
        beat()
        masks = jnp.asarray(dropped), jnp.asarray(frozen)
        return jax.tree.map(np.asarray, ablate(params, visual, placed, answers, observed.log_probs, *masks))

    base = effect(none, none)
    without = [effect(layers == layer, none) for layer in layers]
    from_on = [effect(layers >= layer, none) for layer in layers]
    frozen = [effect(none, layers == layer) for layer in layers]
    return np.asarray(base.right), {
        "attention_share": np.asarray(observed.attention_share),
        "cka_before": np.asarray(observed.cka_before),
        "cka_first": np.asarray(observed.cka_first),
        "accuracy_without": np.stack([one.right for one in without]),
        "accuracy_without_from": np.stack([one.right for one in from_on]),
        "loss_increase": np.stack([base.log_likelihood - one.log_likelihood for one in without]),
        "contribution": np.stack([one.divergence for one in frozen]),
    }


def layer_table(
    tasks: list[str], right: np.ndarray, values: dict[str, np.ndarray], levels: dict[str, str]
) -> LayerTable:
    """Averages over the questions of each task.

    Args:
      tasks: of each question.
      right: [N], of the unchanged model.
      values: measure -> [L, N]; NaN, as CKA of a constant, does not count.
      levels: task -> level.
    """
    names, of_task = sorted(set(tasks)), np.asarray(tasks)
    measures = {
        measure: {task: np.nanmean(of_measure[:, of_task == task].astype(np.float64), axis=1) for task in names}
        for measure, of_measure in values.items()
    }
    accuracy = {task: float(np.mean(right[of_task == task])) for task in names}
    return LayerTable(
        num_layers=len(next(iter(values.values()))),
        samples={task: int(np.sum(of_task == task)) for task in names},
        levels={task: levels.get(task, "") for task in names},
        accuracy=accuracy,
        measures=measures,
        clusters=cluster_tasks(accuracy, measures["accuracy_without_from"]),
    )


def cluster_tasks(accuracy: dict[str, float], without: dict[str, np.ndarray]) -> dict[str, str]:
    """Divides tasks in two by how much accuracy they lose when layers lose sight of the picture.

    Ward's clustering of the losses per layer; the cluster that loses more is the sensitive one.
    """
    names = list(accuracy)
    if len(names) < 3:
        return {}
    losses = np.stack([accuracy[name] - without[name] for name in names])
    groups = fcluster(linkage(losses, method="ward"), t=2, criterion="maxclust")
    means = {group: losses[groups == group].mean() for group in set(groups.tolist())}
    most = max(means, key=means.__getitem__)
    return {name: CLUSTERS[int(group == most and len(means) > 1)] for name, group in zip(names, groups, strict=True)}
