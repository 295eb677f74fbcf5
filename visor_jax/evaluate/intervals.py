"""Confidence intervals of accuracies, and of the difference of two models on the same questions.

In: accuracies with numbers of questions, or one value per question. Out: Wilson's interval for a task, a combination of
these for the mean over tasks or groups, a bootstrap for values that are not right or wrong, and `PairedDifference`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

CONFIDENCE = 0.95
PERCENTS = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))
RESAMPLES = 2000  # of a bootstrap
SWAPS = 10_000  # random exchanges of the two models' values
Z = 1.959963984540054  # quantile of the normal distribution that leaves 2.5 % above it

Interval = tuple[float, float]


def wilson(accuracy: float, count: int) -> Interval:
    """Returns Wilson's score interval of a fraction of `count` answers (E. B. Wilson, 1927); (0, 1) of none."""
    if count == 0:
        return 0.0, 1.0
    shrink = 1 / (1 + Z**2 / count)
    center = shrink * (accuracy + Z**2 / (2 * count))
    half = shrink * Z * math.sqrt(accuracy * (1 - accuracy) / count + Z**2 / (4 * count**2))
    low, high = min(accuracy, center - half), max(accuracy, center + half)  # rounding leaves the accuracy inside
    return max(0.0, low), min(1.0, high)


def shown_interval(value: float, limits: Sequence[float], decimals: int = 1, scale: float = 100.0) -> str:
    """Returns an interval as text: "±0.6", half its width, or "(0.0 to 4.2)" where the value is far from its middle.

    Args:
      value: what the limits are of, both before they are scaled.
      scale: what they are multiplied by: 100 for percent.
    """
    low, high = (scale * limit for limit in limits)
    shorter, longer = sorted((scale * value - low, high - scale * value))
    if shorter < longer / 2:
        return f"({low:.{decimals}f} to {high:.{decimals}f})"
    return f"±{(high - low) / 2:.{decimals}f}"


def interval_of_mean(accuracies: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """Returns the interval of the mean of independent accuracies.

    Adds the squared distances from each accuracy to its limits (the method of variance estimates recovery: Zou and
    Donner, 2008), so that tasks without a single wrong answer contribute their uncertainty too.
    """
    count, mean = len(accuracies), sum(accuracies) / len(accuracies)
    below = math.sqrt(sum((a - low) ** 2 for a, (low, _) in zip(accuracies, intervals, strict=True))) / count
    above = math.sqrt(sum((high - a) ** 2 for a, (_, high) in zip(accuracies, intervals, strict=True))) / count
    return mean - below, mean + above


def budget_intervals(row: Mapping[str, Any], tasks: Sequence[str], levels: Mapping[str, str]) -> dict[str, Any]:
    """Returns the intervals of one budget: {"tasks": {task: [low, high]}, level: [low, high]}.

    Args:
      row: an entry of "budgets" in `evaluate --json`.
      tasks: the task of every question.
      levels: task -> level.
    """
    counts = Counter(task or "all" for task in tasks)
    by_task = {task: wilson(accuracy, counts[task]) for task, accuracy in row["tasks"].items()}
    return with_levels(row["tasks"], by_task, levels)


def with_levels(
    accuracies: Mapping[str, float], by_task: Mapping[str, Sequence[float]], levels: Mapping[str, str]
) -> dict[str, Any]:
    """Returns {"tasks": {task: [low, high]}, level: [low, high]} from the accuracies and intervals of tasks."""
    result: dict[str, Any] = {"tasks": {task: list(limits) for task, limits in by_task.items()}}
    for level in dict.fromkeys(levels.values()):
        members = [task for task in by_task if levels.get(task) == level]
        if members:
            own = [(by_task[task][0], by_task[task][1]) for task in members]
            result[level] = list(interval_of_mean([accuracies[task] for task in members], own))
    return result


# --- resampling -------------------------------------------------------------------------------------------------------


def bootstrap_weights(count: int, rng: np.random.Generator) -> Float[np.ndarray, "resamples count"]:
    """Returns the weights of `count` questions in `RESAMPLES` samples of as many, drawn with replacement."""
    weights = np.empty((RESAMPLES, count), np.float32)
    for start in range(0, RESAMPLES, 100):  # bounds the memory
        weights[start : start + 100] = rng.multinomial(count, np.full(count, 1 / count), 100) / count
    return weights


def bootstrap_means(values: Sequence[float] | np.ndarray, name: str) -> Float[np.ndarray, " resamples"]:
    """Returns the means of resampled values; the same for the same name and number of values."""
    return bootstrap_weights(len(values), generator(name)) @ np.asarray(values, np.float32)


def percentiles(samples: np.ndarray) -> Interval:
    """Returns the percentile interval of resampled means."""
    low, high = np.percentile(samples, PERCENTS)
    return float(low), float(high)


def generator(name: str) -> np.random.Generator:
    """Returns random numbers of their own for each name."""
    return np.random.default_rng(list(name.encode()))


def interval_of_values(groups: Mapping[str, Sequence[float]]) -> Interval:
    """Returns the interval of the mean over groups of the mean of each group's values, all in [0, 1].

    Args:
      groups: name -> values, at least one; the name also chooses the random numbers.
    """
    means = [float(np.mean(values)) for values in groups.values()]
    return interval_of_mean(means, [interval_of_group(values, name) for name, values in groups.items()])


def interval_of_group(values: Sequence[float], name: str) -> Interval:
    """Returns the interval of the mean of values in [0, 1].

    Wilson's if all are 0 or 1, else percentiles of a bootstrap. Resampling values of which nearly all are equal would
    leave nearly no uncertainty, so two values of 0 and two of 1 are added (after Agresti and Coull, 1998).
    """
    mean = sum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        return wilson(mean, len(values))
    low, high = percentiles(bootstrap_means([*values, 0.0, 0.0, 1.0, 1.0], name))
    return min(low, mean), max(high, mean)


def resampled_differences(differences: Sequence[float], name: str) -> Float[np.ndarray, " resamples"]:
    """Returns means of resampled differences in [-1, 1], at least one.

    Resampling differences of which nearly all are equal would leave nearly no uncertainty, so one pair in favor of each
    model is added (after Bonett and Price, 2012).
    """
    return bootstrap_means([*differences, -1.0, 1.0], name)


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two models' accuracies on the same questions.

    Attributes:
      first, second: their accuracies.
      count: number of questions, or of groups of questions that are scored together.
      samples: differences on resampled questions.
      swapped: differences after exchanging the two models' values of randomly chosen questions. This leaves the
        distribution of the difference as it is if the models are equally good (Noreen's approximate randomization).
    """

    first: float
    second: float
    count: int
    samples: Float[np.ndarray, " resamples"]
    swapped: Float[np.ndarray, " swaps"]

    @classmethod
    def of(
        cls, first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, name: str
    ) -> PairedDifference:
        """Compares the values of the same questions; `name` chooses the random numbers."""
        differences, count = np.subtract(first, second, dtype=np.float64), len(first)
        unequal, rng = differences[differences != 0].astype(np.float32), generator(f"{name} swapped")
        swapped = np.zeros(SWAPS, np.float32)
        for start in range(0, SWAPS, 1000):  # bounds the memory
            signs = rng.integers(0, 2, (1000, len(unequal)), np.int8)
            swapped[start : start + 1000] = (2 * signs - 1).astype(np.float32) @ unequal / count
        means = float(np.mean(first)), float(np.mean(second))
        return cls(*means, count, resampled_differences(differences.tolist(), name), swapped)

    @classmethod
    def mean(cls, parts: Sequence[PairedDifference]) -> PairedDifference:
        """Returns the mean over parts, such as tasks, each of which counts equally; their questions are independent."""
        return cls(
            float(np.mean([part.first for part in parts])),
            float(np.mean([part.second for part in parts])),
            sum(part.count for part in parts),
            np.mean([part.samples for part in parts], axis=0),
            np.mean([part.swapped for part in parts], axis=0),
        )

    def figures(self) -> dict[str, float]:
        """Returns {"accuracy", "other", "difference", "low", "high", "p", "questions"}.

        `low` and `high` are the limits of the bootstrap; `p`, two-sided, is the fraction of `swapped` that are at
        least as far from 0 as the difference.
        """
        (low, high), difference = percentiles(self.samples), self.first - self.second
        low, high = min(low, difference), max(high, difference)
        as_far = np.abs(self.swapped) >= abs(difference) - 1e-6  # rounding is no difference
        return {
            "accuracy": self.first,
            "other": self.second,
            "difference": difference,
            "low": low,
            "high": high,
            "p": (1 + int(as_far.sum())) / (1 + len(self.swapped)),
            "questions": self.count,
        }
