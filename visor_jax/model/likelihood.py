"""What the model makes of a given answer: loss and correctness of every token that it should predict.

In: parameters, encoded visual tokens, a batch with its answers, a budget. Out: arrays per next-token prediction.
Training minimizes them; search, label and evaluate score with them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from visor_jax.architecture import Architecture
from visor_jax.kernels.cross_entropy import cross_entropy
from visor_jax.model.decoder import Budget
from visor_jax.model.layers import Params
from visor_jax.model.visor import Batch, head, hidden_states


def answer_tokens(
    params: Params,
    visual: Float[Array, "B Nv D"],
    batch: Batch,
    budget: Budget,
    arch: Architecture,
    *,
    remat: bool = False,
) -> tuple[Float[Array, "B T"], Array, Array]:
    """Loss, correctness (greedy) and weight of every next-token prediction [B, Nt - 1]; weight 0 off the targets."""
    hidden = hidden_states(params, visual, batch, budget, arch, remat=remat)[:, :-1]
    labels, segments = batch["text_tokens"][:, 1:], batch["text_segments"]
    weights = (batch["loss_mask"][:, 1:] & (segments[:, 1:] == segments[:, :-1])).astype(jnp.float32)
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses, correct = cross_entropy(flat, head(params), labels.reshape(-1), weights.reshape(-1))
    return losses.reshape(labels.shape), correct.reshape(labels.shape), weights


def prompt_end(batch: Batch) -> Array:
    """Position id right after each row's prompt [B]: that of the first target of a single-turn row."""
    never = jnp.iinfo(jnp.int32).max
    return jnp.min(jnp.where(batch["loss_mask"], batch["text_positions"], never), axis=1)
