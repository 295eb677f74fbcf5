"""Summarizes scores: accuracy by task and level, FLOPs of the decoder and end to end, bytes of the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits
from visor_jax.cost import cache_bytes, decoder_flops, dense_cache_bytes, dense_decoder_flops, route_flops, visual_flops
from visor_jax.data.source_kind import LEVELS
from visor_jax.evaluate.scoring import Scores


def task_accuracies(correct: np.ndarray, tasks: Sequence[str]) -> dict[str, float]:
    """Returns the accuracy of each task, from one boolean per sample."""
    names = np.array([task or "all" for task in tasks])
    return {str(name): float(np.mean(correct[names == name])) for name in sorted(set(names))}


def level_means(accuracies: dict[str, float], levels: Mapping[str, str]) -> dict[str, float | None]:
    """Returns the mean accuracy over the tasks of each level; None for a level that `levels` (task -> level) lacks.

    "middle" is there only if a task of `levels` is of that level.
    """
    means: dict[str, float | None] = {}
    for level in LEVELS:
        if level == "middle" and level not in levels.values():
            continue
        values = [value for task, value in accuracies.items() if levels.get(task) == level]
        means[level] = float(np.mean(values)) if values else None
    return means


def level_weights(tasks: Sequence[str], levels: Mapping[str, str]) -> np.ndarray:
    """Returns weights [N] in which all levels count equally, and so do the tasks of a level."""
    keys = [(levels.get(task, ""), task) for task in tasks]
    tasks_in_level = {level: len({key for key in keys if key[0] == level}) for level, _ in set(keys)}
    samples_in_task = {key: keys.count(key) for key in set(keys)}
    weights = np.array([1.0 / (tasks_in_level[level] * samples_in_task[level, task]) for level, task in keys])
    return weights / weights.sum()


def per_sample_flops(arch: Architecture, bits: Bits, scores: Scores) -> np.ndarray:
    """Returns decoder FLOPs [N] of one budget per sample: its prompt, up to the logits of the first new token."""
    sizes = list(zip(scores.num_visual.tolist(), scores.num_prompt.tolist(), strict=True))
    known = {size: decoder_flops(arch, bits, *size) for size in set(sizes)}
    return np.array([known[size] for size in sizes])


def per_sample_cache(arch: Architecture, bits: Bits, scores: Scores) -> np.ndarray:
    """Returns bytes [N] of each sample's cached keys and values after its prompt, under one budget."""
    return per_sample(scores, lambda v, t: cache_bytes(arch, bits, v, t, scores.bytes_per_value))


def per_sample(scores: Scores, count) -> np.ndarray:
    """Returns `count(num_visual, num_prompt)` for every sample [N]."""
    return np.array([count(int(v), int(t)) for v, t in zip(scores.num_visual, scores.num_prompt, strict=True)])


def mean_decoder_flops(arch: Architecture, bits: Bits, scores: Scores) -> float:
    """Returns the mean decoder FLOPs per sample of one budget, weighted by `level_weights`."""
    return float(np.sum(per_sample_flops(arch, bits, scores) * level_weights(scores.tasks, scores.levels)))


def budget_row(arch: Architecture, scores: Scores, correct: np.ndarray, flops: np.ndarray, cached: np.ndarray) -> dict:
    """Returns one entry of "budgets" in `evaluate --json`: accuracies in [0, 1], GFLOPs and cache bytes per sample.

    GFLOPs and bytes are means weighted by `level_weights`.

    Args:
      correct: [N].
      flops: decoder FLOPs [N].
      cached: bytes of the cache after the prompt [N].
    """
    weights = level_weights(scores.tasks, scores.levels)
    tower = tower_of_samples(arch, scores)
    tasks = task_accuracies(correct, scores.tasks)
    return {
        **level_means(tasks, scores.levels),
        "tasks": tasks,
        "decoder_gflops": float(np.sum(flops * weights)) / 1e9,
        "end_to_end_gflops": float(np.sum((flops + tower) * weights)) / 1e9,
        "cache_bytes": float(np.sum(cached * weights)),
        "samples": len(scores.tasks),
    }


def tower_of_samples(arch: Architecture, scores: Scores) -> np.ndarray:
    """Returns FLOPs [N] from each sample's pixels to its visual tokens."""
    sizes = zip(scores.num_tiles, scores.num_visual, strict=True)
    return np.array([visual_flops(arch, int(tiles), int(visual)) for tiles, visual in sizes])


def kind_rows(answered: Mapping[str, Any], levels: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns the accuracies by kind of picture: {kind: {"samples", "budgets": {budget: {"tasks", levels}}}}.

    Args:
      answered: the questions' "tasks", "kinds" and, under "right", a string of 0 and 1 for each budget.
      levels: task -> level.
    """
    tasks, kinds = np.array(answered["tasks"]), np.array(answered["kinds"])
    result = {}
    for kind in sorted(set(answered["kinds"])):
        members, budgets = kinds == kind, {}
        for name, right in answered["right"].items():
            correct = np.array(list(right)) == "1"
            accuracies = task_accuracies(correct[members], tasks[members].tolist())
            budgets[name] = {**level_means(accuracies, levels), "tasks": accuracies}
        result[kind] = {"samples": int(members.sum()), "budgets": budgets}
    return result


def dense_row(arch: Architecture, scores: Scores) -> dict[str, float]:
    """Returns GFLOPs and cache bytes per sample of a dense decoder of the same shape on the same samples.

    It reads all visual tokens, also if the model does not.
    """
    scores = replace(scores, num_visual=scores.num_whole)
    cached = per_sample(scores, lambda v, t: dense_cache_bytes(arch, v, t, scores.bytes_per_value))
    weights = level_weights(scores.tasks, scores.levels)
    flops = per_sample(scores, lambda v, t: dense_decoder_flops(arch, v, t))
    tower = tower_of_samples(arch.whole, scores)
    return {
        "decoder_gflops": float(np.sum(flops * weights)) / 1e9,
        "end_to_end_gflops": float(np.sum((flops + tower) * weights)) / 1e9,
        "cache_bytes": float(np.sum(cached * weights)),
    }


def routing_flops(arch: Architecture, scores: Scores) -> np.ndarray:
    """Returns the policy's own FLOPs on every sample [N]."""
    return per_sample(scores, lambda v, t: route_flops(arch, v, t))


def shares(routes: Sequence[str]) -> dict[str, float]:
    """Returns the fraction of the questions that each budget answers, from the name of the budget of each question."""
    counts = Counter(routes)
    return {name: count / counts.total() for name, count in sorted(counts.items())}
