"""The objectives of trained stages, one file each; `train.objective` names a stage's."""

from __future__ import annotations

from visor_jax.config import ConfigLike, as_config, stage_config
from visor_jax.train.objectives.answers import answer_objective
from visor_jax.train.objectives.base import Objective
from visor_jax.train.objectives.glyphs_base import base_objective
from visor_jax.train.objectives.policy import policy_objective
from visor_jax.workdir.folder import Workdir

OBJECTIVES = {"answer": answer_objective, "base": base_objective, "policy": policy_objective}


def make_objective(config: ConfigLike, stage: str, workdir: Workdir) -> Objective:
    """The objective that `train.objective` of `stage` names."""
    config = as_config(config)
    return OBJECTIVES[stage_config(config, stage).objective](config, stage, workdir)
