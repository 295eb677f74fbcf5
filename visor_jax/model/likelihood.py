"""Scores given answers: loss and correctness of every token to predict.

In: parameters, encoded visual tokens, a batch with its answers, a budget. Out: arrays per next-token prediction.
Training minimizes them; search, label and evaluate score with them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture
from visor_jax.kernels.cross_entropy import cross_entropy
from visor_jax.model.decoder import Budget
from visor_jax.model.layers import Params
from visor_jax.model.remat import Remat
from visor_jax.model.visor import Batch, head, hidden_states

_NEVER = jnp.iinfo(jnp.int32).max


def answer_tokens(
    params: Params,
    visual: Float[Array, "B Nv D"],
    batch: Batch,
    budget: Budget,
    arch: Architecture,
    *,
    remat: Remat = "none",
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Float[Array, "B T"]]:
    """Loss, greedy correctness and weight of every next-token prediction [B, Nt - 1]; weight 0 off the targets.

    A target is predicted from the token before it in its row, which belongs to the same segment and turn.
    """
    return scored_tokens(params, hidden_states(params, visual, batch, budget, arch, remat=remat), batch)


def scored_tokens(
    params: Params, hidden: Float[Array, "B Nt D"], batch: Batch
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Float[Array, "B T"]]:
    """`answer_tokens` of the text tokens' final hidden states."""
    hidden = hidden[:, :-1]
    labels, targets = batch["text_tokens"][:, 1:], batch["loss_mask"][:, 1:]
    for ids in (batch["text_segments"], batch.get("text_turns")):
        targets = targets if ids is None else targets & (ids[:, 1:] == ids[:, :-1])
    weights = targets.astype(jnp.float32)
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses, correct = cross_entropy(flat, head(params), labels.reshape(-1), weights.reshape(-1))
    return losses.reshape(labels.shape), correct.reshape(labels.shape), weights


def prompt_end(batch: Batch) -> Int[Array, " B"]:
    """Position id right after each row's prompt: that of the first target of a row with one sample of one turn."""
    return jnp.min(jnp.where(batch["loss_mask"], batch["text_positions"], _NEVER), axis=1)


def prompt_ends(batch: Batch, samples: int) -> Int[Array, "B R"]:
    """`prompt_end` of each of up to R = `samples` samples per row, in the order of their segments."""
    targets = _of_samples(batch["text_segments"], samples) & batch["loss_mask"][..., None]  # [B, Nt, R]
    return jnp.min(jnp.where(targets, batch["text_positions"][..., None], _NEVER), axis=1)


def answers(
    losses: Float[Array, "B T"], correct: Bool[Array, "B T"], weights: Float[Array, "B T"], batch: Batch, samples: int
) -> tuple[Bool[Array, "B R"], Float[Array, "B R"]]:
    """Whether the greedy answer equals the given one, and the given one's log-likelihood, of each sample of each row.

    Args:
      losses, correct, weights: of every next-token prediction, as `answer_tokens` returns them.
      samples: R, at least the number of samples of any row.
    """
    targets = _of_samples(batch["text_segments"][:, 1:], samples) & (weights > 0)[..., None]  # [B, T, R]
    all_correct = jnp.all(correct[..., None] | ~targets, axis=1)
    return all_correct, -jnp.sum(jnp.where(targets, losses[..., None], 0), axis=1)


def _of_samples(segments: Int[Array, "B T"], samples: int) -> Bool[Array, "B T R"]:
    """Which tokens belong to each of the first `samples` segments."""
    return segments[..., None] == jnp.arange(1, samples + 1)[None, None]
