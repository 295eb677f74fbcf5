"""Times mixed batches, in which only some samples have a slot on, for each way of skipping the others.

    python benchmarks/mixed.py [--config configs/llava_ov_0p5b.py] [--rows 8] [--visual 729] [--repeats 7]

One self-attention slot of the configured decoder (layer weights random), forward and backward, over a batch in which 0
to all samples have it on. Ways: `masked`, all rows go through the layer and kernels skip rows that are off;
`compacted`, rows that are on are sorted to the front (the model's way); `recomputed`, the same with `train.remat`;
`grouped`, the host makes one batch per budget; `any`, all rows are computed if any is on. All ways run in every round;
seconds are medians, `over_grouped` is the ratio within a round with quartiles; `temporary_bytes` is the memory that a
way's program needs besides arguments and results. Out: `benchmarks/results/mixed_PLATFORM.json`.
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
    made, rows = programs(arch), {}
    for count in sorted({round(args.rows * share) for share in (0, 0.125, 0.25, 0.5, 0.75, 1)}):
        on = np.random.default_rng(0).permutation(np.arange(args.rows) < count)
        rows[str(count)] = measured(made, params, inputs, on, args.repeats)
        print(f"{count} of {args.rows} on:", {name: round(row["seconds"], 4) for name, row in rows[str(count)].items()})
    everywhere = (params, *inputs, jnp.ones(args.rows, bool))
    memory = {name: made[name].lower(*everywhere).compile().memory_analysis() for name in made}
    sizes = {name: found and found.temp_size_in_bytes for name, found in memory.items()}
    device = jax.devices()[0]
    given = harness.arguments_of(args)
    given["config"] = os.path.relpath(args.config, ROOT)
    result = {"arguments": given, **harness.device_facts(), "attention": chosen(arch, args)}
    result["temporary_bytes"] = sizes
    harness.save({**result, "samples_on": rows}, args.out or harness.RESULTS / f"mixed_{device.platform}.json")


def chosen(arch: Architecture, args: argparse.Namespace) -> str:
    """Returns the implementation of attention that the joint layer uses; a plain "xla" skips nothing."""
    found: list[str] = []

    def ask() -> None:
        ids = jnp.zeros((args.rows, args.visual + args.text), jnp.int32)
        heads = arch.text.num_heads, arch.text.num_kv_heads
        q, k = (jnp.zeros((*ids.shape, count, arch.text.head_dim), args.dtype) for count in heads)
        found.append(api.choose(q, k, AttentionMask(ids, ids, ids, ids)))

    jax.eval_shape(ask)
    return found[0]


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
    return dataclasses.replace(arch, text=dataclasses.replace(arch.text, num_layers=3, vocab_size=512))


def random_inputs(arch: Architecture, rows: int, visual: int, text: int, dtype: str) -> tuple[Any, ...]:
    """V [rows, visual, D], T [rows, text, D] and their stream, in order of position as in `forward`."""
    keys, size = jax.random.split(jax.random.key(1)), arch.text.hidden_size
    v, t = (jax.random.normal(k, (rows, n, size), dtype) for k, n in zip(keys, (visual, text), strict=True))
    positions = jnp.tile(jnp.arange(visual + text), (rows, 1))
    ones = jnp.ones_like(positions)
    stream = TokenStream(
        positions[:, :visual], ones[:, :visual], positions[:, visual:], ones[:, visual:], ones[:, visual:]
    )
    return v, t, with_order(stream)


def with_gradients(slot: Slot) -> Any:
    """Returns (params, V, T, stream, on) -> gradients of the outputs' sum of squares by parameters, V and T."""

    def loss(params, visual, text, stream, on):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in slot(params, visual, text, on, stream))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def programs(arch: Architecture) -> dict[str, Any]:
    """Returns the slot with its gradients, for all rows, no rows, some rows by masks, and some rows by compaction."""

    def joint(params, visual, text, on, stream):
        return joint_layer(params, visual, text, stream, arch)[:2]

    def alone(params, visual, text, on, stream):
        return visual, text_layer(params, text, stream, arch.text)[0]

    def masked(params, visual, text, on, stream):
        return joint_layer(params, visual, text, stream, arch, on)[:2]

    def compacted(params, visual, text, on, stream):
        return mixed_self_attention(params, visual, text, on, stream, arch)

    def recomputed(params, visual, text, on, stream):
        return mixed_self_attention(params, visual, text, on, stream, arch, remat=True)

    return {slot.__name__: with_gradients(slot) for slot in (joint, alone, masked, compacted, recomputed)}


def measured(
    made: Mapping[str, Any], params: Any, inputs: tuple[Any, ...], on: np.ndarray, repeats: int
) -> dict[str, Any]:
    """Returns way -> median seconds, and the quartiles of its time over that of `grouped` in the same round."""
    whole = (params, *inputs, jnp.asarray(on))
    parts = [
        partial(made[name], params, *jax.tree.map(lambda x, rows=rows: x[rows], inputs), None)
        for name, rows in (("joint", on), ("alone", ~on))
        if rows.any()
    ]
    ways = {
        "masked": partial(made["masked"], *whole),
        "compacted": partial(made["compacted"], *whole),
        "recomputed": partial(made["recomputed"], *whole),
        "grouped": lambda: [part() for part in parts],
        "any": partial(made["joint" if on.any() else "alone"], params, *inputs, None),
    }
    times = harness.interleaved({name: harness.timed(run) for name, run in ways.items()}, repeats)
    return {
        name: {"seconds": harness.quartiles(own)[1], "over_grouped": harness.quartiles(own / times["grouped"])}
        for name, own in times.items()
    }


if __name__ == "__main__":
    main()
