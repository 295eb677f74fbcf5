"""Which mesh, remat, accumulation and batch size suit a topology: by formula first, then the compiler's word.

In: a configuration and a topology. Out: the overrides that the formulas rank first and that fit, ready for the command
line. Every candidate keeps the packing and the stages of the configuration. No JAX import.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visor_jax.config import Config, apply_overrides, stage_config
from visor_jax.errors import RequestError
from visor_jax.planning.memory import chip_bytes
from visor_jax.planning.plan import plan
from visor_jax.planning.roofline import estimate
from visor_jax.planning.workload import Mesh, mesh_of, workload
from visor_jax.scale.topologies import Topology

ROOM = 0.98  # of the memory that the formula may fill: it is within 2 % of most compiled programs
LESS = 0.95  # of the memory of a candidate that does not fit: what the next one to be compiled may need
ENOUGH = 150.0  # seconds that another candidate takes to compile
# Of the decoder's layers and of the tower's; not "offload": no formula knows the link to the host.
POLICIES = [
    *((name, "") for name in ("none", "full", "attention", "products")),
    *(("attention", tower) for tower in ("mlp", "products")),
    *(("products", tower) for tower in ("attention", "mlp")),
]
REPLICA = (1, 2, 4, 8, 16)
TENSOR = (1, 2, 4, 8)
ACCUMULATE = (1, 2, 4, 8)
BATCH_FACTORS = (0.5, 1, 2, 4)
SAME = 0.01  # of the time per sample: settings this close count as equally fast, and the one nearer to the config wins


@dataclass(frozen=True)
class Candidate:
    """Settings for every stage, and what the formulas say about the costliest one.

    Attributes:
      overrides: as on the command line.
      seconds_per_sample: over all stages, weighed equally.
      room: bytes of the fullest stage as a share of the memory.
      changes: fields that differ from the configuration.
    """

    overrides: tuple[str, ...]
    config: Config
    seconds_per_sample: float
    room: float
    changes: int


def plan_best(
    config: Config,
    topology: Topology,
    stages: Sequence[str],
    dollars: float,
    seconds: float,
    *,
    machine_code: bool = False,
) -> dict[str, Any]:
    """Returns the plan of the fastest candidate that fits, with its "overrides" and how many were "searched".

    Formulas rank the candidates. The best is compiled; where the compiler says that it does not fit, the next one that
    needs clearly less memory is, as long as there is time.

    Raises:
      RequestError: none fits by formula.
    """
    ranked, end = search(config, topology, stages), time.monotonic() + seconds
    room, result = float("inf"), {}
    for candidate in ranked:
        left = max(end - time.monotonic(), 0.0)
        if candidate.room > LESS * room or (result and left < ENOUGH):
            continue
        settings = {"dollars": dollars, "seconds": left, "machine_code": machine_code}
        chosen = apply_overrides(config, candidate.overrides)
        result = plan(chosen, topology, stages, until_unfit=True, **settings)
        result |= {"overrides": list(candidate.overrides), "searched": len(ranked)}
        if result["fits"]:
            break
        room = candidate.room
    return result


def search(config: Config, topology: Topology, stages: Sequence[str]) -> list[Candidate]:
    """Returns the candidates that fit by formula, the fastest first.

    Raises:
      RequestError: none fits, or no mesh splits the batch.
    """
    tried = [_judged(config, fields, topology, stages) for fields in candidates(config, topology, stages)]
    fitting = [candidate for candidate in tried if candidate.room <= ROOM]
    if not tried:
        raise RequestError(
            f"data.batch_size={config.data.batch_size}: no mesh of the {topology.devices} devices of {topology.flags}"
            f" splits {' or '.join(f'{config.data.batch_size * factor:g}' for factor in BATCH_FACTORS)} rows into equal"
            " whole pools (data.pool_rows); change it, or use another number of chips"
        )
    if not fitting:
        least = min(candidate.room for candidate in tried)
        raise RequestError(
            f"{topology.flags}: none of {len(tried)} settings of mesh, remat, accumulation and batch size"
            f" fits; the smallest fills {least:.0%} of the memory by formula, at most {ROOM:.0%} may be filled; use"
            " more chips, or shorter rows"
        )
    fastest = min(candidate.seconds_per_sample for candidate in fitting)
    return sorted(fitting, key=lambda x: (x.seconds_per_sample > (1 + SAME) * fastest, x.changes, x.seconds_per_sample))


def candidates(config: Config, topology: Topology, stages: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the fields of every combination that the batch can be split into."""
    settings = [stage_config(config, stage) for stage in stages]
    packed = config.data.pack_window > 0
    unit = config.data.pool_rows if packed else 1
    heads = config.model.text.num_kv_heads
    slices = topology.slices
    over = [(slices, 1), (1, slices)] if slices > 1 else [(1, 1)]
    for (dcn_replica, dcn_fsdp), replica, tensor, factor, parts, (remat, tower) in itertools.product(
        over, REPLICA, TENSOR, BATCH_FACTORS, ACCUMULATE, POLICIES
    ):
        rows = int(config.data.batch_size * factor)
        ways = topology.devices // tensor
        if (
            topology.devices // slices % (tensor * replica)
            or heads % tensor
            or rows % (ways * unit * parts)
            or rows < 1
        ):
            continue
        if config.evaluate.batch_size % (replica * slices):
            continue  # the configuration itself would be refused
        if any(stage.batch_size != config.data.batch_size for stage in settings) and factor != 1:
            continue  # a stage with a batch size of its own keeps it
        fields = {
            "mesh.replica": replica,
            "mesh.fsdp": -1,  # the rest
            "mesh.tensor": tensor,
            "train.remat": remat,
            "train.tower_remat": tower,
            "train.accumulate": parts,
            "data.batch_size": rows,
        }
        if (config.mesh.dcn_replica, config.mesh.dcn_fsdp) != (dcn_replica, dcn_fsdp):
            fields |= {"mesh.dcn_replica": dcn_replica, "mesh.dcn_fsdp": dcn_fsdp}
        yield fields


def _judged(config: Config, fields: Mapping[str, Any], topology: Topology, stages: Sequence[str]) -> Candidate:
    changed = config
    for name, value in fields.items():
        section, field = name.split(".")
        part = dataclasses.replace(getattr(changed, section), **{field: value})
        changed = dataclasses.replace(changed, **{section: part})
    seconds, room = 0.0, 0.0
    for stage in stages:
        work = workload(changed, stage, topology)
        seconds += estimate(work.ops, work.collectives, topology).seconds / work.packed.samples
        room = max(room, sum(chip_bytes(changed, stage, topology, work).values()) / topology.chip.hbm_bytes)
    changes = sum(getattr(config, part) != getattr(changed, part) for part in ("mesh", "train", "data"))
    changes += _mesh(config, topology) != mesh_of(changed, topology)
    overrides = tuple(f"--config.{name}={value}" for name, value in fields.items())
    return Candidate(overrides, changed, seconds, room, changes)


def _mesh(config: Config, topology: Topology) -> Mesh | None:
    """Returns the configured mesh, or None if it is one for another topology."""
    try:
        return mesh_of(config, topology)
    except RequestError:
        return None
