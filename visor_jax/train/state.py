"""The state that a stage starts from, new or from a checkpoint, on the run's mesh.

In: a configuration, a stage, a mesh, a workdir. Out: `State` with its shardings. Arrays are created where they belong:
no device ever holds a whole model that is sharded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PRNGKeyArray

from visor_jax.architecture import Architecture
from visor_jax.checkpoint.manager import Checkpoints
from visor_jax.checkpoint.restoring import EMA, restore_complete, saved_architecture
from visor_jax.config import Config, ConfigLike, TrainConfig, as_config, from_dict, stage_config
from visor_jax.config.shipped import checkpoint_folder
from visor_jax.data.from_config import make_tokenizer
from visor_jax.errors import RequestError
from visor_jax.files.read_write import as_path
from visor_jax.hf.model import fitted
from visor_jax.hf.read import check, check_tokenizer, open_checkpoint, read_params
from visor_jax.model.connector import widened_connector
from visor_jax.model.initializers import start_cross_attention
from visor_jax.model.keys import start_key
from visor_jax.model.layers import Params
from visor_jax.model.visor import abstract_params, init_params
from visor_jax.scale import compiler_options as compiling
from visor_jax.scale.sharding import param_shardings, replicated
from visor_jax.train.optimizer import split_trainable, state_shardings
from visor_jax.train.update import State
from visor_jax.tree import flatten, unflatten
from visor_jax.workdir.folder import StageFolder, Workdir

CONNECTOR = "connector/linear_1/kernel"
RandomStart = Callable[[PRNGKeyArray], Params]  # parameters of a key, in their shardings


def initial_state(
    config: ConfigLike, stage: str, arch: Architecture, tx: optax.GradientTransformation, mesh: Mesh, workdir: Workdir
) -> tuple[State, State]:
    """The state a stage starts from, and its shardings: shapes first, then shardings, then arrays where they belong."""
    config = as_config(config)
    settings = stage_config(config, stage)
    shapes = abstract_params(arch)
    places = param_shardings(shapes, mesh)
    quick = compiling.options(shapes)
    fresh = jax.jit(partial(init_params, arch), out_shardings=places, compiler_options=quick)
    params = start_params(config, stage, arch, mesh, workdir, places, fresh)
    trainable, frozen = split_trainable(params, settings.trainable)
    shardings = state_places(abstract_state(arch, settings, tx), mesh)
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(trainable)
    copy = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=shardings.ema)  # the step may overwrite both
    ema = copy(trainable) if settings.ema_decay else ()
    return State(trainable, frozen, opt_state, ema), shardings


def abstract_state(arch: Architecture, settings: TrainConfig, tx: optax.GradientTransformation) -> State:
    """Shapes of the state that a stage with these settings trains."""
    trainable, frozen = split_trainable(abstract_params(arch), settings.trainable)
    return State(trainable, frozen, jax.eval_shape(tx.init, trainable), trainable if settings.ema_decay else ())


def state_places(state: State, mesh: Mesh | AbstractMesh) -> State:
    """Shardings of a state (arrays or shapes): moments lie where their parameters do."""
    places = flatten(param_shardings(unflatten({**state.trainable, **state.frozen}), mesh))
    opt_places = state_shardings(state.opt_state, places, replicated(mesh))
    trainable, frozen, ema = ({p: places[p] for p in part} for part in (state.trainable, state.frozen, state.ema))
    return State(trainable, frozen, opt_places, ema if state.ema else ())


def start_params(
    config: Config, stage: str, arch: Architecture, mesh: Mesh, workdir: Workdir, places: Params, fresh: RandomStart
) -> Params:
    """Random parameters, or those of the stage to start from; parameters that it does not have are random.

    A connector that reads one patch is widened to one that reads several side by side.

    Raises:
      RequestError: as `saved_params`, or the connector reads otherwise.
    """
    settings, key = stage_config(config, stage), start_key(config.seed, stage)
    if not settings.init_from:
        return fresh(key)
    saved = flatten(saved_params(config, stage, settings.init_from, arch, mesh, workdir))
    wanted = flatten(places)
    if (width := saved[CONNECTOR].shape[0]) != arch.connector_input:
        if width != arch.vision.hidden_size:
            raise RequestError(
                f"stage_overrides.{stage}.init_from={settings.init_from}: its connector reads {width} features, and"
                f" {arch.connector_input} here; expected the same model.anyres.packing and packing_kind there, or a"
                " packing_kind other than 'shuffle' there"
            )
        widen = jax.jit(partial(widened_connector, packing=arch.anyres.packing), out_shardings=wanted[CONNECTOR])
        saved[CONNECTOR] = widen(saved[CONNECTOR])
    if wanted.keys() <= saved.keys():
        return unflatten({path: saved[path] for path in wanted})
    weights = jax.random.split(key)[0]  # the first of two, as in versions that drew from both
    both = {**flatten(fresh(weights)), **{path: x for path, x in saved.items() if path in wanted}}
    return start_cross_attention(unflatten(both), arch)


def saved_params(
    config: Config, stage: str, init_from: str, arch: Architecture, mesh: Mesh, workdir: Workdir
) -> Params:
    """The parameters of a complete stage, or of a checkpoint in Hugging Face's format (`visor_jax.config.shipped`).

    Raises:
      RequestError: the stage is not complete; or the checkpoint is damaged, or has another shape or tokenizer than
        the configuration.
    """
    if checkpoint_place := checkpoint_folder(init_from):
        where = f"stage_overrides.{stage}.init_from={init_from}"
        # Packing changes no parameter: a stage may learn to read packed tokens from a model that has read single ones.
        checkpoint = fitted(open_checkpoint(checkpoint_place), arch, where, may_differ=("packing", "packing_kind"))
        check_tokenizer(checkpoint, make_tokenizer(config))
        check(checkpoint)
        return read_params(checkpoint, mesh)
    folder = start_folder(init_from, workdir)
    shapes = abstract_params(_as_packed_there(saved_architecture(config, StageFolder(folder)), Workdir(folder.parent)))
    return restore_complete(Workdir(folder.parent), folder.name, shapes, param_shardings(shapes, mesh))


def _as_packed_there(arch: Architecture, run: Workdir) -> Architecture:
    """`arch` with the packing of another run, on which the shape of the connector depends."""
    if not (run.path / "config.json").exists():
        return arch
    there = from_dict(run.config()).model.anyres
    packing = {"packing": there.packing, "packing_kind": there.packing_kind}
    return dataclasses.replace(arch, anyres=dataclasses.replace(arch.anyres, **packing))


def start_folder(init_from: str, workdir: Workdir) -> Path:
    """The folder of the stage to start from: one of this workdir, or a path to another run's.

    Raises:
      RequestError: that stage is not complete.
    """
    folder = StageFolder(as_path(init_from)) if "/" in init_from else workdir.stage(init_from)
    if not folder.is_complete():
        imported = ", or write it with `visor import`" if folder.path.name == "base" else ""
        raise RequestError(
            f"init_from={init_from!r}: {folder.path} holds no complete stage; run that stage first{imported}"
        )
    return folder.path


def restore(checkpoints: Checkpoints, step: int, state: State, shardings: State) -> tuple[State, int]:
    """The state after `step`, on this run's mesh."""

    def abstract(tree, places):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)

    like = abstract(state, shardings)
    wanted = {"params": unflatten({**like.trainable, **like.frozen}), "opt_state": like.opt_state}
    if like.ema:
        wanted[EMA] = unflatten(like.ema)
    saved = checkpoints.restore(step, wanted)
    flat = flatten(saved["params"])
    trainable, frozen = ({path: flat[path] for path in part} for part in (state.trainable, state.frozen))
    return State(trainable, frozen, saved["opt_state"], flatten(saved[EMA]) if like.ema else ()), step
