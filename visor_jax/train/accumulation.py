"""A batch worked on in parts: the loss, metrics and gradients of the whole batch in the memory of one part.

In: a function of one part, a batch. Out: what it would give for the whole batch, to rounding. Parts are weighted by
what their losses are means over (target tokens), not averaged. Every device splits its own rows, so that no row moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from visor_jax.architecture import FSDP, REPLICA
from visor_jax.train.objectives.base import Metrics, Parts

Gradients = dict[str, Shaped[Array, "..."]]
LossAndGradients = tuple[tuple[Float[Array, ""], Metrics], Gradients]
ROWS = (REPLICA, FSDP)  # mesh axes that split the rows of a batch


@dataclass(frozen=True)
class Accumulation:
    """How a batch is split.

    Attributes:
      count: number of parts.
      shards: parts of the mesh that the rows are split into already; each of them is split again.
      parts: how the loss and the metrics of parts are put together.
    """

    count: int
    shards: int
    parts: Parts


def accumulated(
    gradient_of: Callable[[dict[str, Any]], LossAndGradients],
    batch: dict[str, Any],
    trainable: dict[str, Any],
    how: Accumulation,
) -> LossAndGradients:
    """`gradient_of(batch)`, part by part; gradients have the shapes of `trainable`."""

    def add(total: Gradients, part: dict[str, Any]) -> tuple[Gradients, tuple[Array, Metrics]]:
        (loss, metrics), gradients = gradient_of(on_rows(part, how))
        weight = metrics[how.parts.weight].astype(jnp.float32)
        return jax.tree.map(lambda sum_, x: sum_ + weight * x, total, gradients), (loss, metrics)

    parts = {name: split(x, how) for name, x in batch.items()}
    total, (losses, metrics) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable), parts)
    weights = metrics[how.parts.weight].astype(jnp.float32)
    whole = jnp.maximum(jnp.sum(weights), 1e-30)  # a batch without targets has loss 0
    gradients = jax.tree.map(lambda x: x / whole, total)
    return (jnp.sum(losses * weights) / whole, join_metrics(metrics, how)), gradients


def split(x: Shaped[Array, "rows ..."], how: Accumulation) -> Shaped[Array, "parts part_rows ..."]:
    """The rows (or pools) of a batch as [count, rows / count, ...]; every shard gives each part an equal share."""
    rows, *rest = x.shape
    share = rows // (how.count * how.shards)
    parts = x.reshape(how.shards, how.count, share, *rest).swapaxes(0, 1).reshape(how.count, -1, *rest)
    return parts if how.shards == 1 else jax.lax.with_sharding_constraint(parts, PartitionSpec(None, ROWS))


def on_rows(part: dict[str, Any], how: Accumulation) -> dict[str, Any]:
    """Constrains the rows of a part to all shards: inside a loop the compiler may choose another sharding."""
    return part if how.shards == 1 else jax.lax.with_sharding_constraint(part, PartitionSpec(ROWS))


def joined(x: Shaped[Array, "parts part_rows ..."], how: Accumulation) -> Shaped[Array, "rows ..."]:
    """The inverse of `split`."""
    count, part_rows, *rest = x.shape
    by_shard = x.reshape(count, how.shards, part_rows // how.shards, *rest).swapaxes(0, 1)
    return by_shard.reshape(count * part_rows, *rest)


def join_metrics(metrics: Metrics, how: Accumulation) -> Metrics:
    """The metrics of the whole batch: rows in their order, means of means, and sums of all others."""

    def join(name: str, x: Array) -> Array:
        if name in how.parts.rows:
            return joined(x, how)
        return jnp.mean(x, axis=0) if name in how.parts.means else jnp.sum(x, axis=0, dtype=x.dtype)

    return {name: join(name, x) for name, x in metrics.items()}
