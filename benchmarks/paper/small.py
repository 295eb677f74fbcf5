"""Numbers on the embedded data set, from the results of `benchmarks/claims.py`.

In: places of numbers: a variant of `claims_table.py`, a budget, and what. Out: means over seeds; the variants that are
missing are trained by `claims.py` itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import claims_statistics
import numpy as np
from claims_table import VARIANTS

from visor_jax.errors import RequestError

from .base import Cells, Settings
from .runs import Place, Places, filled, shares_number


@dataclass(frozen=True)
class Claimed:
    """Numbers of the variants of `claims.py`; the first of a place's three names is a variant."""

    places: Places

    def variants(self) -> list[str]:
        """Returns the variants, each once, with those that they continue, and the dense one that savings refer to."""
        places = [place for row in self.places.values() for place in row.values()]
        names = [place[0] for place in places] + ["dense"] * any(place[2] == "saving" for place in places)
        for name in list(names):
            variant = VARIANTS[name]
            names += [other[0] for other in (variant.after, variant.start) if other]
        return [name for name in VARIANTS if name in names]

    def missing(self, settings: Settings) -> list[str]:
        """Returns the variants without a result for one of the seeds."""
        folder = folder_of(settings)
        return [name for name in self.variants()
                if any(not (folder / f"{name}_{seed}.json").exists() for seed in settings.seeds)]  # fmt: skip

    def arguments(self, settings: Settings) -> list[str]:
        """Returns the arguments of `claims.py` for what is missing."""
        scale = [] if settings.steps_scale == 1 else ["--steps-scale", f"{settings.steps_scale:g}"]
        return ["--only", *self.missing(settings), "--seeds", *map(str, settings.seeds), *scale, *settings.overrides]

    def commands(self, settings: Settings) -> list[str]:
        """Returns the command for what is missing; none if nothing is."""
        missing = self.missing(settings)
        return ["python benchmarks/claims.py " + " ".join(self.arguments(settings))] if missing else []

    def run(self, settings: Settings) -> None:
        """Trains and measures what is missing.

        Raises:
          RequestError: one of these continues a run whose result is there and whose folder is not.
        """
        import claims

        missing = self.missing(settings)
        sources = [source[0] for name in missing for source in (VARIANTS[name].after, VARIANTS[name].start) if source]
        for name in sources:
            for seed in settings.seeds:
                folder = settings.runs / folder_of(settings).relative_to(settings.results / "claims") / f"{name}_{seed}"
                if name not in missing and not folder.is_dir():
                    raise RequestError(
                        f"--runs={settings.runs}: has no {folder.relative_to(settings.runs)}, which other runs continue"
                        " and whose result is there already; expected the folder of the runs, or --results=DIR with"
                        " another folder to train all of them"
                    )
        if missing:
            out = settings.results.parents[1]
            claims.main([*self.arguments(settings), "--runs", str(settings.runs), "--out", str(out)])

    def read(self, settings: Settings) -> Cells:
        """Returns the means over all seeds that every variant of the table has, not only those of `settings`."""
        folder = folder_of(settings)
        if not any(folder.glob("*_[0-9]*.json")):
            return {}
        results = claims_statistics.Results(folder)
        results.keep_common_seeds([place[0] for row in self.places.values() for place in row.values()])
        return filled(self.places, lambda place: number(results, place))


def folder_of(settings: Settings) -> Path:
    """Returns the folder of the results of `claims.py`."""
    name = "" if settings.steps_scale == 1 else f"steps_x{settings.steps_scale:g}"
    return settings.results / "claims" / name


def number(results: claims_statistics.Results, place: Place) -> float | None:
    """Returns a number at its place: accuracies and shares in percent; None if the variant or budget was not run."""
    variant, budget, what = place
    kind, _, rest = what.partition("/")
    level, _, other = rest.partition("/")
    if variant not in results.by_variant:
        return None
    if kind == "saving":
        dense = results.dense_costs(variant)["decoder_gflops"]
        return dense / results.mean(variant, budget, "decoder_gflops") if budget in results.budgets(variant) else None
    if kind in ("share", "slots"):
        runs = results.by_variant[variant].values()
        tasks = [[run["routes"][t] for t, of in run["levels"].items() if of == level and t in run["routes"]]
                 for run in runs if "routes" in run]  # fmt: skip
        return float(np.mean([shares_number(rows, kind, other) for rows in tasks])) if tasks else None
    if kind.startswith("task="):
        rows = [run["budgets"].get(budget, {"tasks": {}})["tasks"] for run in results.by_variant[variant].values()]
        values = [row[kind.removeprefix("task=")] for row in rows if kind.removeprefix("task=") in row]
        return 100 * float(np.mean(values)) if values else None
    cell = results.cell(variant, budget, what)
    return None if cell is None else 100 * cell.mean
