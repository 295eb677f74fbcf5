"""Trains one stage on meshes of eight simulated devices; a process of `test_meshes.py`.

Usage: mesh_program.py FOLDER STEPS OVERRIDES MESH... A mesh is "replica,fsdp,tensor[,dcn_replica,dcn_fsdp]", one device
is "1,1,1"; a number after a colon is `train.accumulate`. OVERRIDES is a list in JSON. Prints one JSON object by mesh:
losses, the number of compiled programs, all-gathers of the compiled step by where they are.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from visor_jax.architecture import MESH_AXES
from visor_jax.config import apply_overrides, architecture, stage_config
from visor_jax.model import layers
from visor_jax.scale.mesh import build_mesh
from visor_jax.scale.sharding import place_batch, place_whole
from visor_jax.testing import tiny_config
from visor_jax.train.ahead import abstract_step
from visor_jax.train.guards import check_aliased, check_donated, dispatching
from visor_jax.train.objectives import make_objective
from visor_jax.train.optimizer import build_optimizer, learning_rates
from visor_jax.train.state import initial_state
from visor_jax.workdir.folder import Workdir

STAGE = "full"
layers.UNROLLED = 0  # a loop, as in models of more layers


@dataclasses.dataclass(frozen=True)
class Device:
    """A stand-in for a device of one of two slices."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def mesh_of(sizes: list[int]) -> Mesh:
    """Builds a mesh of all eight devices, or of the first one; two more sizes put four devices in each slice."""
    devices = jax.devices()
    assert len(devices) == 8
    if sizes == [1, 1, 1]:
        return build_mesh(1, 1, 1, devices=devices[:1])
    replica, fsdp, tensor, *dcn = sizes
    if not dcn:
        return build_mesh(replica, fsdp, tensor, devices=devices)
    grid = build_mesh(replica, fsdp, tensor, [Device(n, n // 4) for n in range(8)], dcn=(dcn[0], dcn[1])).devices
    return Mesh(np.vectorize(lambda device: devices[device.id], otypes=[object])(grid), MESH_AXES)


def losses_on(config: Any, mesh: Mesh, steps: int, workdir: Workdir) -> tuple[list[float], int]:
    """Returns the losses of the first steps, and how many programs were compiled for their budgets."""
    settings, arch = stage_config(config, STAGE), architecture(config, STAGE)
    objective, tx, rates = make_objective(config, STAGE, workdir), build_optimizer(settings), learning_rates(settings)
    state, _ = initial_state(config, STAGE, arch, tx, mesh, workdir)
    update: Any = abstract_step(config, STAGE, mesh).update
    losses, budgets = [], set()
    for step in objective.steps(0, steps):
        batch = place_batch(step.arrays, mesh)
        budget, rate = place_whole((np.asarray(step.budget, bool), rates[step.number - 1]), mesh)
        before = state
        with dispatching(mesh):
            if not losses:
                compiled = update.lower(state, batch, budget, rate).compile()
                check_aliased(compiled, state)
                assert compiled.memory_analysis().alias_size_in_bytes > 0, "CPUs count aliased bytes"
            state, metrics = update(state, batch, budget, rate)
        check_donated(before)
        losses.append(float(metrics["loss"]))
        budgets.add(step.budget_name)
    assert len(budgets) > 1 or steps == 1, "budgets must differ"
    return losses, update._cache_size()


def gathers(config: Any, mesh: Mesh) -> dict[str, Any]:
    """Shapes that the compiled step gathers: in loops (with what they call, such as branches), and outside of them."""
    step = abstract_step(config, STAGE, mesh)
    with jax.set_mesh(mesh):
        jitted: Any = step.update
        text = jitted.lower(*step[1:]).compile().as_text()
    computations: dict[str, str] = {}
    for part in re.split(r"\n\n", text):
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) ", part.lstrip()):
            computations[header[1]] = part
    inside: set[str] = set()
    front = re.findall(r"body=%([\w.\-]+)", text)
    while front:
        name = front.pop()
        if name not in inside and name in computations:
            inside.add(name)
            front += [x for x in re.findall(r"%([\w.\-]+)", computations[name]) if x in computations]
    gathered = {name: re.findall(r"(\w+\[[\d,]*\])\S* all-gather", part) for name, part in computations.items()}
    branches = set(
        re.findall(
            r"%([\w.\-]+)",
            " ".join(re.findall(r"(?:branch_computations=\{|true_computation=|false_computation=)([^}\n]*)", text)),
        )
    )
    return {
        "inside": sorted({shape for name in inside & gathered.keys() for shape in gathered[name]}),
        "outside": sorted({shape for name in gathered.keys() - inside for shape in gathered[name]}),
        "branches": sorted(len(gathered[name]) for name in branches & gathered.keys()),
    }


def main(folder: str, steps: str, overrides: str, *meshes: str) -> None:
    base = apply_overrides(tiny_config({"data.batch_size": 16}, steps=int(steps)), json.loads(overrides))
    report = {}
    for name in meshes:
        sizes, _, parts = name.partition(":")
        config = apply_overrides(base, [f"--config.stage_overrides.full.accumulate={parts or 1}"])
        mesh = mesh_of([int(size) for size in sizes.split(",")])
        losses, programs = losses_on(config, mesh, int(steps), Workdir(Path(folder)))
        where = gathers(config, mesh) if mesh.size > 1 and not parts else {}
        report[name] = {"losses": losses, "programs": programs, **where}
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
