"""Times every implementation of attention that the platform supports, at the models' shapes.

    python benchmarks/attention.py [--platform=cpu|gpu] [--repeats 15] [--shrink 1]

On the CPU, float32, forward and with gradients: text over 7,290 visual keys, the last queries of the joint stream, and
the whole stream. The contenders are the plain reference (forward only for the whole stream, whose logits take 3 GB),
the chunked loop, and torch's SDPA if torch is installed. A decoding step is timed over full and ragged caches. The goal
is at least 2.5 times the reference's speed. On a GPU, bfloat16 at the shapes of the 0.5B and 7B models: our kernels,
cuDNN, tokamax if it is installed, and the loops, in TFLOP/s; and the time of our kernels by the share of samples whose
slot is off.

All contenders run once per round, so that a change of load affects them equally. Results are medians with quartiles,
and ratios to the first contender of the same round. `--shrink N` divides all lengths, for a quick check. Out:
`benchmarks/results/attention_PLATFORM.json` (or `--out`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
from harness import Run
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from visor_jax.kernels.attention import AttentionMask, api

SHARES_OFF = (0.0, 0.25, 0.5, 0.75)


class Shape(NamedTuple):
    """Shapes of one case; `held`: the shares of the keys that samples use, in turn, as in a partly filled cache."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    held: tuple[float, ...] = (1.0,)

    @property
    def flops(self) -> float:
        """Returns the FLOPs of the forward pass; queries are the last tokens of the stream."""
        keys_per_query = self.keys - (self.queries - 1) / 2 if self.causal else self.keys
        logits = self.heads * self.queries * keys_per_query * sum(self.filled_by_sample())
        return 4 * logits * self.head_dim

    def filled_by_sample(self) -> list[float]:
        """Returns the share of used keys of each sample."""
        return [self.held[sample % len(self.held)] for sample in range(self.batch)]

    @property
    def logits_bytes(self) -> float:
        """Returns the bytes of the logits of all heads in float32."""
        return 4.0 * self.batch * self.heads * self.queries * self.keys

    def shrunk(self, by: int) -> Shape:
        """Returns the shape with lengths divided by `by`, even and at least 2; a single query stays one."""
        queries, keys = (max(length // by, 2) // 2 * 2 if length > 1 else 1 for length in (self.queries, self.keys))
        return self._replace(queries=queries, keys=keys)


RAGGED = (1.0, 0.5, 0.1, 0.02)
CPU_SHAPES = {
    "text over visual keys": Shape(1, 100, 7290, 14, 2, 64, False),
    "1,024 queries of the stream": Shape(1, 1024, 7290, 14, 2, 64, True),
    "the whole stream": Shape(1, 7290, 7290, 14, 2, 64, True),
    "one query over a cache": Shape(1, 1, 8832, 14, 2, 64, True),
    "one query over four ragged caches": Shape(4, 1, 8832, 14, 2, 64, True, RAGGED),
}
GPU_SHAPES = {
    "0.5B joint": Shape(8, 8832, 8832, 14, 2, 64, True),
    "0.5B cross": Shape(8, 512, 8832, 14, 2, 64, False),
    "7B joint": Shape(4, 8832, 8832, 28, 4, 128, True),
    "7B cross": Shape(4, 512, 8832, 28, 4, 128, False),
    "0.5B decoding": Shape(16, 1, 8832, 14, 2, 64, True),
    "0.5B decoding, ragged": Shape(16, 1, 8832, 14, 2, 64, True, RAGGED),
    "7B decoding": Shape(16, 1, 8832, 28, 4, 128, True),
    "7B decoding, ragged": Shape(16, 1, 8832, 28, 4, 128, True, RAGGED),
}
CONTENDERS = {
    "cpu": ("xla", "xla_chunked", "xla_decode", "torch"),
    "gpu": ("pallas_gpu", "cudnn", "tokamax", "xla_chunked", "xla_decode", "xla"),
}
LANES, MAX_BLOCK = 128, 512  # of splash: the unit of its lengths, and the longest block
MEMORY = 12e9  # bytes that the plain reference may use


# --- contenders -------------------------------------------------------------------------------------------------------


def arrays_of(shape: Shape, dtype: Any, off: float = 0.0) -> tuple[tuple[jax.Array, ...], AttentionMask]:
    """Returns random q, k, v, and a mask. Queries are the last tokens; a share `off` of the samples is inactive."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (shape.batch, shape.queries, shape.heads, shape.head_dim), dtype)
    k, v = (jax.random.normal(x, (shape.batch, shape.keys, shape.kv_heads, shape.head_dim), dtype) for x in keys[1:])
    kv_positions = jnp.tile(jnp.arange(shape.keys), (shape.batch, 1))
    q_positions = shape.keys - shape.queries + jnp.tile(jnp.arange(shape.queries), (shape.batch, 1))
    active = jnp.arange(shape.batch) >= round(off * shape.batch)
    filled = kv_positions < shape.keys * jnp.array(shape.filled_by_sample())[:, None]
    segments = jnp.ones_like(q_positions), filled.astype(jnp.int32)
    return (q, k, v), AttentionMask(q_positions, kv_positions, *segments, active, shape.causal)


def jax_run(name: api.Implementation, shape: Shape, dtype: Any, *, gradients: bool, off: float = 0.0) -> Run:
    """Returns a compiled call of an implementation; raises ValueError if it does not support the shape."""
    arrays, mask = arrays_of(shape, dtype, off)
    compiled = jax.jit(program(name, shape, gradients=gradients)).lower(*arrays, mask).compile()
    return lambda: jax.block_until_ready(compiled(*arrays, mask))


def program(name: api.Implementation, shape: Shape, *, gradients: bool) -> Callable[..., Any]:
    """Returns a function (q, k, v, mask) -> attention, or the gradients of its squares' sum."""

    def forward(q, k, v, mask):
        if name == "splash" and shape.causal:
            return splash_causal(q, k, v)
        return api.attention(q, k, v, mask=mask, implementation=name)

    def loss(q, k, v, mask):
        return jnp.sum(forward(q, k, v, mask).astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2)) if gradients else forward


def splash_causal(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Splash with a causal mask that is fixed ahead, for queries that are the last tokens of the stream.

    The model cannot call it, because its positions and segments are known at run time only; as a baseline it has less
    to do than our kernels. Lengths are padded to multiples of 128, head sizes too.
    """
    queries, keys, heads, size = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    lengths = [-(-length // LANES) * LANES for length in (queries, keys)]
    rows, columns = (max(b for b in range(LANES, MAX_BLOCK + 1, LANES) if not length % b) for length in lengths)
    mask = splash_mask.CausalMask((lengths[0], lengths[1]), offset=keys - queries)
    kernel = splash_kernel.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([mask] * heads),
        interpret=interpret,
        block_sizes=splash_kernel.BlockSizes(
            block_q=rows, block_kv=columns, block_kv_compute=columns,
            block_q_dkv=rows, block_kv_dkv=columns, block_kv_dkv_compute=columns, block_q_dq=rows, block_kv_dq=columns,
        ),
    )  # fmt: skip

    def heads_first(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, -size % LANES))).swapaxes(1, 2)

    q = (q.astype(jnp.float32) * size**-0.5).astype(q.dtype)
    out: Any = jax.vmap(kernel)(heads_first(q, lengths[0]), heads_first(k, lengths[1]), heads_first(v, lengths[1]))
    return out.swapaxes(1, 2)[:, :queries, :, :size]


def torch_run(shape: Shape, *, gradients: bool) -> Run:
    """Returns a call of torch's scaled dot-product attention in float32 on the CPU, whose idle threads do not spin."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    import torch

    (q, k, v), mask = arrays_of(shape, jnp.float32)
    q, k, v = (torch.tensor(np.asarray(x)).transpose(1, 2) for x in (q, k, v))
    whole = shape.causal and shape.queries == shape.keys  # fastest in torch; requires aligned first query and key
    allowed = torch.tensor(np.asarray(mask.as_array()))[:, None] if shape.causal and not whole else None

    def forward(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=whole, enable_gqa=True
        )

    def both():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        (forward(*leaves) ** 2).sum().backward()

    return both if gradients else lambda: forward(q, k, v)


def contenders(platform: str, shape: Shape, *, gradients: bool) -> tuple[dict[str, Run], dict[str, str]]:
    """Returns the contenders that run, and for each other one the reason why it does not."""
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}
    for name in CONTENDERS[platform]:
        if name == "torch":
            if importlib.util.find_spec("torch") is None:
                absent[name] = "torch is not installed"
            else:
                runs[name] = torch_run(shape, gradients=gradients)
            continue
        if name == "xla" and shape.logits_bytes * (5 if gradients else 2) > MEMORY:
            absent[name] = f"its logits take {shape.logits_bytes / 1e9:.0f} GB, several times over"
            continue
        try:
            runs[name] = jax_run(name, shape, dtype, gradients=gradients)
        except ValueError as reason:
            absent[name] = str(reason)
    return runs, absent


# --- measuring --------------------------------------------------------------------------------------------------------


def interleaved(runs: dict[str, Run], repeats: int) -> dict[str, np.ndarray]:
    """Returns the seconds of every contender in every round; of two consecutive runs, the second counts."""
    return harness.interleaved({name: harness.timed(run, settle=True) for name, run in runs.items()}, repeats)


def spread(values: np.ndarray) -> dict[str, float]:
    """Returns median and quartiles."""
    low, middle, high = harness.quartiles(values)
    return {"median": middle, "low": low, "high": high}


def summary(seconds: dict[str, np.ndarray], flops: float) -> dict[str, Any]:
    """Returns per contender seconds, TFLOP/s at the median, and the ratio of the first contender's time to its time."""
    first = next(iter(seconds.values()))
    return {
        name: {
            "seconds": spread(values),
            "tflops_per_second": flops / float(np.median(values)) / 1e12,
            "speed": spread(first / values),
        }
        for name, values in seconds.items()
    }


def measure(platform: str, shapes: dict[str, Shape], repeats: int) -> dict[str, Any]:
    """Times all contenders at all shapes; returns the report's `cases`."""
    cases: dict[str, Any] = {}
    for name, shape in shapes.items():
        for kind, work in (("forward", 1.0), ("forward and backward", 3.5)):
            if shape.queries == 1 and work > 1:  # a decoding step has no backward pass
                continue
            runs, absent = contenders(platform, shape, gradients=kind != "forward")
            results = summary(interleaved(runs, repeats), work * shape.flops)
            cases[f"{name}, {kind}"] = {"shape": shape._asdict(), "results": results, "absent": absent}
            print(f"{name}, {kind}:", json.dumps({x: y["speed"]["median"] for x, y in results.items()}), flush=True)
    return cases


def measure_shares(shapes: dict[str, Shape], repeats: int) -> dict[str, Any]:
    """Times our kernel, forward and backward, by the share of samples that are off; speed is relative to none off."""
    report: dict[str, Any] = {}
    for name, shape in shapes.items():
        runs = {str(off): jax_run("pallas_gpu", shape, jnp.bfloat16, gradients=True, off=off) for off in SHARES_OFF}
        report[name] = summary(interleaved(runs, repeats), 3.5 * shape.flops)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if jax.default_backend() != args.platform:
        parser.error(f"--platform={args.platform}, but JAX computes on {jax.default_backend()}")
    shapes = CPU_SHAPES if args.platform == "cpu" else GPU_SHAPES
    shapes = {name: shape.shrunk(args.shrink) for name, shape in shapes.items()}
    report: dict[str, Any] = {"platform": args.platform, **harness.device_facts()}
    report |= {"repeats": args.repeats, "shrink": args.shrink, "cases": measure(args.platform, shapes, args.repeats)}
    if args.platform == "gpu":
        joint = {name: shape for name, shape in shapes.items() if shape.causal}
        report["shares_off"] = measure_shares(joint, args.repeats)
    harness.save(report, args.out or harness.RESULTS / f"attention_{args.platform}.json")


if __name__ == "__main__":
    main()
