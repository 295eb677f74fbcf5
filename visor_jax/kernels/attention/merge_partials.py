"""Attention split over keys: parts computed apart, each with the log-sum-exp of its logits, and put together.

In: for each part of the keys the output that a query would have if these were all keys, and its log-sum-exp, plus
infinity where it sees none of them (as the kernels here leave it). Out: the output over all keys.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def put_together(
    outs: Float[Array, "B S K R D"], log_sums: Float[Array, "B S K R"]
) -> tuple[Float[Array, "B K R D"], Float[Array, "B K R"]]:
    """The softmax over S parts: output, 0 where no key is seen, and log-sum-exp, plus infinity there."""
    blind = log_sums == jnp.inf
    logs = jnp.where(blind, -jnp.inf, log_sums)
    peak = jnp.max(logs, axis=1, keepdims=True)
    sees = ~jnp.all(blind, axis=1)  # [B,K,R]
    weights = jnp.exp(logs - jnp.where(sees[:, None], peak, 0))
    total = jnp.where(sees, jnp.sum(weights, axis=1), 1)
    # The parts that a query does not see are dropped, not weighed by 0: 0 * NaN is NaN.
    out = jnp.sum(jnp.where(blind[..., None], 0, outs) * weights[..., None], axis=1) / total[..., None]
    return out, jnp.where(sees, peak[:, 0] + jnp.log(total), jnp.inf)
