"""Searches for the subsets of self-attention slots that are worth keeping (method.md section 5.3).

Evaluates the trained full model on a held-out split. Writes `search/subsets.csv` (every evaluated subset) and
`search/viable.json` (the viable budgets, cheapest first): the Pareto front of accuracy against FLOPs, plus the best
subset of each count. Up to `search.max_subsets` subsets are all evaluated; with more, the search goes best-first by
count: from the best few subsets of one count to those with one more slot. `search.slots` restricts it to the subsets of
some slots, and says which of them to try first.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, all_subsets, bit_string, budget_name
from visor_jax.config import ConfigLike, as_config
from visor_jax.data.questions import single_questions
from visor_jax.data.skips import SkipLog
from visor_jax.data.sources import source_kind
from visor_jax.evaluate.chunks import ChunkStore
from visor_jax.evaluate.features import FeatureStore
from visor_jax.evaluate.scoring import Scores, score
from visor_jax.evaluate.summary import level_means, mean_decoder_flops, task_accuracies
from visor_jax.files.read_write import write_json, write_text
from visor_jax.generate.visor import Visor
from visor_jax.scale.distributed import once
from visor_jax.scale.mesh import scoring_mesh
from visor_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

BEAM = 4  # subsets of each count that a best-first search extends


@dataclass(frozen=True)
class Subset:
    """One evaluated subset: its accuracy (mean over tasks), loss (nats per answer) and decoder FLOPs per sample."""

    bits: Bits
    accuracy: float
    loss: float
    flops: float
    tasks: dict[str, float]

    @property
    def count(self) -> int:
        return sum(self.bits)


def search_stage(config: ConfigLike, workdir: Workdir, model: Visor) -> list[Bits]:
    """Evaluates subsets of the trained "full" `model`, writes both files and returns the viable budgets."""
    config = as_config(config)
    identity = workdir.identity(config, "search")
    skips, mesh = SkipLog(), scoring_mesh(config)
    questions = single_questions(config, "validation", config.search.samples, skips)
    batches = questions.batches(config.evaluate.batch_size)  # every call of `evaluate` iterates over them again
    features = FeatureStore.of(config, workdir)
    chunks = ChunkStore(workdir, "search", identity, "full", with_features=features is not None)

    def evaluate(subsets: Sequence[Bits]) -> list[Subset]:
        dtype, levels = config.model.dtype, source_kind(config).levels
        scores = score(
            model.params,
            batches,
            subsets,
            model.arch,
            mesh=mesh,
            dtype=dtype,
            levels=levels,
            chunks=chunks,
            features=features,
        )
        return summarize(scores, model.arch)

    subsets = explore(evaluate, model.arch.num_slots, config.search.max_subsets, config.search.slots)
    kept = viable(subsets)
    skipped, levels = skips.by_reason(), source_kind(config).levels
    once(lambda: write_results(workdir, subsets, kept, model.arch, skipped, identity, levels))
    chunks.remove()
    return [subset.bits for subset in kept]


def explore(
    evaluate: Callable[[Sequence[Bits]], list[Subset]], num_slots: int, max_subsets: int, slots: Sequence[int] = ()
) -> list[Subset]:
    """Evaluates all subsets if there are at most `max_subsets`, else best-first by count.

    Args:
      slots: those of which subsets are evaluated, besides the full budget, the most promising first; empty: all.
    """
    order = tuple(slots) or tuple(range(num_slots))
    empty, full = (False,) * num_slots, (True,) * num_slots
    if 2 ** len(order) + (len(order) < num_slots) <= max_subsets:
        return evaluate(list(dict.fromkeys([*subsets_of(order, num_slots), full])))
    evaluated = {subset.bits: subset for subset in evaluate([empty, full])}
    frontier = [evaluated[empty]]
    last = min(len(order), num_slots - 1)
    for count in range(1, last + 1):
        grown = (grow(subset.bits, slot) for subset in frontier for slot in order if not subset.bits[slot])
        share = (max_subsets - len(evaluated)) // (last + 1 - count)  # reserves evaluations for the later counts
        level = evaluate(list(dict.fromkeys(grown))[:share]) if share > 0 else []
        if not level:
            break
        evaluated.update((subset.bits, subset) for subset in level)
        frontier = sorted(level, key=better_first)[:BEAM]
    return list(evaluated.values())


def subsets_of(slots: Sequence[int], num_slots: int) -> list[Bits]:
    """Returns every budget that has only `slots` on, in the order of `all_subsets`."""
    budgets, places = [], sorted(slots)
    for bits in all_subsets(len(places)):
        on = {slot for slot, chosen in zip(places, bits, strict=True) if chosen}
        budgets.append(tuple(slot in on for slot in range(num_slots)))
    return budgets


def grow(bits: Bits, slot: int) -> Bits:
    """Returns the subset with `slot` turned on."""
    return (*bits[:slot], True, *bits[slot + 1 :])


def better_first(subset: Subset) -> tuple[float, float, float]:
    """Sort key: higher accuracy, then lower loss, then fewer FLOPs."""
    return (-subset.accuracy, subset.loss, subset.flops)


def viable(subsets: Sequence[Subset]) -> list[Subset]:
    """Returns the Pareto front of accuracy against FLOPs plus the best subset of each count, cheapest first.

    Of subsets with the same cost the better one comes first, so taking the first suitable budget takes the better one.
    """
    best_of_count = {
        count: min((s for s in subsets if s.count == count), key=better_first) for count in {s.count for s in subsets}
    }
    front = [s for s in subsets if not any(dominates(other, s) for other in subsets)]
    kept = {s.bits: s for s in (*best_of_count.values(), *front)}
    return sorted(kept.values(), key=lambda s: (s.flops, *better_first(s)))


def dominates(other: Subset, subset: Subset) -> bool:
    """Whether `other` is no less accurate and no costlier, and better in accuracy, FLOPs or, if equal, loss."""
    if other.flops > subset.flops or other.accuracy < subset.accuracy:
        return False
    return other.flops < subset.flops or other.accuracy > subset.accuracy or other.loss < subset.loss


def summarize(scores: Scores, arch: Architecture) -> list[Subset]:
    """Converts scores to one `Subset` per budget."""
    subsets = []
    for row, bits in enumerate(scores.budgets):
        tasks = task_accuracies(scores.correct[row], scores.tasks)
        loss = -float(scores.log_likelihood[row].mean())
        flops = mean_decoder_flops(arch, bits, scores)
        subsets.append(Subset(bits, float(np.mean(list(tasks.values()))), loss, flops, tasks))
    return subsets


def write_results(
    workdir: Workdir,
    subsets: Sequence[Subset],
    kept: Sequence[Subset],
    arch: Architecture,
    skipped: dict[str, int],
    identity: dict[str, Any],
    levels: Mapping[str, str],
) -> None:
    """Writes `search/subsets.csv` and `search/viable.json`."""
    rows = [
        {
            "budget": bit_string(s.bits),
            "name": budget_name(s.bits),
            "accuracy": s.accuracy,
            "loss": s.loss,
            "decoder_gflops": s.flops / 1e9,
            **level_means(s.tasks, levels),
            "tasks": s.tasks,
        }
        for s in sorted(subsets, key=lambda s: (s.count, s.bits))
    ]
    folder = workdir.path / "search"
    text = io.StringIO()
    flat = [{**{k: v for k, v in row.items() if k != "tasks"}, **row["tasks"]} for row in rows]
    table = csv.DictWriter(text, fieldnames=list(flat[0]))
    table.writeheader()
    table.writerows(flat)
    write_text(folder / "subsets.csv", text.getvalue())
    names = [bit_string(s.bits) for s in kept]
    result = {"num_slots": arch.num_slots, "viable": names, "skipped": skipped, "subsets": rows, "identity": identity}
    write_json(folder / "viable.json", result)
