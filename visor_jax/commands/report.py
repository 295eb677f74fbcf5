"""Write `report/index.html` for a workdir that has been evaluated: one self-contained page."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visor_jax.workdir.folder import Workdir

HELP = "the HTML report of a run"
CONFIG = "none"
WORKDIR = "required"
WATCHED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    del parser


def main(args: argparse.Namespace, config: None) -> dict[str, Any]:
    """Writes the report; returns its path."""
    del config
    from visor_jax.report.page import write_report
    from visor_jax.workdir.folder import Workdir
    from visor_jax.workdir.supervision import watched

    workdir = Workdir(args.workdir)
    with watched(hang_seconds(workdir)):
        path = write_report(workdir)
    print(f"report: {path}")
    return {"report": str(path)}


def hang_seconds(workdir: Workdir) -> float:
    """Returns `train.hang_seconds` of the run, or the default if its configuration is missing or lacks the field."""
    from visor_jax.config import default_config
    from visor_jax.errors import RequestError

    try:
        limit = workdir.config()["train"]["hang_seconds"]
    except (RequestError, KeyError, TypeError, OSError):
        limit = None
    return float(limit) if isinstance(limit, int | float) and limit >= 0 else default_config().train.hang_seconds
