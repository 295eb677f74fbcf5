"""SparseVLM (Zhang et al., ICML 2025): text that is about the picture rates visual tokens; dropped ones are recycled.

As Gumpest/SparseVLMs 26a5f48 in version 1_0. Raters are the prompt's tokens
behind the picture whose embeddings match the picture more than the average. After a drop the best 30 % of the dropped
tokens are clustered by the density of their neighborhoods, and the mean of each cluster follows the kept tokens.

A row holds one sample, as in prompts and in scoring.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import DropCounts, DroppingArchitecture
from visor_jax.kernels.precision import widened
from visor_jax.model.dropping.base import Raters, prompt_tokens
from visor_jax.model.reduction.base import rank_within
from visor_jax.model.stream import TokenStream

AFTER, RENUMBERS = True, True


def raters(
    visual: Float[Array, "B Nv D"], text: Float[Array, "B Nt D"], stream: TokenStream, dropping: DroppingArchitecture
) -> Raters:
    """Text tokens behind the picture to which its tokens' similarities, softmax over text, are above the average."""
    del dropping
    used = stream.visual_segments > 0
    last = jnp.max(jnp.where(used, stream.visual_positions, -1), axis=1, keepdims=True)
    behind = prompt_tokens(stream) & (stream.text_positions > last)  # [B, Nt]
    logits = jnp.einsum("BVD,BTD->BVT", widened(visual), widened(text))
    shares = jax.nn.softmax(logits, axis=2, where=behind[:, None])
    relevance = jnp.sum(jnp.where(used[..., None], shares, 0), axis=1)
    average = jnp.sum(jnp.where(behind, relevance, 0), axis=1) / jnp.maximum(jnp.sum(behind, axis=1), 1)
    return Raters((behind & (relevance > average[:, None])).astype(jnp.float32))


class Recycled(NamedTuple):
    """Means of clusters of dropped tokens, in `C` places, and which places are used."""

    tokens: Float[Array, "B C D"]
    valid: Bool[Array, "B C"]


def recycled(
    visual: Float[Array, "B Nv D"],
    scores: Float[Array, "B Nv"],
    stream: TokenStream,
    drop: int,
    totals: Int[Array, " B"],
    room: DropCounts,
    dropping: DroppingArchitecture,
) -> Recycled:
    """The tokens that are made of those that this drop leaves out.

    Args:
      totals: each row's visual tokens before the first drop.
      room: the most that the drop makes of any row.
    """
    counts = dropping.counts(drop, totals)

    def of_row(tokens: Array, scores: Array, valid: Array, kept: Array, best: Array, clusters: Array) -> Recycled:
        ranks = rank_within(valid.astype(jnp.int32), scores, valid)
        place = jnp.argsort(ranks)[jnp.minimum(kept + jnp.arange(room.best), scores.shape[0] - 1)]
        return cluster(tokens[place], best, clusters, room.clusters)

    return jax.vmap(of_row)(visual, scores, stream.visual_segments > 0, counts.kept, counts.best, counts.clusters)


def cluster(
    tokens: Float[Array, "M D"], count: Int[Array, ""], clusters: Int[Array, ""], num_clusters: int
) -> Recycled:
    """The means of `clusters` groups of the first `count` tokens, best center first (density peaks, k neighbors)."""
    wide, used = widened(tokens), jnp.arange(tokens.shape[0]) < count
    far = jnp.finfo(wide.dtype).max
    squares = jnp.sum(wide**2, axis=1)
    square = jnp.maximum(squares[:, None] + squares[None] - 2 * wide @ wide.T, 0) / tokens.shape[1]
    square = jnp.where(jnp.eye(len(square), dtype=bool), 0, square)
    both = used[:, None] & used[None]
    nearest = jnp.sort(jnp.where(both, square, far), axis=1)
    near = jnp.arange(tokens.shape[0]) < clusters
    density = jnp.exp(-jnp.sum(jnp.where(near, nearest, 0), axis=1) / jnp.maximum(clusters, 1))
    distance = jnp.sqrt(square)
    farthest = jnp.max(jnp.where(both, distance, 0))
    denser = (density[None] > density[:, None]) & both
    to_denser = jnp.min(jnp.where(denser, distance, farthest), axis=1)
    ranks = rank_within(used.astype(jnp.int32), to_denser * density, used)
    centers = jnp.argsort(ranks)[:num_clusters]  # [C]
    valid = jnp.arange(num_clusters) < clusters
    group = jnp.argmin(jnp.where(valid[:, None], distance[centers], far), axis=0)  # [M]
    group = jnp.where(ranks < clusters, ranks, group)
    members = (group[None] == jnp.arange(num_clusters)[:, None]) & used[None] & valid[:, None]  # [C, M]
    means = members.astype(wide.dtype) @ wide / (jnp.sum(members, axis=1, keepdims=True) + 1e-6)
    return Recycled(means.astype(tokens.dtype), valid)
