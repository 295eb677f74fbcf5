"""Measure the prefill time of a prompt under every budget, on this machine.

With a workdir, the budgets are the model's viable ones; with only a configuration, weights are random and the budgets
have zero, one, two, four, ... slots on. Every budget has its own compiled program; each round runs all of them in
random order. Seconds are quartiles over `--rounds` and exclude the vision tower.

    visor bench --config=configs/llava_ov_0p5b.py --visual=1485 --json
"""

from __future__ import annotations

import argparse
from typing import Any

from visor_jax.config import Config

HELP = "measure the prefill time of every budget"
CONFIG = "workdir"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--visual", type=int, default=0, help="visual tokens; default: the configured row shape")
    parser.add_argument("--text", type=int, default=60, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=9)


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Times the prefill; returns quartiles of seconds and GFLOP by budget."""
    import jax

    from visor_jax.budget import by_count
    from visor_jax.config import architecture, from_dict
    from visor_jax.errors import RequestError
    from visor_jax.evaluate.configured import configured
    from visor_jax.evaluate.latency import compare_budgets
    from visor_jax.loading import load
    from visor_jax.model.visor import init_params
    from visor_jax.workdir.folder import Workdir

    for name in ("text", "rounds"):
        if getattr(args, name) < 1:
            raise RequestError(f"--{name}={getattr(args, name)}: expected at least 1")
    if args.visual < 0:
        raise RequestError(f"--visual={args.visual}: expected at least 1, or 0 for the configured row shape")
    if args.workdir:
        model = configured(load(args.workdir), from_dict(Workdir(args.workdir).config()), config)
        params, arch, budgets = model.params, model.arch, model.viable_budgets
    else:
        arch = architecture(config)
        params = jax.jit(lambda key: init_params(arch, key))(jax.random.key(0))
        counts = [0, *(2**power for power in range(arch.num_slots.bit_length())), arch.num_slots]
        budgets = [by_count(arch.num_slots)[count] for count in dict.fromkeys(counts)]
    visual = args.visual or config.data.visual_length
    rows = compare_budgets(params, arch, budgets, visual=visual, text=args.text, rounds=args.rounds)
    device = jax.devices()[0].device_kind
    print(f"prefill of {visual} visual and {args.text} text tokens on {device}, {args.rounds} rounds:")
    for name, row in rows.items():
        low, middle, high = row["seconds"]
        cost = f"{row['times_faster'][1]:6.2f}x  {row['decoder_gflops']:.3f} GFLOP"
        print(f"  {name:<14} {middle:9.4f} s ({low:.4f} to {high:.4f})  {cost}")
    return {"device": device, "visual_tokens": visual, "text_tokens": args.text, "budgets": rows}
