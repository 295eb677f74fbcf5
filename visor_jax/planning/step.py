"""The update step of a stage as shapes: state and batch without arrays, in the shardings that training uses.

In: a configuration, a stage and a mesh (of real devices, or of a topology without any). Out: the jitted step and its
abstract arguments, to be lowered and compiled. No data, tokenizer file or checkpoint is read.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from visor_jax.architecture import Architecture
from visor_jax.config import Config, architecture, stage_config
from visor_jax.data import anyres, collate
from visor_jax.errors import RequestError
from visor_jax.model.visor import abstract_params
from visor_jax.scale.mesh import check_rows
from visor_jax.scale.sharding import batch_sharding, param_shardings, replicated
from visor_jax.train.objectives.answers import TURNS_OF_SAMPLES, answer_loss
from visor_jax.train.objectives.base import Loss, computed_in
from visor_jax.train.objectives.policy import policy_loss
from visor_jax.train.optimizer import build_optimizer, split_trainable, state_shardings
from visor_jax.train.update import State, update_step
from visor_jax.tree import flatten


class StageStep(NamedTuple):
    """The jitted update step of a stage, its abstract arguments, and the shardings of its state."""

    update: Any
    arguments: tuple[Any, ...]  # (state, batch, budget, learning rate): jax.ShapeDtypeStruct with shardings
    state: State


def stage_step(config: Config, stage: str, mesh: Mesh) -> StageStep:
    """Builds the step of a stage on `mesh`, as the training loop does.

    Raises:
      RequestError: the rows cannot be split over the mesh, or the stage has no step that can be planned.
    """
    settings, arch = stage_config(config, stage), architecture(config, stage)
    packed = config.data.pack_window > 0 and settings.objective == "answer"
    rows = settings.batch_size
    check_rows(f"batch_size of stage {stage!r}", rows, mesh, config.data.pool_rows if packed else 1)
    tx = build_optimizer(settings)
    state, shardings = abstract_state(settings.trainable, arch, tx, mesh)
    loss = stage_loss(config, stage, arch)
    update = jax.jit(
        partial(update_step, computed_in(config.model.dtype, loss), tx),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh), replicated(mesh)),
        out_shardings=(shardings, None),
    )
    batch = {name: _placed(x, batch_sharding(mesh)) for name, x in abstract_batch(config, stage, arch).items()}
    budget = _placed(jax.ShapeDtypeStruct((arch.num_slots,), jnp.bool_), replicated(mesh))
    rate = _placed(jax.ShapeDtypeStruct((), jnp.float32), replicated(mesh))
    return StageStep(update, (state, batch, budget, rate), state)


def stage_loss(config: Config, stage: str, arch: Architecture) -> Loss:
    """The loss of a stage's objective; the policy's with as many viable budgets as it may have."""
    settings = stage_config(config, stage)
    if settings.objective == "answer":
        turns = config.data.turns_per_picture * (TURNS_OF_SAMPLES if config.data.pack_window else 1)
        return partial(answer_loss, arch=arch, num_turns=turns, remat=settings.remat)
    if settings.objective == "policy":
        return partial(policy_loss, arch=arch, num_viable=arch.policy.max_budgets)
    raise RequestError(
        f"--stage={stage}: objective {settings.objective!r} cannot be planned, its labels come from a tokenizer;"
        " expected a stage with objective answer or policy"
    )


def abstract_state(patterns: Any, arch: Architecture, tx: Any, mesh: Mesh) -> tuple[State, State]:
    """Shapes of a stage's state with its shardings, and the shardings alone."""
    shapes = abstract_params(arch)
    places = flatten(param_shardings(shapes, mesh))
    trainable, frozen = split_trainable(shapes, patterns)
    opt_state = jax.eval_shape(tx.init, trainable)
    opt_places = state_shardings(opt_state, places, replicated(mesh))
    shardings = State({p: places[p] for p in trainable}, {p: places[p] for p in frozen}, opt_places)
    return jax.tree.map(_placed, State(trainable, frozen, opt_state), shardings), shardings


def abstract_batch(config: Config, stage: str, arch: Architecture) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a stage's batch over all devices, as `visor_jax.data.collate` makes it."""
    data, settings = config.data, stage_config(config, stage)
    packed = data.pack_window > 0 and settings.objective == "answer"
    rows = settings.batch_size
    pools, tiles = (rows // data.pool_rows, data.pool_tiles) if packed else (rows, data.tiles)
    shape = collate.RowShape(tiles, data.visual_length, data.text_length)
    arrays = jax.eval_shape(lambda: _zeros(rows, pools, shape, arch))
    if settings.objective == "policy":
        arrays |= {name: jax.ShapeDtypeStruct((rows,), jnp.int32) for name in ("routing_position", "label")}
        arrays["label_weight"] = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return arrays


def _zeros(rows: int, pools: int, shape: collate.RowShape, arch: Architecture) -> dict[str, Any]:
    visual, text, side, taps = (rows, shape.visual), (rows, shape.text), arch.vision.tile_size, anyres.taps(arch)
    arrays = {
        "tiles": jnp.zeros((pools, shape.tiles, side, side, 3), jnp.uint8),
        "visual_gather": jnp.zeros((*visual, taps), jnp.int32),
        "visual_weights": jnp.zeros((*visual, taps), jnp.float32),
        "loss_mask": jnp.zeros(text, bool),
    }
    arrays |= {f"visual_{name}": jnp.zeros(visual, jnp.int32) for name in ("positions", "segments")}
    arrays |= {f"text_{name}": jnp.zeros(text, jnp.int32) for name in ("tokens", "positions", "segments")}
    return {**arrays, "turn_index": jnp.zeros(text, jnp.int32)}


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
