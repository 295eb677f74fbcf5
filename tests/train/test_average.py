"""The moving average of a stage's parameters: how it moves, that nothing else changes, and who uses it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visor_jax.checkpoint.manager import Checkpoints
from visor_jax.checkpoint.restoring import restore_complete
from visor_jax.config import architecture, as_config, stage_config, validate
from visor_jax.errors import RequestError
from visor_jax.loading import load_stage
from visor_jax.model.visor import abstract_params
from visor_jax.scale.mesh import configured_mesh
from visor_jax.testing import tiny_config
from visor_jax.train.loop import train
from visor_jax.train.optimizer import build_optimizer
from visor_jax.train.state import abstract_state, initial_state, restore, state_places
from visor_jax.train.update import State
from visor_jax.tree import flatten
from visor_jax.workdir.folder import Workdir

pytestmark = pytest.mark.usefixtures("quick")

DECAY, STEPS, STAGE = 0.75, 3, "warmup"
AVERAGE = {"train.ema_decay": DECAY, "train.use_ema": True}


def config_of(**changes: Any) -> Any:
    settings = {"stage_overrides.warmup.init_from": "", "train.checkpoint_every": 1, "train.keep": 9}
    return tiny_config({**settings, **changes}, steps=STEPS)


def trained(path: Path, **changes: Any) -> tuple[Any, Workdir]:
    config, workdir = config_of(**changes), Workdir(path)
    workdir.create()
    workdir.claim(config)
    train(config, STAGE, workdir)
    return as_config(config), workdir


def states(config: Any, workdir: Workdir) -> dict[int, State]:
    """The state saved after each step."""
    settings, arch, mesh = stage_config(config, STAGE), architecture(config, STAGE), configured_mesh(config)
    shapes = abstract_state(arch, settings, build_optimizer(settings))
    folder, identity = workdir.stage(STAGE).path / "checkpoints", workdir.identity(config, STAGE)
    with Checkpoints(folder, identity=identity, keep=9) as checkpoints:
        return {step: restore(checkpoints, step, shapes, state_places(shapes, mesh))[0] for step in range(1, STEPS + 1)}


@pytest.mark.slow
def test_the_average_follows_the_parameters_and_is_what_others_use(tmp_path: Path) -> None:
    config, workdir = trained(tmp_path / "with", **AVERAGE)
    saved = states(config, workdir)
    start = initial_state(config, STAGE, architecture(config, STAGE), build_optimizer(stage_config(config, STAGE)),
                          configured_mesh(config), workdir)[0]  # fmt: skip
    average = {path: np.asarray(x) for path, x in start.trainable.items()}
    for state in saved.values():
        assert state.ema.keys() == state.trainable.keys()
        for path, new in state.trainable.items():
            average[path] = DECAY * average[path] + (1 - DECAY) * np.asarray(new)
            np.testing.assert_allclose(state.ema[path], average[path], rtol=1e-5, atol=1e-6)

    shapes = abstract_params(architecture(config, STAGE))
    used = flatten(restore_complete(workdir, STAGE, shapes))
    last = {**saved[STEPS].trainable, **saved[STEPS].frozen, **saved[STEPS].ema}
    assert used.keys() == last.keys()
    for path, x in used.items():
        np.testing.assert_array_equal(x, last[path], err_msg=path)
    loaded = flatten(load_stage(workdir, STAGE).params)
    np.testing.assert_array_equal(*(params["blocks/cross_attention/o_proj/kernel"] for params in (loaded, used)))
    next_stage = as_config(config_of(**{"stage_overrides.full.init_from": str(workdir.path / STAGE)}))
    settings, arch = stage_config(next_stage, "full"), architecture(next_stage, "full")
    begun, _ = initial_state(
        next_stage, "full", arch, build_optimizer(settings), configured_mesh(next_stage), Workdir(tmp_path / "next")
    )
    for path, x in begun.trainable.items():
        np.testing.assert_array_equal(x, last[path], err_msg=path)

    # An average that nobody uses is kept all the same, and a lost end of the stage is trained again, bit for bit.
    shutil.rmtree(workdir.stage(STAGE).path / "checkpoints" / str(STEPS))
    (workdir.stage(STAGE).path / "complete.json").unlink()
    train(config, STAGE, workdir)
    for path, x in states(config, workdir)[STEPS].ema.items():
        np.testing.assert_array_equal(x, saved[STEPS].ema[path])


def test_an_average_that_is_not_kept_cannot_be_used() -> None:
    with pytest.raises(RequestError, match=r"train.use_ema=True: there is no average while train.ema_decay=0"):
        validate(config_of(**{"train.use_ema": True}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_may_be_narrow(dtype: str) -> None:
    config = as_config(config_of(**{"train.moments_dtype": dtype}))
    settings = stage_config(config, STAGE)
    state = abstract_state(architecture(config, STAGE), settings, build_optimizer(settings))
    dtypes = {kind: {x.dtype.name for x in getattr(state.opt_state[1], kind).values()} for kind in ("mu", "nu")}
    assert dtypes == {"mu": {dtype}, "nu": {"float32"}}
    assert {x.dtype.name for x in state.trainable.values()} == {"float32"}
