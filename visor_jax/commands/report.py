"""Write `report/index.html` for a workdir that has been evaluated: one self-contained page."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "the HTML report of a run"
CONFIG = "none"
WORKDIR = "required"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    del config
    from visor_jax.report.page import write_report
    from visor_jax.workdir import Workdir

    path = write_report(Workdir(args.workdir))
    print(f"report: {path}")
    return {"report": str(path)}
