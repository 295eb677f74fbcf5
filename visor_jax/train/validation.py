"""Loss and accuracy on held-out data while a stage trains.

In: a configuration, and the parameters after a step. Out: `validation/...` fields of that step's metrics row. What is
measured on which data depends on the objective (`visor_jax.train.objectives.held_out`). The data are read again each
time, so that no memory is held in between and the figures of two steps are comparable. Training is not affected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from visor_jax.config import Config, stage_config
from visor_jax.model.decoder import Budget
from visor_jax.model.layers import Params, in_dtype
from visor_jax.model.visor import Batch
from visor_jax.scale.sharding import batch_sharding, place_batch, replicated
from visor_jax.train.objectives.held_out import HeldOut, Sums, held_out
from visor_jax.train.update import State
from visor_jax.tree import unflatten
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.supervision import beat


@dataclass(frozen=True)
class Validation:
    """The validation of one stage.

    Attributes:
      every: steps between two validations; the last step is always validated.
      data: what is measured, on which batches.
      sums: the compiled `data.sums`.
    """

    every: int
    data: HeldOut
    sums: Callable[[Params, Batch, Budget], Sums]
    mesh: Mesh

    def is_due(self, step: int, last: int) -> bool:
        """Whether the parameters after `step` are validated."""
        return step % self.every == 0 or step == last

    def fields(self, state: State) -> dict[str, Any]:
        """Returns the fields of the metrics row. Waits for the devices."""
        params = unflatten({**state.frozen, **state.trainable})
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        with jax.set_mesh(self.mesh):
            for measured in self.data.batches(params):
                batch = place_batch(measured.arrays, self.mesh)
                parts = {name: self.sums(params, batch, jnp.asarray(bits, bool)) for name, bits in measured.budgets}
                for name, sums in jax.device_get(parts).items():
                    for key, value in sums.items():
                        totals[name][key] += float(value)
                beat()
        return {f"validation/{name}": value for name, value in self.data.fields(totals).items()}


def make_validation(config: Config, stage: str, workdir: Workdir, mesh: Mesh, shardings: State) -> Validation | None:
    """The validation that `train.validate_every` asks for; None if it is 0.

    Raises:
      RequestError: the validation split does not exist or is empty, or the stage cannot be validated.
    """
    if not (every := stage_config(config, stage).validate_every):
        return None
    data, dtype = held_out(config, stage, workdir, mesh), config.model.dtype
    sums = jax.jit(
        lambda params, batch, budget: data.sums(in_dtype(params, dtype), batch, budget),
        in_shardings=(unflatten({**shardings.frozen, **shardings.trainable}), batch_sharding(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )
    return Validation(every, data, sums, mesh)
