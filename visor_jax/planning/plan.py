"""The plan of a run on a topology: per stage whether it fits, FLOPs, collectives, time, cost.

In: a configuration and a topology. Out: the dict that `visor plan --topology --json` prints. For TPUs the real step of
every stage is compiled (`visor_jax.planning.compiling`); for GPUs everything is a formula. Times are always estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from visor_jax.config import Config, stage_config
from visor_jax.config.schema import TRAINED_STAGES
from visor_jax.errors import RequestError, nearest
from visor_jax.planning.compiling import compile_stages
from visor_jax.planning.memory import chip_bytes
from visor_jax.planning.passes import passes
from visor_jax.planning.roofline import Collective, Estimate, estimate
from visor_jax.planning.workload import Workload, mesh_of, workload
from visor_jax.scale.topologies import Topology

SAMPLES = {"warmup": 4_000_000, "full": 3_200_000, "universal": 3_200_000}  # the paper's; other stages: their steps
SECONDS = 840.0  # of compiling, all stages together
DAY, HOUR = 86_400.0, 3600.0
COSTLIEST = (
    *("fits", "bytes_per_chip", "bytes_available", "flops_per_step", "seconds_per_step", "mfu", "chips", "mesh"),
    "collective_bytes",
)
WITHOUT_EFFECT = ("steps", "learning_rate", "schedule", "warmup_fraction", "end_fraction", "init_from", "budgets")


def planned_stages(config: Config, stage: str = "") -> list[str]:
    """Returns the trained stages of a configuration, or the one given.

    Raises:
      RequestError: the stage does not train.
    """
    stages = [name for name in config.stages if name in TRAINED_STAGES]
    if not stage:
        return stages
    if stage not in TRAINED_STAGES:
        hint = nearest(stage, TRAINED_STAGES) or f"expected one of {', '.join(TRAINED_STAGES)}"
        raise RequestError(f"--stage={stage}: {hint}")
    return [stage]


def plan(
    config: Config,
    topology: Topology,
    stages: Sequence[str],
    *,
    dollars: float = 0.0,
    seconds: float = SECONDS,
    until_unfit: bool = False,
    machine_code: bool = False,
) -> dict[str, Any]:
    """Returns the plan of these stages: the costliest stage's figures, and every stage's below "stages".

    Of all the stages that a configuration trains, the plan also has its "passes" (`visor_jax.planning.passes`).

    Args:
      dollars: price of one chip for one hour; 0 leaves costs out.
      seconds: after which stages that are not compiled are planned by formula alone; 0: nothing is compiled.
      until_unfit: plan the rest by formula once a stage does not fit.
      machine_code: compile to the end, which takes several times as long.

    Raises:
      RequestError: the mesh or a stage's batch does not suit the topology, or what `compile_stages` raises.
    """
    for stage in stages:
        check_batch(config, stage, topology)
    of_stage = list(stages) != planned_stages(config)
    work = {stage: workload(config, stage, topology) for stage in stages}
    programs = same_programs(config, stages)
    compiled: Mapping[str, Any] = {}
    if topology.chip.kind == "tpu" and seconds:
        slowest = {stage: estimate(x.ops, x.collectives, topology).seconds for stage, x in work.items()}
        order = sorted(set(programs.values()), key=lambda stage: -slowest[stage])
        compiled = compile_stages(config, topology, order, seconds, until_unfit=until_unfit, machine_code=machine_code)
    entries = {
        stage: stage_plan(config, stage, topology, work[stage], compiled.get(programs[stage]), dollars)
        for stage in stages
    }
    costliest = max(entries.values(), key=lambda entry: (not entry["fits"], entry["seconds_per_step"]))
    return {
        **{key: costliest[key] for key in COSTLIEST},
        "stages": entries,
        "passes": {} if of_stage else passes(config, topology, dollars),
        "topology": topology.label,
        "note": "compiled and estimated, not run on hardware" if compiled else "estimated, not run on hardware",
    }


def check_batch(config: Config, stage: str, topology: Topology) -> None:
    """Raises:
    RequestError: the rows of the stage's batch cannot be split over the devices, as training would say.
    """
    rows, unit = stage_config(config, stage).batch_size, row_unit(config, stage, topology)
    if rows % unit:
        raise RequestError(
            f"batch_size of stage {stage!r}={rows}: expected a multiple of {unit}, because the {topology.devices}"
            f" devices of {topology.flags} split the rows {mesh_of(config, topology).row_ways} ways, each in"
            " whole pools (data.pool_rows) and parts (train.accumulate); change it or mesh.replica, mesh.fsdp and"
            " mesh.tensor, or try 'visor plan --search'"
        )


def row_unit(config: Config, stage: str, topology: Topology) -> int:
    """Returns the number of rows that a stage's batch must be a multiple of: shards, whole pools, and parts."""
    settings = stage_config(config, stage)
    packed = config.data.pack_window > 0 and settings.objective == "answer"
    return mesh_of(config, topology).row_ways * (config.data.pool_rows if packed else 1) * settings.accumulate


def same_programs(config: Config, stages: Sequence[str]) -> dict[str, str]:
    """Returns for each stage the first one whose step is the same program: it differs in schedule or budgets only."""
    first: dict[str, str] = {}
    result = {}
    for stage in stages:
        settings = stage_config(config, stage)
        fields = {name: value for name, value in vars(settings).items() if name not in WITHOUT_EFFECT}
        result[stage] = first.setdefault(repr(sorted(fields.items())), stage)
    return result


def stage_plan(
    config: Config, stage: str, topology: Topology, work: Workload, compiled: Mapping[str, Any] | None, dollars: float
) -> dict[str, Any]:
    """Returns the figures of one stage."""
    chip, mesh = topology.chip, mesh_of(config, topology)
    held = held_bytes(config, stage, topology, work, compiled)
    traffic = compiled.get("collectives", {}) if compiled else {}
    measured = sum(x["bytes"] for x in traffic.values()) * chip.cores
    formula = sum(x.bytes for x in work.collectives if x.ways > 1)
    collectives = compiled_collectives(compiled, topology) if compiled and traffic else []
    collectives += [x for x in work.collectives if x.network]  # the program's text does not say which ones cross slices
    if sum(x.seconds(topology) for x in collectives) < sum(x.seconds(topology) for x in work.collectives):
        collectives = work.collectives  # the program's text may hide a part
    found = estimate(work.ops, collectives, topology)
    total = compiled["total"] * chip.cores if compiled else sum(held.values())
    return {
        "fits": compiled["fits"] if compiled else total <= chip.hbm_bytes,
        "bytes_per_chip": round(total),
        "bytes_available": compiled["limit"] * chip.cores if compiled else chip.hbm_bytes,
        "flops_per_step": found.useful_flops * topology.chips,
        "seconds_per_step": found.seconds,
        "mfu": found.mfu,
        "chips": topology.chips,
        "mesh": mesh.sizes,
        "collective_bytes": round(measured if traffic else formula),
        "compiled": bool(compiled),
        "machine_code": bool(compiled and compiled.get("machine_code")),
        "compile_seconds": round(compiled["seconds"], 1) if compiled else None,
        "bytes": {name: round(size) for name, size in held.items()},
        "collectives": traffic or {x.kind: {"bytes": x.bytes} for x in work.collectives if x.ways > 1},
        **throughput(config, stage, topology, work, found, dollars),
        "largest_batch_size": largest_batch(config, stage, topology, held),
    }


def compiled_collectives(compiled: Mapping[str, Any], topology: Topology) -> list[Collective]:
    """Returns the compiled program's communication: what the device waits for, and the rest."""
    cores, ways = topology.chip.cores, max(topology.chips, 2)
    traffic = compiled["collectives"]
    moved = sum(x["bytes"] * (2 if kind == "all-reduce" else 1) for kind, x in traffic.items())
    waiting = compiled["waiting"]
    return [
        Collective("compiled", "asynchronous", (moved - waiting) * cores, ways),
        Collective("compiled", "synchronous", waiting * cores, ways, hidden=0.0),
    ]


def held_bytes(
    config: Config, stage: str, topology: Topology, work: Workload, compiled: Mapping[str, Any] | None
) -> dict[str, float]:
    """Returns bytes of one chip by kind; the compiler's if the step was compiled and fits."""
    formula = chip_bytes(config, stage, topology, work)
    if not compiled:
        return formula
    cores = topology.chip.cores
    known = {name: compiled[name] * cores for name in ("weights", "optimizer", "batch")}
    if not compiled["fits"]:
        return {**known, "temporaries": compiled["total"] * cores - sum(known.values())}
    return {**known, "temporaries": compiled["temporaries"] * cores, "code": compiled["code"] * cores}


def throughput(
    config: Config, stage: str, topology: Topology, work: Workload, found: Estimate, dollars: float
) -> dict[str, Any]:
    """Returns samples per day, what the stage costs, and where the time goes."""
    packed = work.packed
    samples = SAMPLES.get(stage, stage_config(config, stage).steps * packed.samples)
    hours = samples / packed.samples * found.seconds * topology.chips / HOUR
    return {
        "flops_executed_per_step": found.executed_flops * topology.chips,
        "samples_per_step": packed.samples,
        "samples_per_day": packed.samples * DAY / found.seconds,
        "samples": round(samples),
        "chip_hours": hours,
        "dollars": hours * dollars if dollars else None,
        "used": {what: packed.used(what) for what in ("tiles", "visual", "text")},
        "bound": found.bound,
        "time_shares": {name: part / found.seconds for name, part in found.parts.items()},
    }


def largest_batch(config: Config, stage: str, topology: Topology, held: Mapping[str, float]) -> int:
    """Returns the largest batch size that fits if temporaries and batch grow in proportion to the rows; 0 if none."""
    rows, unit = stage_config(config, stage).batch_size, row_unit(config, stage, topology)
    fixed = sum(held.get(name, 0.0) for name in ("weights", "optimizer", "code"))
    per_unit = (held["temporaries"] + held["batch"]) * unit / rows
    return max(int((topology.chip.hbm_bytes - fixed) / per_unit), 0) * unit
