"""Run every stage of a configuration in order, then evaluate, report and export; skip what is complete.

`visor run --config=FILE --workdir=DIR` runs everything and writes `eval/test.json`, `report/index.html` and `export/`.
SIGTERM saves and exits with 143; the same command then continues.
"""

from __future__ import annotations

import argparse
from typing import Any

from visor_jax.config import Config

HELP = "all stages, evaluation, report and PyTorch export"
CONFIG = "workdir"
WORKDIR = "required"
WATCHED = True
PROCESSES = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    del parser


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Runs everything that is not complete; returns the evaluation and the paths of report and export."""
    from visor_jax.commands.recipe import finish, print_summary, run_stages
    from visor_jax.workdir.supervision import watched

    with watched(config.train.hang_seconds):
        run_stages(config, args.workdir, list(config.stages), also_reads=("test",))
        result = finish(config, args.workdir)
    print_summary(result, args.workdir)
    return result
