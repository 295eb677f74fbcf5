"""Whether a configuration fits a topology, by formula: within seconds, without libtpu and without JAX.

For those who ask before they pay for chips, such as `visor launch`. `visor plan --topology` compiles the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visor_jax.config import Config
from visor_jax.planning.plan import plan, planned_stages
from visor_jax.scale.topologies import GB, Topology


@dataclass(frozen=True)
class Fit:
    """Memory of one chip in the stage that needs the most.

    Attributes:
      fits: whether every trained stage fits by formula.
      stage: the fullest one.
      bytes_per_chip, bytes_available: in that stage.
    """

    fits: bool
    stage: str
    bytes_per_chip: int
    bytes_available: int

    def __str__(self) -> str:
        held, room = self.bytes_per_chip / GB, self.bytes_available / GB
        verdict = "fits" if self.fits else "does not fit"
        return f"stage {self.stage!r} {verdict}: {held:.1f} of {room:.1f} GB per chip by formula"


def fit_by_formula(config: Config, topology: Topology, stages: Sequence[str] = ()) -> Fit:
    """Returns whether the trained stages of a configuration fit on the chips of a topology.

    The formula is within 2 % of four compiled programs of the shipped configurations and a tenth too low for a fifth:
    one that nearly fills the memory may not fit.

    Args:
      topology: of `visor_jax.scale.topologies.parse_topology`.
      stages: names; empty: every trained stage of the configuration.

    Raises:
      RequestError: the mesh or a batch size does not suit the topology; one line names field, value and what to do.
    """
    result = plan(config, topology, stages or planned_stages(config), seconds=0)["stages"]
    stage = max(result, key=lambda name: result[name]["bytes_per_chip"] / result[name]["bytes_available"])
    fits = all(entry["fits"] for entry in result.values())
    return Fit(fits, stage, result[stage]["bytes_per_chip"], result[stage]["bytes_available"])
