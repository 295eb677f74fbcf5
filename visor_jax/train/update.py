"""One optimizer step: the function that `visor_jax.train.loop` compiles, and the state it updates.

In: a loss, an optimizer; then per step the state, a batch, a budget and a learning rate. Out: the new state and the
step's metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Shaped

from visor_jax.config import TrainConfig
from visor_jax.scale.mesh import row_shards
from visor_jax.scale.sharding import batch_sharding, replicated
from visor_jax.train.accumulation import Accumulation, accumulated
from visor_jax.train.faults import keep_if_finite
from visor_jax.train.objectives import PARTS
from visor_jax.train.objectives.base import Loss, Metrics, computed_in
from visor_jax.train.optimizer import FlatParams
from visor_jax.tree import unflatten

# (state, batch, budget, learning rate) -> (state, metrics)
Update = Callable[
    ["State", dict[str, Shaped[Array, "..."]], Bool[Array, " slots"], Float[Array, ""]], tuple["State", Metrics]
]


class State(NamedTuple):
    """The state that a step updates: trainable and frozen parameters by path, and the optimizer state.

    `ema` is the moving average of the trainable parameters, by path; () without `train.ema_decay`.
    """

    trainable: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any
    ema: Any = ()


def jitted_update(
    dtype: str, settings: TrainConfig, loss: Loss, tx: optax.GradientTransformation, shardings: State, mesh: Mesh
) -> Update:
    """`update_step` for a mesh, with activations in `dtype`: compiled once for all budgets; the state is donated."""
    in_parts = settings.accumulate > 1
    accumulation = Accumulation(settings.accumulate, row_shards(mesh), PARTS[settings.objective]) if in_parts else None
    return jax.jit(
        partial(update_step, computed_in(dtype, loss), tx, ema_decay=settings.ema_decay, accumulation=accumulation),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),  # every process reads the metrics
    )


def update_step(
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    state: State,
    batch: dict[str, Shaped[Array, "..."]],
    budget: Bool[Array, " slots"],
    learning_rate: Float[Array, ""],
    *,
    ema_decay: float = 0.0,
    accumulation: Accumulation | None = None,
) -> tuple[State, Metrics]:
    """One optimizer step; where the loss or a gradient is not finite, everything keeps its old value.

    `accumulation` works on the batch in parts, with the result of the whole batch to rounding.
    """

    def gradient_of(batch: dict[str, Any]) -> Any:
        def loss_of(trainable):
            return loss_fn(unflatten({**state.frozen, **trainable}), batch, budget)

        return jax.value_and_grad(loss_of, has_aux=True)(state.trainable)

    if accumulation is None:
        (loss, metrics), gradients = gradient_of(batch)
    else:
        (loss, metrics), gradients = accumulated(gradient_of, batch, state.trainable, accumulation)
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = tx.update(gradients, state.opt_state, state.trainable)
    updates = jax.tree.map(lambda x: -learning_rate * x, updates)
    trainable = cast(FlatParams, optax.apply_updates(state.trainable, updates))
    ema = (
        jax.tree.map(lambda kept, new: kept + (1 - ema_decay) * (new - kept), state.ema, trainable) if state.ema else ()
    )
    new, old = (trainable, opt_state, ema), (state.trainable, state.opt_state, state.ema)
    trainable, opt_state, ema = keep_if_finite(finite, new, old)
    metrics = {**metrics, "loss": loss, "gradient_norm": norm, "learning_rate": learning_rate, "finite": finite}
    return State(trainable, state.frozen, opt_state, ema), metrics
