"""Encodes rows with every reduction on one device, on a mesh, in bfloat16 and in float64; prints differences as JSON.

Run by test_mesh.py in a process with four simulated devices.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from visor_jax import testing
from visor_jax.architecture import AnyResArchitecture, ReductionArchitecture, VisionArchitecture
from visor_jax.data.collate import RowShape, make_batch
from visor_jax.model.layers import in_dtype
from visor_jax.model.visor import encode
from visor_jax.scale.sharding import place_batch

PLAIN = testing.tiny_architecture(
    3,
    vision=VisionArchitecture(20, 4, 16, 24, num_layers=2, num_heads=2),
    anyres=AnyResArchitecture(((20, 20), (20, 40), (40, 40)), max_tiles=2),
)


def compared(method: str) -> dict[str, Any]:
    arch = dataclasses.replace(PLAIN, reduction=ReductionArchitecture(method, 0.25))
    examples = [testing.random_example(arch, (3, 4), size=(20, 33), seed=seed) for seed in range(4)]
    shape = RowShape(8, examples[0].size.visual + 2, 16)
    batch = make_batch([[example] for example in examples], shape, arch, 2).arrays  # two pools
    batch = {name: x for name, x in batch.items() if name.startswith(("tiles", "visual"))}
    params = testing.random_params(arch)

    def run(params: Any, batch: Any) -> np.ndarray:
        return np.asarray(testing.quick_jit(encode, static_argnames="arch")(params, batch, arch=arch))

    expected = run(params, batch)
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 2), ("replica", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        on_mesh = run(params, place_batch(batch, mesh))
    half = run(in_dtype(params, jnp.bfloat16), batch)
    with jax.enable_x64(True):
        double = run(jax.tree.map(lambda x: np.asarray(x, np.float64), params), batch)
    return {
        "mesh": float(np.abs(on_mesh - expected).max()),
        "double": float(np.abs(double - expected).max()),
        "dtypes": [half.dtype.name, double.dtype.name],
        "kept": ((np.abs(half.astype(np.float32)).sum(axis=-1) > 0) == (batch["visual_segments"] > 0)).all().item(),
    }


if __name__ == "__main__":
    print(json.dumps({method: compared(method) for method in ("divprune", "vispruner", "visionzip", "hired")}))
