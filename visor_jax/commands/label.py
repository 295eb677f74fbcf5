"""Label a training subset with the cheapest viable budget that is good enough for each question, in `labels/`."""

from __future__ import annotations

import argparse
from typing import Any

from visor_jax.config import Config

HELP = "pseudo-labels for the policy"
CONFIG = "workdir"
WORKDIR = "required"
WATCHED = True
PROCESSES = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    del parser


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Runs the label stage; returns `labels/labels.json`."""
    from visor_jax.commands.recipe import run_stages
    from visor_jax.files.read_write import read_json
    from visor_jax.workdir.folder import Workdir

    run_stages(config, args.workdir, ["label"])
    summary = read_json(Workdir(args.workdir).path / "labels" / "labels.json")
    print("labels:", ", ".join(f"{name} {count}" for name, count in summary["counts"].items()))
    return summary
