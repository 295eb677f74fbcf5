"""Measures long answers: tokens per second and cache bytes of each budget, compared with the dense plan.

    python benchmarks/generate.py --config configs/llava_ov_0p5b.py --visual 7290
    python benchmarks/generate.py --tiny --visual 9 --lengths 4,40 --repeats 2

Budgets of 0, 1, 2, 4 and 8 slots, and the dense plan of the same shape, decode after the same prompt with random
weights and a cache of random keys and values. The speed at the n-th new token is measured over the next `--steps`
steps, which avoids decoding 8,192 tokens with ten models. Each runs once per round, in random order; results are
medians with quartiles; `over_dense` is the ratio within a round. Cache bytes are reported by the formula of
`visor_jax.cost`, and as allocated, padded to buckets. Out: `benchmarks/results/generate.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, budget_name, by_count
from visor_jax.config import architecture, load_config
from visor_jax.cost import cache_bytes
from visor_jax.data.collate import RowShape
from visor_jax.evaluate.latency import random_prompt
from visor_jax.generate.buckets import cache_bucket, row_bucket
from visor_jax.generate.engine import decode
from visor_jax.model.decoder import unstack_layers
from visor_jax.model.incremental import Cache, prefill_prefix, prefill_rest
from visor_jax.model.layers import Params, in_dtype
from visor_jax.model.visor import init_params
from visor_jax.scale import compiler_options as compiling
from visor_jax.testing import tiny_architecture

RESULT = harness.RESULTS / "generate.json"
SLOTS = (0, 1, 2, 4, 8)  # numbers of slots of the measured budgets
Run = Callable[[int], float]  # number of new tokens -> seconds of one step


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parsed(argv)
    visor = tiny_architecture(4) if args.tiny else architecture(load_config(args.config, []))
    lengths = sorted(int(length) for length in args.lengths.split(","))
    params = unstack_layers(jax.jit(lambda key: in_dtype(init_params(visor, key), args.dtype))(jax.random.key(0)))
    budgets = [bits for bits in by_count(visor.num_slots) if sum(bits) in SLOTS]
    plans: dict[str, tuple[Architecture, Bits]] = {budget_name(bits): (visor, bits) for bits in budgets}
    plans["dense"] = (dataclasses.replace(visor, plan="dense"), ())
    runs = {name: decoding(params, arch, bits, args) for name, (arch, bits) in plans.items()}
    measures = {key(name, length): partial(run, length) for name, run in runs.items() for length in lengths}
    times = harness.interleaved(measures, args.repeats, progress=lambda number: print(f"round {number}", flush=True))
    result = {
        "arguments": harness.arguments_of(args),
        **harness.device_facts(),
        "budgets": {
            name: {str(n): row_of(name, n, times) | bytes_of(arch, bits, n, args) for n in lengths}
            for name, (arch, bits) in plans.items()
        },
    }
    show(result)
    harness.save(result, args.out)
    return result


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--config", help="configuration of the model")
    size.add_argument("--tiny", action="store_true", help="a model of four layers, for a quick check")
    parser.add_argument("--visual", type=int, default=7290, help="visual tokens of the prompt")
    parser.add_argument("--text", type=int, default=60, help="text tokens of the prompt")
    parser.add_argument("--lengths", default="64,1024,8192", help="new tokens at which speed is measured")
    parser.add_argument("--steps", type=int, default=4, help="decoding steps timed at each length")
    parser.add_argument("--rows", type=int, default=1, help="copies of the prompt in a batch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(argv)


# --- measuring --------------------------------------------------------------------------------------------------------


def decoding(params: Params, arch: Architecture, bits: Bits, args: argparse.Namespace) -> Run:
    """Returns a run of one budget's decoding step, compiled as in `generate.engine`."""
    function = partial(decode, bits=bits, arch=arch, forbidden=0)
    step = jax.jit(function, donate_argnums=2, compiler_options=compiling.options(params))
    shapes = cache(partial(cache_shapes, params, arch, bits, args=args))  # traced once per length

    def run(length: int) -> float:
        token = jnp.ones((args.rows,), jnp.int32)
        token, cache = step(params, token, filled(shapes(length), length, args), None, np.int32(1))
        began = time.perf_counter()
        for _ in range(args.steps):
            token, cache = step(params, token, cache, None, np.int32(1))
        jax.block_until_ready(token)
        return (time.perf_counter() - began) / args.steps

    return run


def buckets(length: int, args: argparse.Namespace) -> tuple[RowShape, int]:
    """Returns the prompt's bucket, and the cache's capacity for text tokens at the `length`-th new token."""
    row_shape = row_bucket(RowShape(1, args.visual, args.text))
    return row_shape, cache_bucket(max(args.text + length + args.steps, row_shape.text + 1))


def cache_shapes(params: Params, arch: Architecture, bits: Bits, length: int, args: argparse.Namespace) -> Cache:
    """Returns the shapes of the cache after a prefill, with capacity for the `length`-th new token."""
    row_shape, capacity = buckets(length, args)
    tokens, batch = random_prompt(arch, row_shape.visual, row_shape.text, params["embed_tokens"]["embedding"].dtype)
    tokens, batch = jax.tree.map(lambda x: jnp.repeat(x, args.rows, axis=0), (tokens, batch))

    def prefill(params, tokens, batch):
        prefix, _ = prefill_prefix(params, tokens, batch, 1, arch, routed=False)
        return prefill_rest(params, prefix, batch, bits, capacity, arch)[1]

    return jax.eval_shape(prefill, params, tokens, batch)


def filled(shapes: Cache, length: int, args: argparse.Namespace) -> Cache:
    """Returns a cache of random keys and values in its state before the `length`-th new token."""
    layers, cross = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype), shapes[:2])
    visual_segments = (jnp.arange(shapes.visual_segments.shape[1]) < args.visual).astype(jnp.int32)
    tokens = jnp.full((args.rows,), args.text + length - 1, jnp.int32)
    cache = Cache(layers, cross, jnp.tile(visual_segments, (args.rows, 1)), tokens, tokens + args.visual)
    return jax.block_until_ready(cache)


def key(name: str, length: int) -> str:
    """Returns the name of the contender that measures one plan at one length."""
    return f"{name}|{length}"


# --- report -----------------------------------------------------------------------------------------------------------


def row_of(name: str, length: int, times: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the figures of one budget at one length over the rounds."""
    seconds, dense = times[key(name, length)], times[key("dense", length)]
    return {"tokens_per_second": spread(1 / seconds), "over_dense": spread(dense / seconds)}


def spread(values: np.ndarray) -> dict[str, float]:
    """Returns median and quartiles."""
    low, median, high = harness.quartiles(values)
    return {"q1": low, "median": median, "q3": high}


def bytes_of(arch: Architecture, bits: Bits, length: int, args: argparse.Namespace) -> dict[str, int]:
    """Returns the cache bytes of one sample after `length` new tokens: by formula, and as allocated."""
    itemsize, tokens = np.dtype(args.dtype).itemsize, args.text + length - 1  # the last token is not fed back
    row_shape, capacity = buckets(length, args)
    return {
        "cache_bytes": cache_bytes(arch, bits, args.visual, tokens, itemsize),
        "held_bytes": cache_bytes(arch, bits, row_shape.visual, capacity, itemsize),
    }


def show(result: dict[str, Any]) -> None:
    """Prints one line per budget and length."""
    for name, lengths in result["budgets"].items():
        for length, row in lengths.items():
            speed, ratio = row["tokens_per_second"]["median"], row["over_dense"]["median"]
            print(f"{name:<12} {length:>5} tokens: {speed:9.1f} per second, {ratio:5.2f}x dense", end="; ")
            print(f"cache {row['cache_bytes']:,} bytes, {row['held_bytes']:,} allocated")


if __name__ == "__main__":
    main()
