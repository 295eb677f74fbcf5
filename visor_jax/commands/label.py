"""Label a training subset: for every question the cheapest viable budget that is good enough, in `labels/`."""

from __future__ import annotations

import argparse
import json
from typing import Any

HELP = "pseudo-labels for the policy"
CONFIG = "workdir"
WORKDIR = "required"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    from visor_jax.stages import run_stages
    from visor_jax.workdir import Workdir

    run_stages(config, args.workdir, ["label"])
    summary = json.loads((Workdir(args.workdir).path / "labels" / "labels.json").read_text())
    print("labels:", ", ".join(f"{name} {count}" for name, count in summary["counts"].items()))
    return summary
