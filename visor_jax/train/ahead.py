"""The training step of a stage from shapes alone, for ahead-of-time compilation: no data, no weights, no devices.

In: a configuration, a stage, a mesh (also one of `jax.experimental.topologies`). Out: the jitted step of
`visor_jax.train.update` and the shapes and shardings of its arguments. The training loop runs the same function on
arrays of these shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from visor_jax.config import ConfigLike, architecture, as_config, stage_config
from visor_jax.scale.sharding import batch_sharding, replicated
from visor_jax.train.objectives import abstract_objective
from visor_jax.train.optimizer import build_optimizer
from visor_jax.train.state import abstract_state, state_places
from visor_jax.train.update import State, Update, jitted_update


class AbstractStep(NamedTuple):
    """A step to be compiled: the jitted function, and its arguments as `jax.ShapeDtypeStruct`s with shardings."""

    update: Update
    state: State
    batch: dict[str, Any]
    budget: Any
    learning_rate: Any


def abstract_step(config: ConfigLike, stage: str, mesh: Mesh) -> AbstractStep:
    """The jitted step of a stage and the shapes of its arguments.

    The rows of the batch have the stage's full text length and the taps of pictures (K of `visual_gather`).
    """
    config = as_config(config)
    settings, arch = stage_config(config, stage), architecture(config, stage)
    tx = build_optimizer(settings)
    shapes = abstract_state(arch, settings, tx)
    shardings = state_places(shapes, mesh)
    loss, batch = abstract_objective(config, stage)

    def placed(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    rows, whole = batch_sharding(mesh), replicated(mesh)
    return AbstractStep(
        jitted_update(config.model.dtype, settings, loss, tx, shardings, mesh),
        jax.tree.map(placed, shapes, shardings),
        {name: placed(x, rows) for name, x in batch.items()},
        jax.ShapeDtypeStruct((arch.num_slots,), jnp.bool, sharding=whole),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
    )
