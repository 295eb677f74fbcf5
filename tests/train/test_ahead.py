"""A stage's step is lowered from shapes alone, and they are the shapes that training uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from visor_jax.config import as_config
from visor_jax.scale.mesh import configured_mesh
from visor_jax.testing import tiny_config
from visor_jax.train.ahead import abstract_step
from visor_jax.train.objectives import make_objective
from visor_jax.workdir.folder import Workdir


@pytest.mark.parametrize("stage", ["base", "full"])
def test_batches_have_the_shapes_that_were_compiled(stage: str, tmp_path: Path) -> None:
    config = as_config(tiny_config())
    abstract = abstract_step(config, stage, configured_mesh(config))
    step = next(iter(make_objective(config, stage, Workdir(tmp_path)).steps(0, 1)))
    assert {k: (x.shape, x.dtype) for k, x in step.arrays.items()} == {
        k: (x.shape, x.dtype) for k, x in abstract.batch.items()
    }
    assert (len(step.budget),) == abstract.budget.shape
