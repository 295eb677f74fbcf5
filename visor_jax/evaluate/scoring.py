"""Scores a fixed list of questions under many budgets; search, label and evaluate share this pass.

`score` takes parameters, single-turn samples with their answers, and budgets. It returns `Scores`: per budget and
sample, whether the greedy answer is exactly the reference, and the reference's log-likelihood. Visual tokens are
computed once per sample, not per budget, and budgets share the layers before they differ (`prefixes.py`).

Greedy decoding yields exactly the reference if and only if each of its tokens (and its end) is the most likely one
after the reference's own prefix. One teacher-forced pass therefore decides it; `tests/evaluate` compares this with
generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits
from visor_jax.data.collate import Batch
from visor_jax.data.questions import Chunk, Place, QuestionBatches
from visor_jax.data.tile_pools import tiles_of_rows, without_tower_inputs
from visor_jax.errors import RequestError
from visor_jax.evaluate.chunks import ChunkScores, ChunkStore, ProcessShares
from visor_jax.evaluate.features import FeatureStore, SharedFeatures
from visor_jax.evaluate.prefixes import score_hidden, score_tree
from visor_jax.evaluate.visual_tokens import visual_tokens
from visor_jax.model.layers import Params, in_dtype
from visor_jax.model.likelihood import prompt_end
from visor_jax.model.policy import choose
from visor_jax.model.visor import hidden_states, route
from visor_jax.scale.distributed import several
from visor_jax.scale.mesh import row_shards
from visor_jax.scale.sharding import param_shardings, place_batch
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.supervision import beat


@dataclass(frozen=True)
class Scores:
    """The scores of every budget (rows) on every sample (columns).

    Attributes:
      budgets: the budgets, in row order.
      correct: whether the greedy answer equals the reference.
      log_likelihood: of the reference answer, summed over its tokens, natural logarithm.
      routes: the policy's scores over the budgets [N, budgets]; None if the policy did not run.
      tasks, ids: of each sample.
      num_visual, num_prompt: visual positions and prompt tokens of each sample, without padding.
      num_whole: visual positions of each sample without packing and reduction.
      num_tiles: tiles of each sample.
      levels: task -> "easy", "middle" or "hard", for the tasks that have a level.
      bytes_per_value: of the activations, and so of cached keys and values.
    """

    budgets: list[Bits]
    correct: Bool[np.ndarray, "budgets N"]
    log_likelihood: Float[np.ndarray, "budgets N"]
    routes: Float[np.ndarray, "N budgets"] | None
    tasks: list[str]
    ids: list[str]
    num_visual: Int[np.ndarray, " N"]
    num_prompt: Int[np.ndarray, " N"]
    num_tiles: Int[np.ndarray, " N"]
    num_whole: Int[np.ndarray, " N"]
    levels: Mapping[str, str] = field(default_factory=dict)
    bytes_per_value: int = 4


class Stopping(Protocol):
    """Decides under which budgets a pass asks its next chunk."""

    asked: list[Bits]

    def add(self, places: Sequence[Place], scores: ChunkScores) -> None:
        """Takes a chunk's scores under the budgets of `asked`, of which it may remove some."""
        ...


def score(
    params: Params,
    batches: Iterable[Batch],
    budgets: Sequence[Bits],
    arch: Architecture,
    *,
    mesh: Mesh,
    dtype: str = "float32",
    routed: bool = False,
    levels: Mapping[str, str] | None = None,
    chunks: ChunkStore | None = None,
    features: FeatureStore | None = None,
    stopping: Stopping | None = None,
) -> Scores:
    """Scores `budgets` on batches of single-turn samples with one sample per row, and skips rows of padding.

    Parameters and rows are sharded over `mesh` as in training. Processes one batch at a time under every budget and
    keeps only its scores.

    Args:
      batches: of questions (`Questions.batches`), or any others if there is no `chunks`.
      dtype: of activations.
      routed: also run the policy.
      levels: task -> "easy", "middle" or "hard", stored in the scores.
      chunks: where each batch's scores are written; those that are there are read instead of computed. Several
        processes share the chunks.
      features: where visual tokens and the results of budget-independent layers are stored and read.
      stopping: removes budgets before all questions are asked; of those there are no scores in the result.

    Raises:
      RequestError: there is no usable question.
    """
    params = in_dtype(jax.device_put(params, param_shardings(params, mesh)), dtype)
    everyone = [tuple(bool(b) for b in bits) for bits in budgets]
    asked = lambda: everyone if stopping is None else stopping.asked  # noqa: E731
    scorer = Scorer(params, asked, arch, mesh, routed=routed, features=features)
    scored: list[tuple[list[Bits], ChunkScores]] = []

    def take(places: Sequence[Place], scores: ChunkScores) -> None:
        scored.append((list(asked()), scores))
        if stopping is not None:
            stopping.add(places, scores)

    shares = ProcessShares.of_scores() if several() and chunks is not None else None
    for number, chunk in enumerate(as_chunks(batches, asked, routed, chunks, shares)):
        beat()
        if chunk.kept is not None:
            take(chunk.places, chunk.kept)
            continue
        fault_point("score")
        scores = scorer.score(chunk)
        if chunks is not None:
            chunks.save(chunk.places, asked(), routed, scores)
        if shares is None:
            take(chunk.places, scores)
        else:
            shares.add(scores)
        fault_point("chunk", number)
    return scores_of_chunks(
        asked(),
        [
            scores if under == asked() else scores.only([under.index(bits) for bits in asked()])
            for under, scores in scored
        ],
        levels or {},
        jnp.dtype(dtype).itemsize,
    )


def scores_of_chunks(
    budgets: Sequence[Bits], scored: Sequence[ChunkScores], levels: Mapping[str, str], bytes_per_value: int
) -> Scores:
    """Joins the scores of chunks under the same budgets.

    Raises:
      RequestError: they hold no usable question.
    """
    if not any(chunk.ids for chunk in scored):
        raise RequestError("data: no usable question; every question was skipped, see the warnings")
    all_sizes = np.concatenate([chunk.sizes for chunk in scored])
    routes = [chunk.routes for chunk in scored if chunk.routes is not None]
    return Scores(
        budgets=list(budgets),
        correct=np.concatenate([chunk.correct for chunk in scored], axis=1),
        log_likelihood=np.concatenate([chunk.log_likelihood for chunk in scored], axis=1),
        routes=np.concatenate(routes) if routes else None,
        tasks=[task for chunk in scored for task in chunk.tasks],
        ids=[id for chunk in scored for id in chunk.ids],
        num_visual=all_sizes[:, 0],
        num_prompt=all_sizes[:, 1],
        num_tiles=all_sizes[:, 2],
        num_whole=all_sizes[:, 3],
        levels=levels,
        bytes_per_value=bytes_per_value,
    )


def as_chunks(
    batches: Iterable[Batch] | QuestionBatches,
    asked: Callable[[], Sequence[Bits]],
    routed: bool,
    chunks: ChunkStore | None,
    shares: ProcessShares[ChunkScores] | None,
) -> Iterator[Chunk[ChunkScores]]:
    """Yields batches as chunks, with the scores that an earlier run left in `chunks` under the budgets `asked()`."""
    if isinstance(batches, QuestionBatches):
        yield from batches.chunks(lambda places: chunks.load(places, asked(), routed) if chunks else None, shares)
    else:
        assert chunks is None, "only batches of questions have places"
        for batch in batches:
            yield Chunk([], batch, [])


class Scorer:
    """Scores chunk after chunk under the budgets that are asked then."""

    def __init__(
        self,
        params: Params,
        asked: Callable[[], Sequence[Bits]],
        arch: Architecture,
        mesh: Mesh,
        *,
        routed: bool,
        features: FeatureStore | None,
    ) -> None:
        """
        Args:
          params: in their shardings, in the dtype of activations.
          asked: returns the budgets; always the same ones if `routed`.
        """
        self.params, self.asked, self.arch, self.mesh = params, asked, arch, mesh
        self.router = routing(arch, len(asked())) if routed else None
        self.features: SharedFeatures | None = None
        if features is not None:
            self.features = SharedFeatures(features, params, arch, mesh, with_text=arch.num_slots > 0)

    def score(self, chunk: Chunk[ChunkScores]) -> ChunkScores:
        """Returns the scores of a chunk's batch; of no question if it has none."""
        budgets = self.asked()
        if (batch := chunk.batch) is None:
            nothing, num_budgets = np.zeros((0, 4), np.int64), len(budgets)
            routes = np.zeros((0, num_budgets), np.float32) if self.router else None
            correct, log_likelihood = np.zeros((num_budgets, 0), bool), np.zeros((num_budgets, 0), np.float32)
            return ChunkScores(correct, log_likelihood, routes, nothing, [], [], chunk.failures)
        rows = np.flatnonzero(batch.arrays["loss_mask"].any(axis=1))
        arrays, visual, shared = self.place(padded(batch.arrays, self.mesh))
        with jax.set_mesh(self.mesh):  # kernels split their work over it
            if self.arch.num_slots:
                per_budget = score_tree(self.params, visual, arrays, budgets, self.arch, shared=shared)
            else:
                nothing = jnp.zeros((0,), bool)
                per_budget = [one_budget(self.arch)(self.params, visual, arrays, nothing)] * len(budgets)
            routed = {**arrays, "routing_position": prompt_end(arrays)}
            scores = self.router(self.params, visual, routed) if self.router else None
        return ChunkScores(
            correct=np.stack([np.asarray(c)[rows] for c, _ in per_budget]),
            log_likelihood=np.stack([np.asarray(ll)[rows] for _, ll in per_budget]),
            routes=None if scores is None else np.asarray(scores)[rows, : len(budgets)],
            sizes=sample_sizes(batch, self.arch)[rows],
            ids=[batch.ids[row] for row in rows],
            tasks=[batch.tasks[row][0] for row in rows],
            failures=chunk.failures,
        )

    def place(self, arrays: dict[str, np.ndarray]) -> tuple[dict[str, jax.Array], jax.Array, jax.Array | None]:
        """Returns a batch without the tower's inputs on the devices, its V(0), and T at the first optional layer if
        it is stored."""
        rest = without_tower_inputs(arrays, self.arch)
        if self.features is None:
            return place_batch(rest, self.mesh), visual_tokens(self.params, arrays, self.arch, self.mesh), None
        visual, shared = self.features.of(arrays)
        stored = {"visual": visual} if shared is None else {"visual": visual, "shared": shared}
        placed = place_batch({**rest, **stored}, self.mesh)
        return placed, placed.pop("visual"), placed.pop("shared", None)


@lru_cache(maxsize=8)
def one_budget(arch: Architecture) -> Callable:
    """Returns the compiled `score_batch`, cached for later passes."""
    return jax.jit(partial(score_batch, arch=arch))


@lru_cache(maxsize=8)
def routing(arch: Architecture, num_budgets: int) -> Callable:
    """Returns the compiled policy over the first `num_budgets` budgets."""
    return jax.jit(partial(route, num_viable=num_budgets, arch=arch))


def padded(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """Appends rows of padding to a batch, so that the mesh divides its rows."""
    extra = -len(arrays["loss_mask"]) % row_shards(mesh)
    return {name: np.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)) for name, x in arrays.items()}


def score_batch(
    params: Params, visual: jax.Array, batch: dict[str, jax.Array], budget: jax.Array, *, arch: Architecture
):
    """Returns (correct [B], log-likelihood [B]) of each row's answer under one budget."""
    return score_hidden(params, hidden_states(params, visual, batch, budget, arch), batch)


def cheapest_good_enough(log_likelihood: np.ndarray, full: int, tolerance: float) -> np.ndarray:
    """Returns per question [N] the first budget with at least 1 - tolerance of the full budget's likelihood.

    Args:
      log_likelihood: [N, budgets], cheapest budget first.
      full: column of the full budget.
    """
    good_enough = log_likelihood >= log_likelihood[:, full : full + 1] + np.log1p(-tolerance)
    good_enough[:, full] = True
    return good_enough.argmax(axis=1)


def sample_sizes(batch: Batch, arch: Architecture) -> Int[np.ndarray, "B 4"]:
    """Returns each row's visual positions, prompt tokens, tiles, and visual positions without packing and reduction.

    Black tiles count, padding tiles do not.
    """
    arrays = batch.arrays
    visual = (arrays["visual_segments"] > 0).sum(axis=1)
    prompt = ((arrays["text_segments"] > 0) & (arrays["text_positions"] < prompt_end(arrays)[:, None])).sum(axis=1)
    whole = np.zeros(len(visual))
    whole[: len(batch.contents)] = [sum(content.whole for content in row) for row in batch.contents]
    return np.stack([visual, np.asarray(prompt), tiles_of_rows(arrays, arch), whole], axis=1).astype(np.int64)


def choices(scores: Scores, costs: np.ndarray, dial: float = 0.0) -> Int[np.ndarray, " N"]:
    """Returns the budget (row index of `scores`) the policy picks per sample; costs [N, budgets] or [budgets]."""
    assert scores.routes is not None
    return np.asarray(choose(jnp.asarray(scores.routes), jnp.asarray(costs), dial))
