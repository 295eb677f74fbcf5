"""The objectives of trained stages, one file each; `train.objective` names a stage's."""

from __future__ import annotations

from typing import Any

from visor_jax.config import ConfigLike, as_config, stage_config
from visor_jax.train.objectives.answers import abstract_answers, answer_objective
from visor_jax.train.objectives.base import Loss, Objective, Parts
from visor_jax.train.objectives.policy import abstract_policy, policy_objective
from visor_jax.workdir.folder import Workdir

OBJECTIVES = {"answer": answer_objective, "policy": policy_objective}
ABSTRACT = {"answer": abstract_answers, "policy": abstract_policy}
PARTS = {
    "answer": Parts("target_tokens", rows=("turn_correct",)),
    "policy": Parts("label_weight", means=("agreement",)),
}


def make_objective(config: ConfigLike, stage: str, workdir: Workdir) -> Objective:
    """The objective that `train.objective` of `stage` names."""
    config = as_config(config)
    return OBJECTIVES[stage_config(config, stage).objective](config, stage, workdir)


def abstract_objective(config: ConfigLike, stage: str) -> tuple[Loss, dict[str, Any]]:
    """The loss of a stage and the shapes of its batches over all processes, from the configuration alone.

    The loss is that of `make_objective`, which also reads the data.
    """
    config = as_config(config)
    return ABSTRACT[stage_config(config, stage).objective](config, stage)
