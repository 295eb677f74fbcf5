"""The process that compiles steps for TPUs without a TPU: `python -m visor_jax.planning.worker FILE`.

FILE is JSON: {"config": the resolved configuration, "topology": its name, "slices": how many, "stages": names, "out":
a file, "until_unfit": whether to stop after a stage that does not fit}. After each stage the results so far are written
to "out". `visor_jax.planning.compiling` starts it, with an environment in which libtpu looks for no TPU; nothing else
imports this module.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from visor_jax.config import Config, from_json, stage_config
from visor_jax.errors import RequestError
from visor_jax.planning.hlo import collectives
from visor_jax.planning.mixture import accumulated_parts
from visor_jax.scale.mesh import check_rows, configured_mesh
from visor_jax.train.ahead import AbstractStep, abstract_step

_SIZE = r"([\d.]+)([KMGT]?)"
_USED = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(request: dict[str, Any]) -> None:
    """Compiles every stage of the request."""
    config, results = from_json(json.dumps(request["config"])), {}
    out = Path(request["out"])
    try:
        devices = topology_devices(request["topology"], request.get("slices", 1))
    except Exception as error:  # libtpu's own message says which shapes it knows
        out.write_text(json.dumps({"refused": str(error).splitlines()[0][:500]}))
        return
    for stage in request["stages"]:
        try:
            mesh = configured_mesh(config, devices)
            check_batch(config, stage, mesh)
            step = abstract_step(config, stage, mesh)
        except RequestError as error:
            out.write_text(json.dumps({"refused": str(error)}))
            return
        with jax.set_mesh(mesh):
            results[stage] = compiled(step)
        out.write_text(json.dumps({"stages": results}))
        if request["until_unfit"] and not results[stage]["fits"]:
            return


def topology_devices(name: str, slices: int = 1) -> Sequence[Any]:
    """Returns the devices of a topology; of a v4 chip one, whose two cores work together, as on hardware."""
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if slices > 1:
        options["num_slices"] = slices
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def check_batch(config: Config, stage: str, mesh: Mesh) -> None:
    """Checks that the rows of a stage's batch can be split over the mesh, as the training loop does."""
    settings = stage_config(config, stage)
    packed = config.data.pack_window > 0 and settings.objective == "answer"
    pool_rows, parts = (config.data.pool_rows if packed else 1), accumulated_parts(settings)
    check_rows(f"batch_size of stage {stage!r}", settings.batch_size, mesh, pool_rows, parts)


def compiled(step: AbstractStep) -> dict[str, Any]:
    """Compiles a step; returns bytes per device, collectives, and seconds of compiling."""
    start = time.monotonic()
    result: dict[str, Any] = {
        "weights": held((step.state.trainable, step.state.frozen, step.state.ema)),
        "optimizer": held(step.state.opt_state),
    }
    result["batch"] = held(step.batch)
    try:
        jitted: Any = step.update
        program = jitted.lower(step.state, step.batch, step.budget, step.learning_rate).compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = out_of_memory(str(error))
        if sizes is None:
            raise
        return {**result, "fits": False, "total": sizes[0], "limit": sizes[1], "seconds": time.monotonic() - start}
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    result["temporaries"] = memory.temp_size_in_bytes
    result["code"] = memory.generated_code_size_in_bytes
    result["total"] = memory.argument_size_in_bytes + results + result["temporaries"] + result["code"]
    traffic = collectives(program.as_text())
    result["collectives"] = {
        kind: {"count": traffic.counts[kind], "bytes": traffic.bytes[kind]} for kind in traffic.bytes
    }
    result["waiting"] = traffic.waiting
    result["unknown_loops"] = traffic.unknown_loops
    return {**result, "fits": True, "seconds": time.monotonic() - start}


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Returns the bytes that a program needs and may use, from the compiler's message; None for another one."""
    used = next((match for pattern in _USED if (match := pattern.search(message))), None)
    return used and (_size(used[1], used[2]), _size(used[3], used[4]))


def _size(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def held(tree: Any) -> int:
    """Returns the bytes of a tree of shapes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
