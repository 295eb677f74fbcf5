"""Weighted cross-entropy over a vocabulary: the contract, its validation, and the plain XLA reference.

In: hidden states, the head's kernel, and per row a label and a weight. Out: each row's weighted loss; callers
sum by sample, by shard or over everything. The reference keeps the logits [N,V].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    labels: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    z_loss: float = 0.0,
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """Loss of `labels` under softmax(hidden @ head), in float32, plus `z_loss` times the squared log of its
    denominator.

    On TPUs and GPUs XLA rounds float32 operands of products as `jax_default_matmul_precision` says.

    A row of weight 0 does not count: it gives exactly zero gradients, its label may be any integer and its hidden
    state may hold anything. In other rows a label outside of [0, V) makes the loss NaN.

    Returns:
      weighted losses, float32 [N]; and per row whether the label has the largest logit, bool [N] (the first of equals
      counts; False where the weight is 0).

    Raises:
      ValueError: an argument of the wrong shape or dtype; the message names it.
    """
    validate(hidden, head, labels, weights)
    counted = weights != 0
    # 0 * NaN is NaN: rows that do not count are replaced before they are multiplied, not after.
    hidden = jnp.where(counted[:, None], hidden, 0)
    labels = jnp.where(counted, labels, 0)
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)  # [N,V]
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    losses = log_sum - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    if z_loss:
        losses = losses + z_loss * log_sum**2
    weights = weights.astype(jnp.float32)
    correct = (jnp.argmax(logits, axis=-1) == labels) & counted
    return jnp.where(counted, in_vocabulary(losses, labels, head) * weights, 0), correct


def in_vocabulary(
    losses: Float[Array, " N"], labels: Int[Array, " N"], head: Float[Array, "D V"]
) -> Float[Array, " N"]:
    """`losses`, NaN where the label is not in [0, V)."""
    return jnp.where((labels >= 0) & (labels < head.shape[1]), losses, jnp.nan)


def validate(
    hidden: Float[Array, "N D"], head: Float[Array, "D V"], labels: Int[Array, " N"], weights: Float[Array, " N"]
) -> None:
    """Checks the arguments of every implementation; raises ValueError."""
    for name, x, axes in (("hidden", hidden, 2), ("head", head, 2), ("labels", labels, 1), ("weights", weights, 1)):
        if not hasattr(x, "shape"):
            raise ValueError(f"{name} must be an array, got {type(x).__name__}")
        if x.ndim != axes:
            raise ValueError(f"{name} must have {axes} axes, got shape {x.shape}")
    if head.shape[0] != hidden.shape[1]:
        raise ValueError(f"head must have {hidden.shape[1]} rows as hidden has columns, got shape {head.shape}")
    if head.shape[1] == 0:
        raise ValueError(f"head must have at least one column, one per token id, got shape {head.shape}")
    for name, x in (("labels", labels), ("weights", weights)):
        if x.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must have shape {hidden.shape[:1]}, one per row of hidden, got {x.shape}")
    for name, x in (("hidden", hidden), ("head", head), ("weights", weights)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
