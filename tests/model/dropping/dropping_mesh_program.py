"""Drops visual tokens on one device, on a mesh, in bfloat16 and in float64; prints differences as JSON.

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
from visor_jax.architecture import AnyResArchitecture, DroppingArchitecture
from visor_jax.data.collate import make_batch
from visor_jax.model.layers import in_dtype
from visor_jax.model.visor import hidden_states
from visor_jax.scale.sharding import place_batch

EACH = {
    "fastv": DroppingArchitecture("fastv", (2,), (0.5,)),
    "pyramiddrop": DroppingArchitecture("pyramiddrop", (1, 2), (0.5, 0.25)),
    "sparsevlm": DroppingArchitecture("sparsevlm", (1, 2), (0.4, 0.2)),
}


def compared(dropping: DroppingArchitecture) -> dict[str, Any]:
    plain = testing.tiny_architecture(3, plan="dense", anyres=AnyResArchitecture())
    vision = dataclasses.replace(plain.vision, tile_size=5 * plain.vision.patch_size)
    arch = dataclasses.replace(plain, vision=vision, dropping=dropping)
    examples = [[testing.random_example(arch, (3, 6), seed=seed)] for seed in range(4)]
    batch = make_batch(examples, testing.row_shape_of(examples, 2), arch)
    visual = np.asarray(testing.decoder_inputs(arch, batch)[0])
    arrays = {name: x for name, x in batch.arrays.items() if name.startswith(("visual_s", "visual_p", "text", "loss"))}
    params, used = testing.random_params(arch), arrays["text_segments"] > 0

    def run(params: Any, arrays: Any) -> np.ndarray:
        program = testing.quick_jit(lambda p, x: hidden_states(p, x["visual"], x, (), arch))
        return np.asarray(program(params, arrays))

    arrays["visual"] = visual
    expected = run(params, arrays)
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 2), ("replica", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        on_mesh = run(params, place_batch(arrays, mesh))
    half = run(in_dtype(params, jnp.bfloat16), {**arrays, "visual": jnp.asarray(visual, jnp.bfloat16)})
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        double = run(wide, {**arrays, "visual": visual.astype(np.float64)})
    return {
        "mesh": float(np.abs(on_mesh - expected)[used].max()),
        "double": float(np.abs(double - expected)[used].max()),
        "dtypes": [half.dtype.name, double.dtype.name],
        "finite": bool(np.isfinite(half.astype(np.float32)).all()),
    }


if __name__ == "__main__":
    print(json.dumps({name: compared(dropping) for name, dropping in EACH.items()}))
