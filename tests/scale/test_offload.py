"""`train.remat=offload`, compiled for a TPU without a TPU: what layers read lies in the host's memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from visor_jax.planning.compiling import WITHOUT_TPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra aot)"),
]

PROGRAM = """
import json, re
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from visor_jax.architecture import MESH_AXES
from visor_jax.config import architecture, as_config
from visor_jax.model import decoder, layers
from visor_jax.model.stream import TokenStream
from visor_jax.model.visor import abstract_params
from visor_jax.planning.worker import topology_devices
from visor_jax.testing import tiny_config

layers.UNROLLED = 0  # a loop, as in models of more layers
arch = architecture(as_config(tiny_config(
    {"model.text.num_layers": 8, "model.text.hidden_size": 128, "model.text.head_dim": 64})))
mesh = Mesh(np.array(topology_devices("v5e:2x2")[:1]).reshape(1, 1, 1), MESH_AXES)
place = NamedSharding(mesh, PartitionSpec())

def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

def loss(params, visual, text, stream, on):
    visual, text = decoder.forward(params, visual, text, stream, on, arch, remat="offload")
    return jnp.sum(visual.astype(jnp.float32) ** 2) + jnp.sum(text.astype(jnp.float32) ** 2)

params = {name: x for name, x in abstract_params(arch).items() if name in ("blocks", "tail")}
params = jax.tree.map(lambda x: shape(*x.shape, dtype=jnp.bfloat16), params)
tokens = [shape(4, size, 128, dtype=jnp.bfloat16) for size in (37, 128)]
stream = TokenStream(*(shape(4, size) for size in (37, 37, 128, 128, 128)))
with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(loss))
    program = step.lower(params, *tokens, stream, shape(arch.num_slots, dtype=jnp.bool_)).compile()
on_host = re.findall(r"(\\w+\\[[\\d,]*\\])\\{[^}]*S\\(5\\)\\}", program.as_text())
print(json.dumps({"bytes": program.memory_analysis().host_temp_size_in_bytes, "arrays": sorted(set(on_host))}))
"""


def test_the_inputs_of_layers_are_kept_in_the_memory_of_the_host() -> None:
    """The decoder and its gradient: V and T of each super-block, stacked over the loop."""
    environment = {**os.environ, **WITHOUT_TPU, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    on_host = json.loads(done.stdout.splitlines()[-1])
    print(on_host)
    assert {"bf16[2,4,37,128]", "bf16[2,4,128,128]"} <= {*on_host["arrays"]}
    assert on_host["bytes"] >= 2 * 2 * 4 * (37 + 128) * 128, "two super-blocks, bfloat16"
