"""Train one stage from the start or its last saved step: `visor train --config=... --config.stage=full`.

A complete stage is skipped. SIGTERM saves and exits 143; the same command resumes.
"""

from __future__ import annotations

import argparse
from typing import Any

from visor_jax.config import Config
from visor_jax.errors import RequestError

HELP = "train one stage"
CONFIG = "workdir"
WORKDIR = "required"
WATCHED = True
PROCESSES = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    del parser


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Trains `config.stage`; returns its seconds."""
    from visor_jax.commands.recipe import run_stages

    if not config.stage:
        raise RequestError("stage='': train needs --config.stage=NAME, one of the stages in config.stages")
    return run_stages(config, args.workdir, [config.stage])
