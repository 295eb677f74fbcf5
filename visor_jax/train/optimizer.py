"""The optimizer of a stage, built from Optax: trainable parameters, learning rates and schedule.

Parameters are addressed by path ("blocks/self/mlp/up_proj/kernel"); a pattern is a regular expression that matches from
the start of a path. A stage's frozen parameters get no gradient and no optimizer state at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Shaped

from visor_jax.config import TrainConfig
from visor_jax.errors import RequestError, nearest
from visor_jax.tree import flatten

FlatParams = dict[str, Shaped[Array, "..."]]


def split_trainable(params: Mapping[str, Any], patterns: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trainable and frozen parameters (arrays or shapes) by path.

    Raises:
      RequestError: a pattern matches no parameter.
    """
    flat = flatten(params)
    for pattern in patterns:
        if not any(re.match(pattern, path) for path in flat):
            raise RequestError(f"train.trainable: {pattern!r} matches no parameter; {nearest(pattern, flat)}")
    trainable = {path: x for path, x in flat.items() if any(re.match(pattern, path) for pattern in patterns)}
    return trainable, {path: x for path, x in flat.items() if path not in trainable}


def schedule(stage: TrainConfig) -> optax.Schedule:
    """The learning rate at each step: linear warm-up, then `stage.schedule` down to `end_fraction` of the peak."""
    peak, steps = stage.learning_rate, stage.steps
    warmup = round(stage.warmup_fraction * steps)
    rest = max(steps - warmup, 1)
    shapes = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * stage.end_fraction, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, stage.end_fraction),
    }
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), shapes[stage.schedule]], [warmup])


def group_rate(path: str, rates: Mapping[str, float]) -> float:
    """The multiplier of the first pattern in `rates` that matches `path`, else 1."""
    return next((rate for pattern, rate in rates.items() if re.match(pattern, path)), 1.0)


def scale_by_group(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies each parameter's update by its group's rate."""

    def update(updates: Any, params: Any = None) -> Any:
        return {path: update * group_rate(path, rates) for path, update in updates.items()}

    return optax.stateless(update)


def learning_rates(stage: TrainConfig) -> Float[np.ndarray, " steps"]:
    """The learning rate of every step; index 0 is the first step."""
    return np.asarray(jax.vmap(schedule(stage))(jnp.arange(stage.steps)), np.float32)


def build_optimizer(stage: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm, AdamW, rates per group. A step subtracts the result times its learning rate.

    The learning rate is an input of the step, so that stages that differ only in their schedule share one program.
    """
    mean_dtype = None if stage.moments_dtype == "float32" else jnp.dtype(stage.moments_dtype)  # None: the parameters'
    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm),
        optax.scale_by_adam(stage.b1, stage.b2, mu_dtype=mean_dtype),
        optax.add_decayed_weights(stage.weight_decay),
        scale_by_group(dict(stage.group_rates)),
    )


def state_shardings(opt_state: Any, shardings: Mapping[str, Any], default: Any) -> Any:
    """Shardings of an optimizer state: moments are sharded like their parameter, the rest gets `default`."""

    def place(path, leaf):
        owner = next((str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)), None)
        return shardings.get(owner, default) if owner is not None else default

    return jax.tree_util.tree_map_with_path(place, opt_state)
