"""The command line of `run.py`: lists entries, prints commands and tables, collects results, runs the small variants.

In: arguments. Out: text, the files of results, and docs/paper.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from visor_jax.config import load_config
from visor_jax.errors import RequestError
from visor_jax.workdir.provenance import git_revision

from . import page
from .base import BY_FORMULA, Entry, Settings, comparison, small_table, text
from .collected import collect, collected
from .entries import chosen
from .runs import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OF_SMALL = ("dry_run", "seeds", "steps_scale", "samples", "runs")  # options that only --small reads


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; expected the folder of the runs (is $RUNS set?)")
    return Path(text)


def main(arguments: Sequence[str] | None = None, description: str = "") -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the names and titles of all entries")
    parser.add_argument("--entry", nargs="+", default=[], metavar="NAME", help="table1, figure2, ...; default: all")
    parser.add_argument(
        "--collect", type=_folder, metavar="RUNS", help="read the evaluations of the runs in this folder"
    )
    parser.add_argument("--small", action="store_true", help="on the embedded data set")
    parser.add_argument("--dry-run", action="store_true", help="with --small: only print what would be run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="with --small")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="with --small: multiplies all training steps")
    parser.add_argument("--samples", type=int, default=1024, help="with --small: questions of an analysis")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims", help="with --small: folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", action="store_true", help="write docs/paper.md from the results that are there")
    args, overrides = parser.parse_known_args(arguments)
    check(parser, args, overrides)
    entries, results = chosen(args.entry), args.results.resolve()
    settings = Settings(args.seeds, args.steps_scale, args.samples, results, args.runs.resolve(), overrides)
    if args.page:
        page.write(results, ROOT / "docs")
        return 0
    if args.collect is not None and not args.list:
        collect(entries, args.collect, results, git_revision(), each=bool(args.entry))
    for entry in entries:
        if args.list:
            print(f"{entry.name:<12}{entry.title}")
        elif args.small:
            print("\n".join(of_small(entry, settings, dry_run=args.dry_run)), flush=True)
        else:
            print("\n".join(of_paper(entry, results)), flush=True)
    return 0


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Checks what does not fit together, before anything is trained or written.

    Raises:
      RequestError: a value is wrong.
      SystemExit: an argument is unknown, or has no effect.
    """
    for override in overrides:
        if not (args.small and override.startswith("--config.")):
            parser.error(f"unexpected argument {override!r}; expected an option above, or --small --config.FIELD=VALUE")
    if args.page and (args.list or args.entry or args.small or args.collect is not None):
        parser.error("--page: writes the page of all entries; expected no --list, --entry, --small or --collect")
    if args.collect is not None and args.small:
        parser.error("--collect: is for the paper's scale; expected no --small")
    if not (np.isfinite(args.steps_scale) and args.steps_scale > 0):
        raise RequestError(f"--steps-scale={args.steps_scale}: expected a finite number above 0")
    if args.samples < 1:
        raise RequestError(f"--samples={args.samples}: expected at least 1")
    if min(args.seeds) < 0:
        raise RequestError(f"--seeds={min(args.seeds)}: expected numbers of at least 0")
    for name in OF_SMALL:
        if not args.small and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')}: has no effect without --small")
    if args.small and args.results.resolve().parts[-2:] != RESULTS.parts[-2:]:
        raise RequestError(f"--results={args.results}: expected DIR/benchmarks/results; docs are written to DIR/docs")
    if overrides:
        load_config("almanac_mini", list(overrides))
        if args.results.resolve() == RESULTS:
            raise RequestError(
                f"{overrides[0]}: needs --results=DIR/benchmarks/results of its own; the results that are there have"
                " the shipped configuration"
            )


def of_paper(entry: Entry, results: Path) -> list[str]:
    """Returns an entry's commands at the paper's scale and its table, as lines."""
    table = list(comparison(entry, collected(entry, results)))
    commands = entry.paper.commands()
    used = {name: about for name, about in VARIABLES.items() if any(f"${name}" in line for line in commands)}
    lines = [f"# {entry.title}", *(f"# {name}: {about}" for name, about in used.items()), *commands]
    marks = any(BY_FORMULA in cell for row in table for cell in row)
    return [*lines, "", *text(table), *([f"{BY_FORMULA} by formula, without a run"] if marks else []), ""]


def of_small(entry: Entry, settings: Settings, *, dry_run: bool) -> list[str]:
    """Measures what is missing of an entry on the embedded data set; returns the commands and its table, as lines."""
    commands = entry.small.commands(settings)
    if commands and not dry_run:
        print("\n".join(commands), flush=True)
        entry.small.run(settings)
    table = text(list(small_table(entry, entry.small.read(settings))))
    return [f"# {entry.title}", *(commands if dry_run else []), "", *table, ""]
