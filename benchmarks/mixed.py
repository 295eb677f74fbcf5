"""Times mixed batches, in which only some samples have a slot on, for each method of skipping the others.

    python benchmarks/mixed.py [--config configs/llava_ov_0p5b.py] [--rows 8] [--visual 729] [--repeats 7]

One self-attention slot of the configured decoder (random weights) runs forward and backward over a batch in which 0 to
all samples have it on. Methods: `masked`, all rows go through the layer and kernels skip rows that are off;
`compacted`, rows that are on are sorted to the front (as in the model); `recomputed`, the same with `train.remat`;
`grouped`, the host makes one batch per budget; `any`, all rows are computed if any is on. All methods run in every
round; seconds are medians, `over_grouped` has the quartiles of the ratio within a round; `temporary_bytes` is the
memory of a method's program without arguments and results. Out: `benchmarks/results/mixed_PLATFORM.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.config import architecture, load_config
from visor_jax.kernels.attention import AttentionMask, api
from visor_jax.model.decoder import select_layer
from visor_jax.model.mixed import mixed_self_attention
from visor_jax.model.stream import TokenStream, with_order
from visor_jax.model.super_block import joint_layer, text_layer
from visor_jax.testing import random_params, tiny_architecture

ROOT = Path(__file__).resolve().parent.parent
Slot = Callable[..., tuple[jax.Array, jax.Array]]


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    arch = tiny_architecture(3) if args.tiny else one_block(architecture(load_config(args.config, [])))
    params = select_layer(random_params(arch)["blocks"], 0)["self"]
    params = jax.tree.map(lambda x: x.astype(args.dtype), params)
    inputs = random_inputs(arch, args.rows, args.visual, args.text, args.dtype)
    compiled, rows = programs(arch), {}
    for count in sorted({round(args.rows * share) for share in (0, 0.125, 0.25, 0.5, 0.75, 1)}):
        on = np.random.default_rng(0).permutation(np.arange(args.rows) < count)
        rows[str(count)] = measured(compiled, params, inputs, on, args.repeats)
        print(f"{count} of {args.rows} on:", {name: round(row["seconds"], 4) for name, row in rows[str(count)].items()})
    all_on = (params, *inputs, jnp.ones(args.rows, bool))
    memory = {name: program.lower(*all_on).compile().memory_analysis() for name, program in compiled.items()}
    sizes = {name: analysis and analysis.temp_size_in_bytes for name, analysis in memory.items()}
    device = jax.devices()[0]
    arguments = harness.arguments_of(args)
    arguments["config"] = os.path.relpath(args.config, ROOT)
    result = {"arguments": arguments, **harness.device_facts(), "attention": chosen(arch, args)}
    result["temporary_bytes"] = sizes
    harness.save({**result, "samples_on": rows}, args.out or harness.RESULTS / f"mixed_{device.platform}.json")


def chosen(arch: Architecture, args: argparse.Namespace) -> str:
    """Returns the implementation of attention that the joint layer uses; "xla" skips no rows."""
    names: list[str] = []

    def choose() -> None:
        ids = jnp.zeros((args.rows, args.visual + args.text), jnp.int32)
        heads = arch.text.num_heads, arch.text.num_kv_heads
        q, k = (jnp.zeros((*ids.shape, count, arch.text.head_dim), args.dtype) for count in heads)
        names.append(api.choose(q, k, AttentionMask(ids, ids, ids, ids)))

    jax.eval_shape(choose)
    return names[0]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default=str(ROOT / "configs" / "llava_ov_0p5b.py"), help="configuration of the model"
    )
    parser.add_argument("--tiny", action="store_true", help="a very small layer, for a quick check")
    parser.add_argument("--rows", type=int, default=8, help="samples in the batch")
    parser.add_argument("--visual", type=int, default=729, help="visual tokens of each")
    parser.add_argument("--text", type=int, default=64, help="text tokens of each")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def one_block(arch: Architecture) -> Architecture:
    """Returns the architecture with one super-block and a small vocabulary."""
    return dataclasses.replace(arch, text=dataclasses.replace(arch.text, num_layers=len(arch.pattern), vocab_size=512))


def random_inputs(arch: Architecture, rows: int, visual: int, text: int, dtype: str) -> tuple[Any, ...]:
    """Returns V [rows, visual, D], T [rows, text, D] and their stream, sorted by position as in `forward`."""
    keys, size = jax.random.split(jax.random.key(1)), arch.text.hidden_size
    v, t = (jax.random.normal(k, (rows, n, size), dtype) for k, n in zip(keys, (visual, text), strict=True))
    positions = jnp.tile(jnp.arange(visual + text), (rows, 1))
    ones = jnp.ones_like(positions)
    stream = TokenStream(
        positions[:, :visual], ones[:, :visual], positions[:, visual:], ones[:, visual:], ones[:, visual:]
    )
    return v, t, with_order(stream)


def with_gradients(slot: Slot) -> Any:
    """Returns a function (params, V, T, stream, on) -> gradients of the outputs' sum of squares by params, V and T."""

    def loss(params, visual, text, stream, on):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in slot(params, visual, text, on, stream))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def programs(arch: Architecture) -> dict[str, Any]:
    """Returns programs of the slot with its gradients: all rows on, all off, and the methods of `measured`."""

    def joint(params, visual, text, on, stream):
        return joint_layer(params, visual, text, stream, arch)[:2]

    def alone(params, visual, text, on, stream):
        return visual, text_layer(params, text, stream, arch.text)[0]

    def masked(params, visual, text, on, stream):
        return joint_layer(params, visual, text, stream, arch, on)[:2]

    def compacted(params, visual, text, on, stream):
        return mixed_self_attention(params, visual, text, on, stream, arch)

    def recomputed(params, visual, text, on, stream):
        return mixed_self_attention(params, visual, text, on, stream, arch, remat="full")

    return {slot.__name__: with_gradients(slot) for slot in (joint, alone, masked, compacted, recomputed)}


def measured(
    compiled: Mapping[str, Any], params: Any, inputs: tuple[Any, ...], on: np.ndarray, repeats: int
) -> dict[str, Any]:
    """Returns method -> median seconds, and quartiles of the ratio of its time to that of `grouped` by round."""
    whole = (params, *inputs, jnp.asarray(on))
    parts = [
        partial(compiled[name], params, *jax.tree.map(lambda x, rows=rows: x[rows], inputs), None)
        for name, rows in (("joint", on), ("alone", ~on))
        if rows.any()
    ]
    runs = {
        "masked": partial(compiled["masked"], *whole),
        "compacted": partial(compiled["compacted"], *whole),
        "recomputed": partial(compiled["recomputed"], *whole),
        "grouped": lambda: [part() for part in parts],
        "any": partial(compiled["joint" if on.any() else "alone"], params, *inputs, None),
    }
    times = harness.interleaved({name: harness.timed(run) for name, run in runs.items()}, repeats)
    return {
        name: {"seconds": harness.quartiles(seconds)[1], "over_grouped": harness.quartiles(seconds / times["grouped"])}
        for name, seconds in times.items()
    }


if __name__ == "__main__":
    main()
