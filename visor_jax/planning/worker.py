"""The process that compiles one step for TPUs without a TPU: `python -m visor_jax.planning.worker FILE`.

FILE is JSON: {"config": the resolved configuration, "topology": its name, "slices": how many, "stage": its name, "out":
a file}. Before compiling, the bytes of the step's arguments are written to "out", afterwards all results.
`visor_jax.planning.compiling` starts it, with an environment in which libtpu looks for no TPU; nothing else imports
this module.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from visor_jax.config import Config, from_json, stage_config
from visor_jax.errors import RequestError
from visor_jax.scale.mesh import check_rows, configured_mesh
from visor_jax.train.ahead import AbstractStep, abstract_step

_SIZE = r"([\d.]+)([KMGT]?)"
_USED = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(request: dict[str, Any]) -> None:
    """Compiles the step of the request."""
    config, stage, out = from_json(json.dumps(request["config"])), request["stage"], Path(request["out"])
    try:
        devices = topology_devices(request["topology"], request["slices"])
    except Exception as error:  # libtpu's own message says which shapes it knows
        write(out, {"refused": str(error).splitlines()[0][:500]})
        return
    try:
        mesh = configured_mesh(config, devices)
        check_batch(config, stage, mesh)
        step = abstract_step(config, stage, mesh)
    except RequestError as error:
        write(out, {"refused": str(error)})
        return
    arguments = argument_bytes(step)
    write(out, {"arguments": arguments})
    with jax.set_mesh(mesh):
        write(out, {"arguments": arguments, "result": compiled(step)})


def write(out: Path, result: dict[str, Any]) -> None:
    """Writes the file at once: another process reads it at any time."""
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(out)


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
    pool_rows, parts = (config.data.pool_rows if packed else 1), settings.accumulate
    check_rows(f"batch_size of stage {stage!r}", settings.batch_size, mesh, pool_rows, parts)


def argument_bytes(step: AbstractStep) -> dict[str, int]:
    """Returns the bytes of a step's arguments on one device."""
    return {
        "weights": held((step.state.trainable, step.state.frozen, step.state.ema)),
        "optimizer": held(step.state.opt_state),
        "batch": held(step.batch),
    }


def compiled(step: AbstractStep) -> dict[str, Any]:
    """Compiles a step; returns whether it fits and the bytes of its machine code, or what it needs and may use."""
    try:
        jitted: Any = step.update
        program = jitted.lower(step.state, step.batch, step.budget, step.learning_rate).compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = out_of_memory(str(error))
        if sizes is None:
            raise
        return {"fits": False, "total": sizes[0], "limit": sizes[1]}
    # Its `temp_size_in_bytes` is not used: it counts more than the compiler lays out, and more than a chip has.
    return {"fits": True, "code": program.memory_analysis().generated_code_size_in_bytes}


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
