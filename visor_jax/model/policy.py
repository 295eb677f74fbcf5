"""The policy: a small MLP reads the routing token's hidden state and scores the viable budgets (method.md section 5.6).

In: a hidden state [B, D] at the entry of the first optional self-attention layer. Out: scores over budgets; those past
the last viable one are minus infinity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from visor_jax.architecture import Architecture
from visor_jax.kernels.precision import widened
from visor_jax.model.layers import Linear, Params, RMSNorm, linear, rms_norm


class Routing(nnx.Module):
    """The routing token and the policy's MLP; it has `max_budgets` outputs; the first `num_viable` are used."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        size, hidden = arch.text.hidden_size, arch.policy.hidden_size
        self.token = nnx.Param(jax.random.normal(rngs.params(), (size,), jnp.float32) * arch.text.embedding_init)
        self.norm = RMSNorm(size)
        self.fc1 = Linear(size, hidden, bias=True, rngs=rngs)
        self.fc2 = Linear(hidden, arch.policy.max_budgets, bias=True, gain=0.1, rngs=rngs)


def policy_logits(params: Params, hidden: Float[Array, "*B D"], num_viable: int, eps: float) -> Float[Array, "*B M"]:
    """Scores of the policy, in float32 or wider."""
    x = rms_norm(params["norm"], widened(hidden), eps)
    scores = linear(params["fc2"], jax.nn.gelu(linear(params["fc1"], x), approximate=True))
    viable = jnp.expand_dims(jnp.arange(scores.shape[-1]) < num_viable, tuple(range(scores.ndim - 1)))
    return jnp.where(viable, scores, -jnp.inf)


def choose(
    logits: Float[Array, "B M"], costs: Float[Array, "*B viable"], dial: float | Float[Array, ""] = 0.0
) -> Int[Array, " B"]:
    """Index of each sample's budget.

    `costs` are those of the viable budgets, shared by all samples or per sample. `dial` trades cost against accuracy:
    each budget's score gains dial * log(cost / cheapest cost), and the best score wins; of equal scores, the cheaper
    budget.

    Computes for every budget the dial above which it beats all cheaper ones, and chooses the most expensive budget
    whose threshold lies below `dial`. This is the same budget; and because a higher dial passes more thresholds, it
    never chooses a cheaper budget for any sample, whatever the rounding.
    """
    costs = jnp.expand_dims(costs, tuple(range(logits.ndim - costs.ndim)))
    scores, cost_i, cost_j = logits[..., : costs.shape[-1]], costs[..., :, None], costs[..., None, :]
    log_costs = jnp.log(costs / jnp.min(costs, axis=-1, keepdims=True))
    score_gap = scores[..., None, :] - scores[..., :, None]  # [B, i, j]: by how much i's score is below j's
    log_cost_gap = jnp.maximum(log_costs[..., :, None] - log_costs[..., None, :], jnp.finfo(log_costs.dtype).tiny)
    index = jnp.arange(costs.shape[-1])
    earlier = jnp.expand_dims(index[None, :] < index[:, None], tuple(range(score_gap.ndim - 2)))
    dominated = (cost_i == cost_j) & ((score_gap > 0) | ((score_gap == 0) & earlier))
    threshold = jnp.where(cost_i > cost_j, score_gap / log_cost_gap, jnp.where(dominated, jnp.inf, -jnp.inf))
    passed = jnp.max(threshold, axis=-1) < dial
    return jnp.argmax(jnp.where(passed, costs, -jnp.inf), axis=-1)
