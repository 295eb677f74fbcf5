"""What stages minimize: one file per objective, found by the name that `train.objective` gives."""

from __future__ import annotations

from visor_jax.config import ConfigLike, as_config, stage_config
from visor_jax.train.objectives.answers import answer_objective
from visor_jax.train.objectives.base import Objective
from visor_jax.train.objectives.glyphs_base import base_objective
from visor_jax.train.objectives.policy import policy_objective
from visor_jax.workdir.folder import Workdir

OBJECTIVES = {"answer": answer_objective, "base": base_objective, "policy": policy_objective}


def make_objective(config: ConfigLike, stage: str, workdir: Workdir) -> Objective:
    """The objective that `stage` asks for by `train.objective`."""
    config = as_config(config)
    return OBJECTIVES[stage_config(config, stage).objective](config, stage, workdir)
