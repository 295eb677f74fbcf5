"""Confidence intervals of accuracies: Wilson's for a task, and a combination of these for the mean over tasks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

CONFIDENCE = 0.95
Z = 1.959963984540054  # quantile of the normal distribution that leaves 2.5 % above it

Interval = tuple[float, float]


def wilson(accuracy: float, count: int) -> Interval:
    """Returns Wilson's score interval of a fraction of `count` answers (E. B. Wilson, 1927); (0, 1) of none."""
    if count == 0:
        return 0.0, 1.0
    shrink = 1 / (1 + Z**2 / count)
    center = shrink * (accuracy + Z**2 / (2 * count))
    half = shrink * Z * math.sqrt(accuracy * (1 - accuracy) / count + Z**2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


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
    result: dict[str, Any] = {"tasks": {task: list(limits) for task, limits in by_task.items()}}
    for level in dict.fromkeys(levels.values()):
        members = [task for task in by_task if levels.get(task) == level]
        if members:
            limits = interval_of_mean([row["tasks"][task] for task in members], [by_task[task] for task in members])
            result[level] = list(limits)
    return result
