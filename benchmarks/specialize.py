"""Compares the decoder that takes the budget as an input with programs specialized to one budget.

    python benchmarks/specialize.py --config configs/llava_ov_0p5b.py --visual 2929 --dtype bfloat16
    python benchmarks/specialize.py --tiny

Measures every budget of a model with up to four slots, otherwise one of each number of slots (`--every`: all). Both
programs run in every round, so that a change of load affects both equally; the specialized one has unstacked layers, as
in generation. Reported are the quartiles over rounds of the ratio of their times, the overhead, and the largest
difference of their outputs. Out: `benchmarks/results/specialize.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, all_subsets, budget_name, by_count
from visor_jax.config import architecture, load_config
from visor_jax.model.decoder import forward, specialize, unstack_layers
from visor_jax.model.stream import TokenStream
from visor_jax.scale import compiler_options as compiling
from visor_jax.testing import random_params, tiny_architecture

RESULT = harness.RESULTS / "specialize.json"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parsed(argv)
    traced: list[str] = []
    result: dict[str, Any] = {
        "arguments": harness.arguments_of(args),
        **harness.device_facts(),
        "budgets": dict(rows(args, traced)),
    }
    result["dynamic_programs_compiled"] = len(traced)
    harness.save(result, args.out)
    return result


def rows(args: argparse.Namespace, traced: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the figures of each budget as soon as it is measured.

    Args:
      traced: grows by one per compilation of the program that takes the budget as an input.
    """
    arch = tiny_architecture(4) if args.tiny else architecture(load_config(args.config, []))
    params = random_params(arch)
    layers = {name: params[name] for name in ("blocks", "tail") if name in params}
    layers = jax.tree.map(lambda x: jnp.asarray(x, args.dtype), layers)
    inputs, unstacked = random_inputs(arch, args.visual, args.text, args.dtype), unstack_layers(layers)
    options = compiling.options(params)

    def any_budget(layers, v, t, stream, on):
        if traced is not None:
            traced.append("decode")  # runs only during tracing
        return forward(layers, v, t, stream, on, arch)

    dynamic = partial(jax.jit(any_budget, compiler_options=options), layers)
    for bits in chosen(arch, args.every, args.slots):
        special = partial(jax.jit(specialize(bits, arch), compiler_options=options), unstacked)
        row = compared(dynamic, special, inputs, bits, args.repeats)
        low, middle, high = row["overhead_quartiles"]
        print(f"{budget_name(bits):<12} dynamic / specialized {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)
        yield budget_name(bits), row


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--config", help="configuration of the model")
    size.add_argument("--tiny", action="store_true", help="a model of four layers, for a quick check")
    parser.add_argument("--visual", type=int, default=64, help="visual tokens")
    parser.add_argument("--text", type=int, default=64, help="text tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--every", action="store_true", help="every subset of the slots")
    parser.add_argument("--slots", type=int, nargs="+", help="only one budget of each of these numbers of slots")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(argv)


def chosen(arch: Architecture, every: bool, counts: Sequence[int] | None = None) -> list[Bits]:
    """Returns the budgets to measure, cheapest first; with `counts` one of each of these numbers of slots."""
    if counts is not None:
        return [by_count(arch.num_slots)[count] for count in counts]
    return all_subsets(arch.num_slots) if every or arch.num_slots <= 4 else by_count(arch.num_slots)


def random_inputs(arch: Architecture, visual: int, text: int, dtype: str) -> tuple[jax.Array, jax.Array, TokenStream]:
    """Returns one sample: V [1, visual, D] and T [1, text, D]."""
    keys, size = jax.random.split(jax.random.key(1)), arch.text.hidden_size
    v, t = (jax.random.normal(k, (1, n, size), dtype) for k, n in zip(keys, (visual, text), strict=True))
    positions, ones = jnp.arange(visual + text)[None], jnp.ones((1, visual + text), jnp.int32)
    stream = TokenStream(
        positions[:, :visual], ones[:, :visual], positions[:, visual:], ones[:, visual:], ones[:, visual:]
    )
    return v, t, stream


def compared(
    dynamic: Callable[..., Any], special: Callable[..., Any], inputs: tuple[Any, ...], bits: Bits, repeats: int
) -> dict[str, Any]:
    """Returns both programs' seconds under one budget, the ratio per round, and the largest output difference."""
    runs = {"dynamic": lambda: dynamic(*inputs, jnp.asarray(bits, bool)), "specialized": lambda: special(*inputs)}
    outputs = [jax.block_until_ready(run()) for run in runs.values()]
    difference = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*outputs, strict=True))
    times = harness.interleaved({name: harness.timed(run) for name, run in runs.items()}, repeats)
    return {
        "dynamic_seconds_quartiles": harness.quartiles(times["dynamic"]),
        "specialized_seconds_quartiles": harness.quartiles(times["specialized"]),
        "overhead_quartiles": harness.quartiles(times["dynamic"] / times["specialized"]),
        "max_difference": difference,
    }


if __name__ == "__main__":
    main()
