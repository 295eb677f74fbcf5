"""Evaluate subsets of the self-attention slots of the full model, and keep the viable ones in `search/viable.json`."""

from __future__ import annotations

import argparse
from typing import Any

from visor_jax.config import Config

HELP = "find the viable budgets"
CONFIG = "workdir"
WORKDIR = "required"
WATCHED = True
PROCESSES = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    del parser


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Runs the search stage; returns the viable budgets."""
    from visor_jax.budget import bit_string
    from visor_jax.commands.recipe import run_stages
    from visor_jax.workdir.folder import Workdir
    from visor_jax.workdir.results import read_viable

    run_stages(config, args.workdir, ["search"])
    viable = [bit_string(bits) for bits in read_viable(Workdir(args.workdir))]
    print("viable budgets, cheapest first:", ", ".join(viable))
    return {"viable": viable}
