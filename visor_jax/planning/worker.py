"""The process that compiles steps for TPUs without a TPU: `python -m visor_jax.planning.worker FILE`.

FILE is JSON: {"config": the resolved configuration, "topology": its name, "stages": names, "out": a file}. After each
stage the results so far are written to "out". `visor_jax.planning.compiling` starts it, with an environment in which
libtpu looks for no TPU; nothing else imports this module.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from visor_jax.config import from_json
from visor_jax.errors import RequestError
from visor_jax.planning.hlo import collectives
from visor_jax.planning.step import StageStep, stage_step
from visor_jax.scale.mesh import build_mesh

_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(request: dict[str, Any]) -> None:
    """Compiles every stage of the request."""
    config, results = from_json(json.dumps(request["config"])), {}
    out = Path(request["out"])
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"]).devices
    except Exception as error:  # libtpu's own message says which shapes it knows
        out.write_text(json.dumps({"refused": str(error).splitlines()[0][:500]}))
        return
    sizes = config.mesh
    for stage in request["stages"]:
        try:
            mesh = build_mesh(sizes.replica, sizes.fsdp, sizes.tensor, devices=devices)
            step = stage_step(config, stage, mesh)
        except RequestError as error:
            out.write_text(json.dumps({"refused": str(error)}))
            return
        with jax.set_mesh(mesh):
            results[stage] = compiled(step)
        out.write_text(json.dumps({"stages": results, "mesh": dict(mesh.shape)}))


def compiled(step: StageStep) -> dict[str, Any]:
    """Compiles a step; returns bytes per device, collectives, and seconds of compiling."""
    start = time.monotonic()
    result: dict[str, Any] = {"weights": held(step.state[:2]), "optimizer": held(step.state.opt_state)}
    result["batch"] = held(step.arguments[1])
    try:
        program = step.update.lower(*step.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        used = _USED.search(str(error))
        if used is None:
            raise
        total, limit = (round(float(used[i]) * _UNITS[used[i + 1]]) for i in (1, 3))
        return {**result, "fits": False, "total": total, "limit": limit, "seconds": time.monotonic() - start}
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    result["temporaries"] = memory.temp_size_in_bytes
    result["code"] = memory.generated_code_size_in_bytes
    result["total"] = memory.argument_size_in_bytes + results + result["temporaries"] + result["code"]
    traffic = collectives(program.as_text())
    result["collectives"] = {
        kind: {"count": traffic.counts[kind], "bytes": traffic.bytes[kind]} for kind in traffic.bytes
    }
    result["unknown_loops"] = traffic.unknown_loops
    return {**result, "fits": True, "seconds": time.monotonic() - start}


def held(tree: Any) -> int:
    """Returns the bytes of a tree of shapes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
