"""Run by `test_mesh.py` in a process of its own: kernels on eight simulated devices against the reference on one.

Prints one JSON object: for each mesh, "replica x fsdp x tensor", the largest difference of output and gradients, and
how many samples and KV heads a device got to see.
"""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from visor_jax.kernels.attention import AttentionMask, api, base, gpu, tpu

MESHES = [(1, 4, 2), (2, 2, 2), (1, 1, 8)]
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 4, 12, 4, 2, 8
KERNELS = {
    "pallas_tpu": functools.partial(tpu.attention, tiles=tpu.Tiles(8, 8), interpret=True),
    "pallas_gpu": functools.partial(gpu.attention, tiles=gpu.Tiles(8, 8, 8, 8), interpret=True),
}
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def main() -> None:
    order = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))
    mask = AttentionMask(order, order, order // 5, order // 5, jnp.array([True, False, True, True]))
    heads = (HEADS, KV_HEADS, KV_HEADS)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (BATCH, LENGTH, h, HEAD_DIM)) for key, h in zip(keys, heads, strict=True)]

    def gradients(run):
        def both(q, k, v, mask):
            out, pull = jax.vjp(lambda *x: run(*x, mask), q, k, v)
            return out, *pull(jnp.cos(out))

        return jax.jit(both, compiler_options=QUICK)(*arrays, mask)

    wanted = gradients(lambda q, k, v, mask: base.attention(q, k, v, mask=mask))
    report = {}
    for name, kernel in KERNELS.items():
        for sizes in MESHES:
            parts: set[tuple[int, int]] = set()

            def seen(q, k, v, *, mask, kernel=kernel, parts=parts):
                parts.add((k.shape[0], k.shape[2]))
                return kernel(q, k, v, mask=mask)

            with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(sizes), ("replica", "fsdp", "tensor"))):
                found = gradients(functools.partial(api.over_mesh, seen))
            worst = max(float(jnp.max(jnp.abs(np.asarray(x) - y))) for x, y in zip(found, wanted, strict=True))
            report[f"{name} {'x'.join(map(str, sizes))}"] = {"worst": worst, "parts": sorted(parts)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
