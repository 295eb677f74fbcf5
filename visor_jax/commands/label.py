"""Label a training subset: for every question the cheapest viable budget that is good enough, in `labels/`."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "pseudo-labels for the policy"
CONFIG = "workdir"
WORKDIR = "required"
WATCHED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    from visor_jax.commands.recipe import run_stages
    from visor_jax.files.read_write import read_json
    from visor_jax.workdir.folder import Workdir

    run_stages(config, args.workdir, ["label"])
    summary = read_json(Workdir(args.workdir).path / "labels" / "labels.json")
    print("labels:", ", ".join(f"{name} {count}" for name, count in summary["counts"].items()))
    return summary
