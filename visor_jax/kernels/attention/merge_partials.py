"""Merges attention that was computed separately over chunks of the keys.

In: for each chunk of the keys, the attention output over these keys alone and the log-sum-exp of its logits, plus
infinity for a query that sees none of them (as the kernels here return it). Out: the output over all keys.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_partials(
    outs: Float[Array, "B S K R D"], log_sums: Float[Array, "B S K R"]
) -> tuple[Float[Array, "B K R D"], Float[Array, "B K R"]]:
    """Output and log-sum-exp over S chunks; a query that sees no key gets 0 and plus infinity."""
    no_keys = log_sums == jnp.inf
    logs = jnp.where(no_keys, -jnp.inf, log_sums)
    max_log_sum = jnp.max(logs, axis=1, keepdims=True)
    query_valid = ~jnp.all(no_keys, axis=1)  # [B,K,R]
    weights = jnp.exp(logs - jnp.where(query_valid[:, None], max_log_sum, 0))
    denominator = jnp.where(query_valid, jnp.sum(weights, axis=1), 1)
    # Chunks that a query does not see are replaced, not multiplied by 0: 0 * NaN is NaN.
    out = jnp.sum(jnp.where(no_keys[..., None], 0, outs) * weights[..., None], axis=1) / denominator[..., None]
    return out, jnp.where(query_valid, max_log_sum[:, 0] + jnp.log(denominator), jnp.inf)
