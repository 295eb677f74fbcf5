"""Objective "policy": cross-entropy of the policy against each question's label (`labels/labels.npz`).

Everything but the routing parameters is frozen. With `evaluate.cache_gigabytes` above 0 the visual tokens of all
labeled questions are therefore stored before the first step, or found there because the label stage stored them, and
no step runs the vision tower. The routing token trains, so its path through the first layers is computed in each step.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from visor_jax.architecture import Architecture
from visor_jax.budget import budget_name
from visor_jax.config import Config, architecture, stage_config
from visor_jax.data import collate
from visor_jax.data.collate import Content, Example, make_batch
from visor_jax.data.draws import generator
from visor_jax.data.from_config import agreed_taps, label_source, training_row_shape
from visor_jax.data.questions import READ_THREADS, Place, Questions
from visor_jax.data.row_shape import RowShape, question_visual_length, text_bucket, visual_bucket
from visor_jax.data.sample import SkipSample
from visor_jax.data.tile_pools import without_tower_inputs
from visor_jax.errors import RequestError
from visor_jax.evaluate.features import VISUAL, FeatureStore, SharedFeatures
from visor_jax.model.decoder import Budget
from visor_jax.model.layers import Params, in_dtype
from visor_jax.model.visor import Batch, abstract_params, encode, route
from visor_jax.scale.mesh import scoring_mesh
from visor_jax.scale.sharding import param_shardings
from visor_jax.train.objectives.base import Loss, Metrics, Objective, abstract_batch
from visor_jax.train.objectives.by_source import ROW_SOURCES, fields_by_source, sources_of_rows, sums_by_source
from visor_jax.train.stage import Step, made_ahead, process_rows, stage_seed
from visor_jax.tree import flatten, unflatten
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import MADE_OF_OTHERS, Labels
from visor_jax.workdir.supervision import beat

log = logging.getLogger(__name__)

T = TypeVar("T")

KEPT_BYTES = 2**26  # size of the cache of labeled prompts, in bytes of tiles
RARE = 0.05  # share of all labels that is added to every budget's count: rare labels are often noise


def policy_objective(config: Config, stage: str, workdir: Workdir) -> Objective:
    """The policy's objective on the labels of `labels/`, whose questions are read again from their source."""
    arch, settings = architecture(config, stage), stage_config(config, stage)
    labels = Labels.read(workdir)
    examples = LabeledExamples(config, labels)
    full = (True,) * arch.num_slots

    def step(number: int) -> Step:
        rows = process_rows(settings.batch_size)
        order = generator("labeled", stage_seed(config.seed, stage), number)
        picked = order.integers(len(labels.label), size=settings.batch_size)[rows.start : rows.stop]
        arrays, batch = examples.batch(picked)
        contents = batch.contents if "tiles" in arrays else without_tiles(batch.contents)
        return Step(number, arrays, full, budget_name(full), batch.ids, [], contents=contents)

    def summarize(step: Step, metrics: Mapping[str, Any]) -> dict[str, Any]:
        by_source = fields_by_source(examples.source_names, metrics)
        return {"accuracy/agreement": float(metrics["agreement"]), **by_source}

    sizes = {"num_viable": len(labels.budgets), "num_sources": len(examples.source_names)}
    loss = partial(policy_loss, arch=arch, **sizes)
    prepare = partial(store_features, examples, config, workdir)
    return Objective(loss, partial(made_ahead, step, threads=READ_THREADS), summarize, prepare=prepare)


def abstract_policy(config: Config, stage: str) -> tuple[Loss, dict[str, Any]]:
    """The loss for as many budgets as the policy has outputs, and the shapes of batches of the longest prompts.

    Each row holds one question about one picture, and its tiles: stored visual tokens would need less.
    """
    arch, num_rows = architecture(config, stage), stage_config(config, stage).batch_size
    longest = training_row_shape(config)
    row_shape = dataclasses.replace(longest, visual=question_visual_length(longest.visual, arch))
    arrays = abstract_batch(num_rows, num_rows, row_shape, arch)
    for name, dtype in (("routing_position", np.int32), ("label", np.int32), ("label_weight", np.float32)):
        arrays[name] = jax.ShapeDtypeStruct((num_rows,), dtype)
    return partial(policy_loss, arch=arch, num_viable=arch.policy.max_budgets), arrays


def without_tiles(contents: list[list[Content]]) -> list[list[Content]]:
    """The contents of a step that reads stored visual tokens and runs no tower."""
    return [[content._replace(tiles=0) for content in row] for row in contents]


def store_features(
    examples: LabeledExamples, config: Config, workdir: Workdir, frozen: Mapping[str, Any], mesh: Mesh
) -> None:
    """Stores the visual tokens of all labeled questions, so that steps read them instead of running the tower.

    Several processes store every P-th batch of questions each, with the parameters on their own devices. Steps run the
    tower after all, with a warning, if not all visual tokens fit in `evaluate.cache_gigabytes`, or if the tower trains.
    """
    if (store := FeatureStore.of(config, workdir)) is None:
        return
    if reason := unfrozen(frozen, examples.questions.arch):
        log.warning("policy: evaluate.cache_gigabytes has no effect, each step runs the vision tower: %s", reason)
        return
    params = in_dtype({name: unflatten(frozen)[name] for name in VISUAL}, config.model.dtype)
    if jax.process_count() > 1:
        mesh = scoring_mesh(config)
        whole = jax.tree.map(partial(multihost_utils.process_allgather, tiled=True), params)
        params = jax.device_put(whole, param_shardings(whole, mesh))
    features = SharedFeatures(store, params, examples.questions.arch, mesh, with_text=False)
    size, count = config.evaluate.batch_size, len(examples.places)
    own = range(jax.process_index(), -(-count // size), jax.process_count())

    def chunk(number: int) -> Step:
        first = own[number - 1] * size
        arrays, batch = examples.batch(np.arange(first, min(first + size, count)))
        return Step(number, arrays, (), "", batch.ids, [])

    for step in made_ahead(chunk, 0, len(own), threads=READ_THREADS):
        beat()
        fault_point("features", step.number)
        features.of(step.arrays)
        if store.full:
            break
    examples.features = features.stored_by_all()
    if examples.features is None:
        log.warning("policy: not all visual tokens fit, each step runs the vision tower")


def unfrozen(frozen: Mapping[str, Any], arch: Architecture) -> str:
    """Describes the first parameter of the visual tokens that trains; "" if all are frozen."""
    trained = (path for path in flatten(abstract_params(arch)) if path not in frozen)
    return next((f"{path} trains" for path in trained if path.split("/")[0] in VISUAL), "")


class LabeledExamples:
    """Labeled prompts, read from their source when they are needed; a cache keeps a few."""

    def __init__(self, config: Config, labels: Labels):
        """
        Raises:
          RequestError: the source does not have the question of a label.
        """
        self.labels = labels
        self.features: SharedFeatures | None = None  # of all labeled questions, once they are stored
        source, settings = label_source(config), stage_config(config, "policy")
        self.source_name = source.name
        self.source_names = [part.name for part in getattr(source, "sources", (source,))]
        self.min_taps = agreed_taps(config, jax.process_count())
        self.places = [Place(*place) for place in zip(labels.picture_index.tolist(), labels.turn.tolist(), strict=True)]
        self.questions = Questions(config, source, len(self.places))
        self.row_shape = self._row_shape(training_row_shape(config))
        self.weights = balance(labels.label, len(labels.budgets), settings.label_balance)
        row_bytes = self.row_shape.tiles * architecture(config).vision.tile_size ** 2 * 3
        self.example = lru_cache(maxsize=max(KEPT_BYTES // row_bytes, 1))(self._read)

    def _row_shape(self, training: RowShape) -> RowShape:
        """The shape of rows of single questions, which are shorter than conversations; opens no picture."""
        longest = max(self._of(place, self.questions.text_length) for place in self.places)
        sizes = self.labels.num_visual
        visual = training.visual if sizes is None else min(training.visual, visual_bucket(max(int(sizes.max()), 1)))
        return dataclasses.replace(training, visual=visual, text=text_bucket(longest))

    def _read(self, row: int) -> Example:
        place, sizes = self.places[row], self.labels.num_visual
        example = self._of(place, self.questions.example)
        if sizes is not None and example.size.visual != sizes[row]:
            raise RequestError(
                f"labels.npz: turn {place.turn} of record {place.index} of {self.source_name} has {example.size.visual}"
                f" visual tokens, expected {sizes[row]}; {MADE_OF_OTHERS}"
            )
        return example._replace(id=self._of(place, self.questions.sample_id))

    def _of(self, place: Place, read: Callable[[Place], T]) -> T:
        beat()
        try:
            return read(place)
        except (SkipSample, IndexError) as why:
            problem = (
                f"labels.npz: turn {place.turn} of record {place.index} of {self.source_name} cannot be used: {why}"
            )
            raise RequestError(f"{problem}; {MADE_OF_OTHERS}") from why

    def batch(self, rows: Int[np.ndarray, " B"]) -> tuple[dict[str, Shaped[np.ndarray, "B ..."]], collate.Batch]:
        """Returns the arrays of the examples in `rows`, with the label and weight of each, and their batch."""
        examples = [[self.example(row)] for row in rows.tolist()]
        batch = make_batch(examples, self.row_shape, self.questions.arch, min_taps=self.min_taps)
        first_target = [int(np.argmax(mask)) for mask in batch.arrays["loss_mask"]]
        positions = batch.arrays["text_positions"][np.arange(len(rows)), first_target]
        arrays = {**batch.arrays, "routing_position": positions}
        arrays["label"] = self.labels.label[rows].astype(np.int32)
        arrays["label_weight"] = self.weights[rows]
        arrays |= sources_of_rows(batch.contents, self.source_names)
        if self.features is not None:
            visual, _ = self.features.of(arrays)
            arrays = without_tower_inputs(arrays, self.questions.arch) | {"visual": visual}
        return arrays, batch


def policy_loss(
    params: Params, batch: Batch, budget: Budget, arch: Architecture, *, num_viable: int, num_sources: int = 1
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the policy's scores against `batch["label"]` [B], weighted by `batch["label_weight"]` [B].

    `batch["visual"]`: the visual tokens, if they were stored.
    """
    visual = jax.lax.stop_gradient(batch["visual"] if "visual" in batch else encode(params, batch, arch))
    scores = route(params, visual, batch, num_viable, arch)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"])
    agree = jnp.mean((jnp.argmax(scores, axis=-1) == batch["label"]).astype(jnp.float32))
    weights = batch["label_weight"]
    total = jnp.sum(weights)
    metrics = {"agreement": agree, "label_weight": total}
    if ROW_SOURCES in batch:
        weighted, of_row = (losses * weights)[:, None], batch[ROW_SOURCES][:, None]
        metrics["source_sums"] = sums_by_source(weighted, weights[:, None], of_row, num_sources)
    return jnp.sum(losses * weights) / total, metrics


def balance(labels: Int[np.ndarray, " N"], num_budgets: int, strength: float) -> Float[np.ndarray, " N"]:
    """Weight float32 [N] of each label. `strength` 0 weighs all labels equally, 1 weighs all budgets equally.

    Counts above an even share of the labels are treated as an even share.
    """
    weights = budget_weights(labels, num_budgets, strength)[labels]
    return (weights / weights.mean()).astype(np.float32)


def budget_weights(labels: Int[np.ndarray, " N"], num_budgets: int, strength: float) -> Float[np.ndarray, " budgets"]:
    """Relative weight of a label of each budget, as `balance` computes it from all `labels`."""
    counts = np.bincount(labels, minlength=num_budgets)
    counts = np.minimum(counts, len(labels) / np.count_nonzero(counts)) + RARE * len(labels)
    return (len(labels) / counts) ** strength
