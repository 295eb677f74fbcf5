"""Compute before paying: what a picture costs, or whether a run fits on chips and how long it takes.

`visor plan --config=configs/llava_ov_0p5b.py --image=1700x2200` (width x height): tiles, visual tokens, and FLOPs of
the tower and of the decoder per budget (for a prompt of `--text-tokens`), by formula.

`visor plan --config=configs/llava_ov_0p5b.py --topology=v5e:4x4`: the step of every stage, compiled for these chips
without having any (needs the extra [aot]): bytes per chip, FLOPs, collectives, estimated time per step, samples per day
and chip-hours. `--topology=h100x8` is planned by formula alone. Nothing is run: times are estimates, whose assumptions
are printed. Neither data nor a tokenizer file is read.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from visor_jax.config import Config

HELP = "cost of a picture, or memory, time and price of a run on a topology"
CONFIG = "required"
MAX_TEXT = 10_000_000
OF_IMAGE = {"text_tokens": 80}  # flags with their defaults
OF_TOPOLOGY = {
    "slices": 1, "stage": "", "by_formula": False, "machine_code": False, "search": False, "dollars_per_chip_hour": 0.0
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", metavar="WIDTHxHEIGHT", help="size of the picture in pixels")
    what.add_argument("--topology", metavar="CHIPS", help="chips to train on, such as v5e:4x4, v5p:4x4x4 or h100x8")
    parser.add_argument("--slices", type=int, default=1, help="slices of this topology, joined by the network")
    parser.add_argument("--text-tokens", type=int, default=80, help="tokens of the prompt")
    parser.add_argument("--stage", default="", help="plan one stage only")
    parser.add_argument("--by-formula", action="store_true", help="compile nothing, as for GPUs; needs no libtpu")
    parser.add_argument(
        "--machine-code", action="store_true", help="compile to the end, as on hardware: several times as long"
    )
    parser.add_argument(
        "--search", action="store_true", help="choose mesh, remat, accumulation and batch size; compiles the winner"
    )
    parser.add_argument("--dollars-per-chip-hour", type=float, default=0.0, metavar="PRICE", help="prices the run")


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Plans a run if `--topology` is given, else the cost of a picture."""
    check_flags(args)
    return of_topology(args, config) if args.topology is not None else of_image(args, config)


def check_flags(args: argparse.Namespace) -> None:
    """Raises:
    RequestError: a flag that has no effect on what is planned, or two that contradict each other.
    """
    from visor_jax.errors import RequestError

    what, others = ("--image", OF_TOPOLOGY) if args.topology is None else ("--topology", OF_IMAGE)
    for name, default in others.items():
        if getattr(args, name) != default:
            raise RequestError(f"plan: --{name.replace('_', '-')} has no effect with {what}; remove it")
    if args.by_formula and args.machine_code:
        raise RequestError("plan: --by-formula compiles nothing, --machine-code compiles to the end; give one of them")


def of_topology(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Plans the stages of a run; returns bytes, FLOPs, collectives and estimated times."""
    from visor_jax.errors import RequestError
    from visor_jax.planning.plan import SECONDS, plan, planned_stages
    from visor_jax.planning.search import plan_best
    from visor_jax.planning.text import show
    from visor_jax.scale.topologies import parse_topology

    price = args.dollars_per_chip_hour
    if not 0 <= price < 1e6:
        raise RequestError(f"--dollars-per-chip-hour={price}: expected 0 or more")
    seconds, end = 0.0 if args.by_formula else SECONDS, args.machine_code
    topology, stages = parse_topology(args.topology, args.slices), planned_stages(config, args.stage)
    if args.search:
        result = plan_best(config, topology, stages, price, seconds, machine_code=end)
    else:
        result = plan(config, topology, stages, dollars=price, seconds=seconds, machine_code=end)
    print(show(result, topology))
    return result


def of_image(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Computes the cost of a picture; returns tiles, tokens and GFLOP by budget, also with reduced tokens."""
    from visor_jax.config import architecture
    from visor_jax.errors import RequestError
    from visor_jax.planning.picture import lines, picture_costs

    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", args.image)
    if match is None:
        raise RequestError(f"--image={args.image}: expected WIDTHxHEIGHT in pixels, such as 1700x2200")
    if not 1 <= args.text_tokens <= MAX_TEXT:
        raise RequestError(f"--text-tokens={args.text_tokens}: expected 1 to {MAX_TEXT}")
    arch, size = architecture(config), (int(match[2]), int(match[1]))
    costs = picture_costs(arch, size, args.text_tokens)
    print("\n".join(lines(costs, arch, size, args.text_tokens)))
    return costs
