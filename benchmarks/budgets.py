"""Times one training step and one forward pass by the number of slots that are on.

    python benchmarks/budgets.py [--layers 24] [--visual 512] [--repeats 15]

Each is one compiled program; the times show the cost of a slot that is off. All budgets run in every round, so that a
change of load affects them equally; results are quartiles of the ratio to the empty budget of the same round. Out:
`benchmarks/results/budgets.json` (or `--out`).
"""

from __future__ import annotations

import argparse
from collections import Counter
from functools import partial
from pathlib import Path

import harness
import jax
import jax.numpy as jnp

from visor_jax.architecture import (
    Architecture,
    CrossAttentionArchitecture,
    PolicyArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.budget import by_count
from visor_jax.model.decoder import forward
from visor_jax.model.stream import TokenStream
from visor_jax.model.visor import init_params

RESULT = harness.RESULTS / "budgets.json"


def small(num_layers: int) -> Architecture:
    """Returns an architecture of small widths with `num_layers` layers."""
    return Architecture(
        text=TextArchitecture(512, 128, 384, num_layers, 4, 4, 32),
        vision=VisionArchitecture(32, 8, 64, 128, 1, 4),
        cross=CrossAttentionArchitecture(4),
        policy=PolicyArchitecture(32),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--visual", type=int, default=512)
    parser.add_argument("--text", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    arch = small(args.layers)
    params = init_params(arch, jax.random.key(0))
    key = jax.random.key(1)
    visual = jax.random.normal(key, (1, args.visual, arch.text.hidden_size))
    text = jax.random.normal(key, (1, args.text, arch.text.hidden_size))
    ones = partial(jnp.ones, dtype=jnp.int32)
    stream = TokenStream(
        jnp.arange(args.visual)[None],
        ones((1, args.visual)),
        args.visual + jnp.arange(args.text)[None],
        ones((1, args.text)),
        ones((1, args.text)),
    )

    def loss(params, budget):
        _, out = forward(params, visual, text, stream, budget, arch)
        return jnp.mean(out**2)

    traced: Counter[str] = Counter()

    def program_of(name: str, function):
        def counted(params, budget):
            traced[name] += 1  # runs only during tracing: once per compiled program
            return function(params, budget)

        return jax.jit(counted)

    programs = {"forward": program_of("forward", loss), "gradient": program_of("gradient", jax.grad(loss))}
    counts = range(arch.num_slots + 1)
    budgets = [jnp.asarray(bits, bool) for bits in by_count(arch.num_slots)]
    result: dict = {
        "arguments": harness.arguments_of(args),
        "platform": jax.devices()[0].platform,
        "ratios_to_empty": {},
    }
    for name, program in programs.items():
        runs = {str(count): harness.timed(partial(program, params, budgets[count])) for count in counts}
        times = harness.interleaved(runs, args.repeats)
        compiled = traced[name]
        quartiles = [harness.quartiles(times[count] / times["0"]) for count in runs]
        result["ratios_to_empty"][name] = {
            "slots": list(counts),
            "programs_compiled": compiled,
            "quartiles": quartiles,
        }
        print(
            f"{name}: {compiled} program; time / empty by slots on:",
            ", ".join(f"{count}: {middle:.2f}" for count, (_, middle, _) in zip(counts, quartiles, strict=True)),
        )
    harness.save(result, args.out)


if __name__ == "__main__":
    main()
