"""The policy: a small MLP reads the routing token's hidden state and scores the viable budgets (method.md section 5.6).

In: a hidden state [B, D] at the entry of the first optional self-attention layer. Out: scores over budgets; those past
the last viable one are minus infinity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from visor_jax.architecture import Architecture
from visor_jax.kernels.precision import widened
from visor_jax.model.layers import Linear, Params, RMSNorm, linear, rms_norm


class Routing(nnx.Module):
    """The routing token and the policy's MLP; it has `max_budgets` outputs, of which the first `viable` count."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        size, hidden = arch.text.hidden_size, arch.policy.hidden_size
        self.token = nnx.Param(jax.random.normal(rngs.params(), (size,), jnp.float32) * arch.text.embedding_init)
        self.norm = RMSNorm(size)
        self.fc1 = Linear(size, hidden, bias=True, rngs=rngs)
        self.fc2 = Linear(hidden, arch.policy.max_budgets, bias=True, gain=0.1, rngs=rngs)


def policy_logits(params: Params, hidden: Float[Array, "B D"], num_viable: int, eps: float) -> Float[Array, "B M"]:
    """Scores of the policy, in float32 or wider."""
    x = rms_norm(params["norm"], widened(hidden), eps)
    scores = linear(params["fc2"], jax.nn.gelu(linear(params["fc1"], x), approximate=True))
    return jnp.where(jnp.arange(scores.shape[-1]) < num_viable, scores, -jnp.inf)


def choose(
    logits: Float[Array, "B M"], costs: Float[Array, "*B viable"], dial: float | Float[Array, ""] = 0.0
) -> Array:
    """Index of each sample's budget.

    `costs` are those of the viable budgets, for all samples alike or for each. `dial` shifts the trade between cost and
    accuracy: each budget's score gains dial * log(cost / cheapest cost), and the best wins, of equals the cheaper.

    For every budget this works out the dial from which it beats all cheaper ones, and takes the dearest that the dial
    has passed. That is the same budget, and since a higher dial passes more of them, it never picks a cheaper budget
    for any sample, rounding or not.
    """
    scores, own, other = logits[..., : costs.shape[-1]], costs[..., :, None], costs[..., None, :]
    steps = jnp.log(costs / jnp.min(costs, axis=-1, keepdims=True))
    behind = scores[..., None, :] - scores[..., :, None]  # [B, i, j]: by how much i's score is below j's
    dearer = jnp.maximum(steps[..., :, None] - steps[..., None, :], jnp.finfo(steps.dtype).tiny)
    index = jnp.arange(costs.shape[-1])
    outdone = (own == other) & ((behind > 0) | ((behind == 0) & (index[None, :] < index[:, None])))
    passed_from = jnp.where(own > other, behind / dearer, jnp.where(outdone, jnp.inf, -jnp.inf))
    passed = jnp.max(passed_from, axis=-1) < dial
    return jnp.argmax(jnp.where(passed, costs, -jnp.inf), axis=-1)
