"""Evaluates models on pages of another make than those of their training: real tables only, other fonts and renderer.

    pip install 'visor-jax[vega]'                                  # draws the pages of the second renderer
    python benchmarks/shifts.py --models almanac-base runs/claims/visor_1 runs/claims/dense_packed_4_1

In: models, as `visor_jax.load` takes them. A workdir's configuration is its run's; other models use `almanac_mini`.
Out: `benchmarks/results/shifts.json` (or `--out`) and a table: for each model, set of pages and budget the accuracies
of easy, middle and hard tasks with their 95 % intervals, and the accuracy of the hard tasks with a
gray picture ("blind") and with another page ("shuffled"). All models see the same questions of the test split.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from claims import changed

import visor_jax
from visor_jax.config import Config, from_dict, load_config
from visor_jax.data.controls import CONTROLS
from visor_jax.data.source_kind import LEVELS
from visor_jax.errors import RequestError
from visor_jax.evaluate.measure import measure, requested_budgets
from visor_jax.evaluate.tables import percent
from visor_jax.workdir.folder import Workdir

RESULT = harness.RESULTS / "shifts.json"
SETS: dict[str, Mapping[str, Any]] = {
    "as in training": {},
    "real tables only": {"mixed_share": 0.0},
    "unseen fonts": {"path": "pages_unseen_fonts"},
    "second renderer": {"path": "pages_vega"},
}


def config_of(model: str) -> Config:
    """Returns the configuration of a model's run; `almanac_mini` if it is not a workdir."""
    folder = Path(model)
    return from_dict(Workdir(folder).config()) if (folder / "config.json").exists() else load_config("almanac_mini")


def by_folder_name(models: Sequence[str]) -> dict[str, str]:
    """Returns {folder name, which names the row: what `--models` says}.

    Raises:
      RequestError: two folders have the same name.
    """
    named = {Path(model).name: model for model in models}
    if len(named) < len(models):
        raise RequestError(
            f"--models={' '.join(models)}: expected different folder names, which name the rows; rename or copy one"
        )
    return named


def on_pages(config: Config, fields: Mapping[str, Any], samples: int, seed: int) -> Config:
    """Returns the configuration that asks `samples` questions of one set of pages."""
    data = {f"data.{name}": value for name, value in fields.items()}
    return changed(config, {"seed": seed, "evaluate.samples": samples, **data})


def accuracies(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {budget: {level: [accuracy, low, high], control: accuracy of the hard tasks}}."""
    limits = figures["intervals"]["budgets"]
    return {
        budget: {
            **{level: [row[level], *limits[budget][level]] for level in LEVELS if row.get(level) is not None},
            **{control: figures[control][budget]["hard"] for control in CONTROLS if control in figures},
        }
        for budget, row in figures["budgets"].items()
    }


def measured(name: str, samples: int, seed: int) -> dict[str, Any]:
    """Returns the accuracies of one model on all sets."""
    model, config = visor_jax.load(name), config_of(name)
    requested = requested_budgets(model, None)
    found = {}
    for title, fields in SETS.items():
        of_set = measure(on_pages(config, fields, samples, seed), model, "test", requested)
        found[title] = accuracies(of_set.figures)
    return found


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of a table in Markdown."""
    yield "| model | pages | budget | " + " | ".join((*LEVELS, *(f"hard, {control}" for control in CONTROLS))) + " |"
    yield "| --- | --- | --- |" + " ---: |" * (len(LEVELS) + len(CONTROLS))
    for name, sets in report.items():
        for title, budgets in sets.items():
            for budget, row in budgets.items():
                cells = [percent(row[level][0], row[level][1:]) for level in LEVELS]
                cells += [f"{100 * row[control]:.1f}" if control in row else "-" for control in CONTROLS]
                yield f"| {name} | {title} | {budget} | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates all models; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="what visor_jax.load takes")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1, help="of the questions")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(arguments)
    try:
        models = by_folder_name(args.models)
        report = {name: measured(model, args.samples, args.seed) for name, model in models.items()}
    except RequestError as error:
        print(f"shifts.py: {error}", file=sys.stderr)
        return 2
    print(*table(report), sep="\n")
    harness.save({"arguments": {"models": args.models, "samples": args.samples, "seed": args.seed}, **report}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
