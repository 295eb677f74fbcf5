"""Accuracies of the results of `claims.py` with intervals: a bootstrap over seeds and over each seed's questions.

In: the result files of a folder. Out: `Cell`s, each the mean of an accuracy over seeds with a 95 % interval, and
differences of two cells whose questions and seeds are resampled together. The level "hard" holds the hard questions
that count (`questions.json`), "other" the rest of the hard ones, "all hard" both.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visor_jax.errors import RequestError
from visor_jax.evaluate.intervals import RESAMPLES, bootstrap_weights, percentiles
from visor_jax.files.read_write import read_json

LEVELS = ("easy", "middle", "hard", "other", "all hard")

Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A mean over seeds, its interval, and the resampled means [RESAMPLES]; `seeds` have the budget."""

    mean: float
    low: float
    high: float
    seeds: tuple[int, ...]
    samples: np.ndarray

    @classmethod
    def of(cls, mean: float, samples: np.ndarray, seeds: Sequence[int]) -> Cell:
        """Returns the cell with the percentiles of its samples."""
        return cls(mean, *percentiles(samples), tuple(seeds), samples)


class Results:
    """All results of a folder: `results[variant][seed]`."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
          folder: of the results; one of longer training, as `steps_x3`, has its questions.json above it.

        Raises:
          RequestError: there is no questions.json.
        """
        path = (folder.parent if folder.name.startswith("steps_x") else folder) / "questions.json"
        if not path.exists():
            raise RequestError(f"{path}: no such file; run benchmarks/claims.py first")
        self.questions = read_json(path)
        self.counts = {tuple(cell) for cell in self.questions["counts"]}
        self.by_variant: dict[str, dict[int, Result]] = {}
        for path in sorted(folder.glob("*_[0-9]*.json")):
            result = read_json(path)
            self._check(path, result)
            self.by_variant.setdefault(result["variant"], {})[result["seed"]] = result

    def _check(self, path: Path, result: Result) -> None:
        """Checks that a result has the base of the questions, and the same questions as others with its seed.

        Raises:
          RequestError: it has not.
        """
        if result["identity"]["base_sha256"] != self.questions["base_sha256"]:
            raise RequestError(f"{path}: was made from another base than questions.json; remove it and run it again")
        for runs in self.by_variant.values():
            if (other := runs.get(result["seed"])) and not same_questions(other, result):
                raise RequestError(
                    f"{path}: has other questions than the other results with seed {result['seed']}; run all of them"
                    " with the same evaluate.samples, and those of earlier pages once more (--again)"
                )

    def seeds(self) -> list[int]:
        """Returns all seeds of all variants."""
        return sorted({seed for runs in self.by_variant.values() for seed in runs})

    def keep_common_seeds(self, variants: Collection[str]) -> None:
        """Drops the results of seeds that not all of these variants have, as far as they were run at all."""
        runs = [self.by_variant[name] for name in variants if name in self.by_variant]
        common = set.intersection(*map(set, runs)) if runs else set()
        self.by_variant = {
            name: {seed: run for seed, run in of_one.items() if seed in common}
            for name, of_one in self.by_variant.items()
            if common & of_one.keys()
        }

    def budgets(self, variant: str) -> list[str]:
        """Returns the budgets of a variant over all seeds, cheapest first, auto last."""
        runs = self.by_variant.get(variant, {}).values()
        costs = {name: row["decoder_gflops"] for run in runs for name, row in run["budgets"].items()}
        return sorted(costs, key=lambda name: (name == "auto", costs[name], name))

    def mean(self, variant: str, budget: str, field: str) -> float:
        """Returns the mean of a field of a budget's row over the seeds that have the budget."""
        rows = [run["budgets"].get(budget) for run in self.by_variant[variant].values()]
        return float(np.mean([row[field] for row in rows if row is not None]))

    def dense_costs(self, variant: str) -> dict[str, float]:
        """Returns the costs of a dense model on all visual tokens; of this variant's shape where none was run."""
        runs = next(
            (self.by_variant[name] for name in ("dense", "base", "visor") if name in self.by_variant),
            self.by_variant[variant],
        )
        return next(iter(runs.values()))["dense"]

    def cell(self, variant: str, budget: str, level: str, seeds: Collection[int] | None = None) -> Cell | None:
        """Returns an accuracy; None if no seed has the budget, or no question is of the level.

        Args:
          budget: its name, or "one": in every seed the first viable budget with one slot on.
          level: one of `LEVELS`, or "task=NAME".
          seeds: only these; None: all.
        """
        runs = self.by_variant.get(variant, {})
        rights = {
            seed: self._right(run, budget) for seed, run in sorted(runs.items()) if seeds is None or seed in seeds
        }
        kept = {seed: right for seed, right in rights.items() if right is not None}
        means, samples = [], []
        for seed, right in kept.items():
            weights = self._weights(seed, level)
            if weights is None:
                return None
            means.append(float(weights[0] @ right))
            samples.append(weights[1:] @ right)
        if not means:
            return None
        return Cell.of(float(np.mean(means)), over_seeds(np.stack(samples), list(kept)), list(kept))

    def difference(
        self, first: tuple[str, str], second: tuple[str, str], level: str, of_second: Results | None = None
    ) -> Cell | None:
        """Returns the accuracy of the first variant and budget minus that of the second, resampled together.

        It is that of the seeds that both have; None if there are none. `of_second`: the results that have the second
        one, on the same questions, if they are others than these.

        Raises:
          RequestError: the questions differ.
        """
        sides = ((self, first), (of_second or self, second))
        cells = [results.cell(*side, level) for results, side in sides]
        seeds = set.intersection(*(set(cell.seeds) if cell else set() for cell in cells))
        for seed in seeds:
            if not same_questions(*(results.by_variant[variant][seed] for results, (variant, _) in sides)):
                raise RequestError(f"{first[0]} and {second[0]}: seed {seed} has other questions; run both once more")
        one, other = (results.cell(*side, level, seeds) for results, side in sides)
        if one is None or other is None:
            return None
        return Cell.of(one.mean - other.mean, one.samples - other.samples, one.seeds)

    def _right(self, run: Result, budget: str) -> np.ndarray | None:
        """Returns 0 or 1 for each question of a run."""
        names = list(run["answered"]["right"])
        name = next((name for name in names if name.count("1") == 1), "") if budget == "one" else budget
        bits = run["answered"]["right"].get(name)
        return None if bits is None else np.array([bit == "1" for bit in bits], np.float32)

    @functools.cache  # noqa: B019 (one object per process)
    def _weights(self, seed: int, level: str) -> np.ndarray | None:
        """Returns weights [1 + RESAMPLES, questions]: the plain mean over the level's tasks, then resampled ones.

        Within each task of the level as many questions as it has are drawn with replacement.
        """
        run = next(runs[seed] for runs in self.by_variant.values() if seed in runs)
        answered, levels = run["answered"], run["levels"]
        kinds = answered.get("kinds", [""] * len(answered["tasks"]))
        places: dict[str, list[int]] = {}
        for place, (task, kind) in enumerate(zip(answered["tasks"], kinds, strict=True)):
            own = levels.get(task, "")
            counted = "other" if own == "hard" and (task, kind) not in self.counts else own
            if level in (counted, f"all {own}", f"task={task}"):
                places.setdefault(task, []).append(place)
        if not places:
            return None
        weights = np.zeros((1 + RESAMPLES, len(kinds)), np.float32)
        rng = np.random.default_rng([seed, LEVELS.index(level) if level in LEVELS else len(LEVELS)])
        for _, members in sorted(places.items()):
            count = len(members)
            weights[0, members] = 1 / count
            weights[1:, members] = bootstrap_weights(count, rng)
        return weights / len(places)


def same_questions(one: Result, other: Result) -> bool:
    """Returns whether two results are of the same questions; results of earlier versions have no digests of them."""
    asked, also = one["answered"], other["answered"]
    shared = [name for name in ("ids", "tasks", "kinds", "digests") if name in asked and name in also]
    return all(asked[name] == also[name] for name in shared)


def over_seeds(samples: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Returns the mean over seeds drawn with replacement [RESAMPLES], from samples [seeds, RESAMPLES]."""
    rng = np.random.default_rng([len(seeds), *seeds])
    drawn = rng.integers(0, len(seeds), (samples.shape[1], len(seeds)))
    return samples[drawn, np.arange(samples.shape[1])[:, None]].mean(axis=1)


def mean_curve(runs: Sequence[Result], stage: str) -> list[tuple[float, float]]:
    """Returns the training curve of a stage, (step, hard accuracy), as the mean over runs.

    Runs draw their budgets at different steps, so that the points of a curve lie elsewhere in each: the first points of
    all runs make the first point of the mean, and so on, as long as all have one.
    """
    curves = [[(step, accuracy) for own, step, accuracy in run["curve"] if own == stage] for run in runs]
    means = [np.mean(points, axis=0) for points in zip(*curves, strict=False)]
    return [(float(step), float(accuracy)) for step, accuracy in means]
