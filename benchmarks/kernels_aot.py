"""Compiles the TPU kernels with libtpu's compilers, without a TPU: all shapes of the models, forward and backward.

    python benchmarks/kernels_aot.py [--topologies v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1] [--cases 0p5b_joint ...]
    python benchmarks/kernels_aot.py --decoder   # the whole decoder and its gradient, on all chips of a topology

Needs `pip install libtpu` (extra `aot`), preferably in a separate environment: where libtpu is installed, `import jax`
looks for TPUs. Out: one line per program, and `benchmarks/results/kernels_aot.json` (or `--out`): for each topology and
program whether it compiled (or the compiler's message), compile seconds, bytes of HBM without arguments and results,
scoped VMEM bytes of each kernel, and collectives; null if XLA cannot print the program. Only the decoder has
collectives, for its gradients (LLaVA-OneVision-0.5B's decoder, one sample of 8,192 tokens per chip, budget at run time,
remat). Results of other topologies and cases in the file are kept. Exit status 1 if any program does not compile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Set before JAX is imported: libtpu does not look for a TPU, and compiles for this machine.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5e-16"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from visor_jax.config import architecture, load_config
from visor_jax.kernels.attention import AttentionMask
from visor_jax.kernels.attention import pallas_tpu as tpu
from visor_jax.model import decoder
from visor_jax.model.stream import TokenStream
from visor_jax.model.visor import abstract_params

ROOT = Path(__file__).resolve().parent.parent
RESULT = harness.RESULTS / "kernels_aot.json"
VISUAL, TEXT = 7680, 512  # tokens of one sample of the decoder's batch
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


class Case(NamedTuple):
    """Shapes of one call of attention."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool


CASES = {
    "0p5b_joint": Case(2, 8832, 8832, 14, 2, 64, "bfloat16", True),
    "0p5b_cross": Case(2, 512, 8832, 14, 2, 64, "bfloat16", False),
    "7b_joint": Case(2, 8832, 8832, 28, 4, 128, "bfloat16", True),
    "7b_cross": Case(2, 512, 8832, 28, 4, 128, "bfloat16", False),
    "tower": Case(16, 729, 729, 16, 16, 72, "bfloat16", False),
    "head_dim_80": Case(2, 1000, 3000, 8, 8, 80, "bfloat16", True),
    "0p5b_joint_float32": Case(1, 8832, 8832, 14, 2, 64, "float32", True),
    "7b_joint_float32": Case(1, 8832, 8832, 28, 4, 128, "float32", True),
}


def arguments(case: Case, sharding: NamedSharding) -> tuple[Any, Any, AttentionMask]:
    """Returns the shapes of queries, keys (also used as values) and mask on the topology's first device."""

    def arrays():
        q_ids = jnp.zeros((case.batch, case.queries), jnp.int32)
        kv_ids = jnp.zeros((case.batch, case.keys), jnp.int32)
        q = jnp.zeros((*q_ids.shape, case.heads, case.head_dim), case.dtype)
        kv = jnp.zeros((*kv_ids.shape, case.kv_heads, case.head_dim), case.dtype)
        return q, kv, AttentionMask(q_ids, kv_ids, q_ids, kv_ids, jnp.ones(case.batch, bool), case.causal)

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, jax.eval_shape(arrays))


def forward(q, kv, mask):
    """Returns attention with keys as values."""
    return tpu.attention(q, kv, kv, mask=mask)


def backward(q, kv, mask):
    """Returns gradients of the squared sum of `forward`."""

    def loss(q, kv):
        return jnp.sum(forward(q, kv, mask).astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1))(q, kv)


PROGRAMS: dict[str, Callable[..., Any]] = {"forward": forward, "backward": backward}


def compile_one(program: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Compiles one program; returns the compiler's figures, or its message."""
    start = time.perf_counter()
    try:
        compiled = jax.jit(program).lower(*arguments).compile()
    except Exception as error:  # the message is the result
        return {"compiled": False, "message": str(error)[:2000]}
    memory, text = compiled.memory_analysis(), program_text(compiled)
    collectives = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    return {
        "compiled": True,
        "seconds": round(time.perf_counter() - start, 1),
        "hbm_bytes": memory and memory.temp_size_in_bytes,
        "scoped_vmem_bytes": scoped_memory(text) if text else None,
        "collectives": {name: count for name, count in collectives.items() if count} if text else None,
    }


def program_text(compiled: Any) -> str:
    """Returns the compiled program's text; empty if XLA cannot print it (some asynchronous operations)."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        print(f"no text: {str(error)[:100]}", flush=True)
        return ""


def compile_decoder(mesh: Mesh) -> dict[str, Any]:
    """Compiles the decoder and its gradient with one sample per chip and all parameters on every chip."""
    arch = architecture(load_config(ROOT / "configs" / "llava_ov_0p5b.py"))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("fsdp"))

    def tokens(count: int, *rest: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((mesh.size, count, *rest), dtype, sharding=split)

    layers = {name: x for name, x in abstract_params(arch).items() if name in ("blocks", "tail")}
    layers = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=whole), layers)
    visual, text = (tokens(count, arch.text.hidden_size, dtype=jnp.bfloat16) for count in (VISUAL, TEXT))
    stream = TokenStream(tokens(VISUAL), tokens(VISUAL), tokens(TEXT), tokens(TEXT), tokens(TEXT))
    budget = jax.ShapeDtypeStruct((arch.num_slots,), jnp.bool_, sharding=whole)

    def gradient(layers, visual, text, stream, budget):
        def loss(layers):
            _, out = decoder.forward(layers, visual, text, stream, budget, arch, remat="full")
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss)(layers)

    with jax.set_mesh(mesh):
        return compile_one(gradient, (layers, visual, text, stream, budget))


def scoped_memory(text: str) -> dict[str, int]:
    """Returns the scoped VMEM bytes of each of our kernels, from the text of the compiled program."""
    num_bytes: dict[str, int] = {}
    for line in text.splitlines():
        kernel = re.search(r"attention_(\w+_kernel)", line)
        sizes = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', line)
        if kernel and sizes and "custom-call" in line:
            num_bytes[kernel.group(1)] = sum(int(n) for n in re.findall(r'"size":"(\d+)"', sizes.group(1)))
    return num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--decoder", action="store_true", help="the decoder instead of the kernels alone: minutes each")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    programs: dict[str, Any] = json.loads(args.out.read_text())["programs"] if args.out.exists() else {}
    failed = False
    for topology in args.topologies:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        for name, result in compiled_decoder(devices) if args.decoder else compiled_kernels(devices, args.cases):
            failed |= not result["compiled"]
            programs.setdefault(topology, {})[name] = result
            write(args.out, programs)
            print(topology, name, json.dumps(result), flush=True)
    sys.exit(failed)


def compiled_kernels(devices: Sequence[Any], cases: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and result of each program of these cases on one chip."""
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("one",)), PartitionSpec())
    for name in cases:
        for kind, program in PROGRAMS.items():
            yield f"{name}_{kind}", compile_one(program, arguments(CASES[name], sharding))


def compiled_decoder(devices: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and result of the decoder's gradient on all chips."""
    mesh = Mesh(np.array(devices).reshape(1, -1, 1), ("replica", "fsdp", "tensor"))
    yield "0p5b_decoder_gradient", compile_decoder(mesh)


def write(out: Path, programs: dict[str, Any]) -> None:
    """Writes the whole report; called after every program, so that an interruption loses no finished result."""
    report = {"jax": jax.__version__, "cases": {name: case._asdict() for name, case in CASES.items()}}
    harness.save({**report, "programs": programs}, out)


if __name__ == "__main__":
    main()
