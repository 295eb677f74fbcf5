"""From scores to the figures that are reported: accuracy by task and level, FLOPs decoder-only and end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits
from visor_jax.cost import decoder_flops, dense_decoder_flops, route_flops, tower_flops
from visor_jax.evaluate.scoring import Scores


def task_accuracies(correct: np.ndarray, tasks: Sequence[str]) -> dict[str, float]:
    """Accuracy of each task, from one boolean per sample."""
    names = np.array([task or "all" for task in tasks])
    return {str(name): float(np.mean(correct[names == name])) for name in sorted(set(names))}


def level_means(accuracies: dict[str, float], levels: Mapping[str, str]) -> dict[str, float | None]:
    """Mean accuracy over the easy and over the hard tasks; None where `levels` (task -> level) has no such level."""
    means: dict[str, float | None] = {}
    for level in ("easy", "hard"):
        found = [value for task, value in accuracies.items() if levels.get(task) == level]
        means[level] = float(np.mean(found)) if found else None
    return means


def level_weights(tasks: Sequence[str], levels: Mapping[str, str]) -> np.ndarray:
    """Weights [N] of the equal mix: easy and hard count half each, and within a level every task counts the same."""
    keys = [(levels.get(task, ""), task) for task in tasks]
    tasks_in_level = {level: len({key for key in keys if key[0] == level}) for level, _ in set(keys)}
    samples_in_task = {key: keys.count(key) for key in set(keys)}
    weights = np.array([1.0 / (tasks_in_level[level] * samples_in_task[level, task]) for level, task in keys])
    return weights / weights.sum()


def per_sample_flops(arch: Architecture, bits: Bits, scores: Scores) -> np.ndarray:
    """Decoder FLOPs [N] of one budget on every sample: its prompt, up to the logits of the first new token."""
    sizes = list(zip(scores.num_visual.tolist(), scores.num_prompt.tolist(), strict=True))
    known = {size: decoder_flops(arch, bits, *size) for size in set(sizes)}
    return np.array([known[size] for size in sizes])


def per_sample(scores: Scores, count) -> np.ndarray:
    """`count(num_visual, num_prompt)` for every sample [N]."""
    return np.array([count(int(v), int(t)) for v, t in zip(scores.num_visual, scores.num_prompt, strict=True)])


def mean_decoder_flops(arch: Architecture, bits: Bits, scores: Scores) -> float:
    return float(np.sum(per_sample_flops(arch, bits, scores) * level_weights(scores.tasks, scores.levels)))


def budget_row(arch: Architecture, scores: Scores, correct: np.ndarray, flops: np.ndarray) -> dict:
    """One entry of `evaluate --json`'s "budgets": accuracies in [0, 1], GFLOPs per sample on the equal mix."""
    weights = level_weights(scores.tasks, scores.levels)
    tower = np.array([tower_flops(arch, int(n)) for n in scores.num_tiles])
    tasks = task_accuracies(correct, scores.tasks)
    return {
        **level_means(tasks, scores.levels),
        "tasks": tasks,
        "decoder_gflops": float(np.sum(flops * weights)) / 1e9,
        "end_to_end_gflops": float(np.sum((flops + tower) * weights)) / 1e9,
        "samples": len(scores.tasks),
    }


def dense_row(arch: Architecture, scores: Scores) -> dict[str, float]:
    """What a dense decoder of the same shape would cost on the same samples, GFLOPs per sample."""
    weights = level_weights(scores.tasks, scores.levels)
    flops = per_sample(scores, lambda v, t: dense_decoder_flops(arch, v, t))
    tower = np.array([tower_flops(arch, int(n)) for n in scores.num_tiles])
    return {
        "decoder_gflops": float(np.sum(flops * weights)) / 1e9,
        "end_to_end_gflops": float(np.sum((flops + tower) * weights)) / 1e9,
    }


def routing_flops(arch: Architecture, scores: Scores) -> np.ndarray:
    """What the policy itself costs on every sample [N]."""
    return per_sample(scores, lambda v, t: route_flops(arch, v, t))
