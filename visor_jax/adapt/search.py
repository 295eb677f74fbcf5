"""Searches for the subsets of self-attention slots that are worth keeping (method.md section 5.3).

Evaluates the trained full model on a held-out split. Writes `search/subsets.csv` (every evaluated subset) and
`search/viable.json` (the viable budgets, cheapest first): the Pareto front of accuracy against FLOPs, plus the best
subset of each count. Up to `search.max_subsets` subsets are all evaluated; with more, the search goes best-first by
count: from the best few subsets of one count to those with one more slot. `search.slots` restricts it to the subsets of
some slots, and says which of them to try first. With `search.early_stopping` a subset is no longer asked once it
surely is not viable (`early_stopping.py`).
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visor_jax.adapt.early_stopping import Race, Stopped
from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, bit_string, budget_name, searched_at_once
from visor_jax.config import Config, ConfigLike, as_config
from visor_jax.data.questions import Questions, single_questions
from visor_jax.data.skips import SkipLog
from visor_jax.data.sources import source_kind
from visor_jax.evaluate.chunks import ChunkStore
from visor_jax.evaluate.features import FeatureStore
from visor_jax.evaluate.scoring import Scores, score, scores_of_chunks
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
    """One evaluated subset.

    Attributes:
      accuracy, loss: mean over tasks, and nats per answer, of the questions that it was asked.
      flops: of the decoder, mean per sample.
      tasks: accuracy of each task.
      questions: number of questions that it was asked.
      better: why it was not asked all of them: this subset of the same count is surely more accurate.
    """

    bits: Bits
    accuracy: float
    loss: float
    flops: float
    tasks: dict[str, float]
    questions: int
    better: Bits | None = None

    @property
    def count(self) -> int:
        return sum(self.bits)


@dataclass(frozen=True)
class Early:
    """Early stopping as the configuration wants it.

    Attributes:
      error: probability of a wrong stop in one evaluation of subsets.
      survivors: how many subsets of each count are needed from it: with a best-first search, those that it extends.
      chunks_per_look: after how many batches subsets may be stopped.
      seed: of the order of the questions.
    """

    error: float
    survivors: int
    chunks_per_look: int
    seed: int

    @classmethod
    def of(cls, config: Config, num_slots: int) -> Early | None:
        """Returns the configured early stopping; None if there is none."""
        search, size = config.search, config.evaluate.batch_size
        if not search.early_stopping:
            return None
        at_once = bool(searched_at_once(num_slots, search.max_subsets, search.slots))
        error = search.early_stopping / (1 if at_once else len(search.slots) or num_slots)  # a level per count
        return cls(error, 1 if at_once else BEAM, -(-search.look_every // size), config.seed)

    @property
    def batches(self) -> dict[str, int]:
        """Arguments of `Questions.batches`."""
        return {"order": self.seed, "portion": self.chunks_per_look}

    def race(self, subsets: Sequence[Bits], questions: Questions) -> Race:
        """Returns the decisions of one evaluation of these subsets."""
        tasks = {place: questions.facts(place).task for place in questions.plan(self.seed)}
        settings = {"error": self.error, "survivors": self.survivors, "chunks_per_look": self.chunks_per_look}
        return Race(subsets, tasks, **settings)


def search_stage(config: ConfigLike, workdir: Workdir, model: Visor) -> list[Bits]:
    """Evaluates subsets of the trained "full" `model`, writes both files and returns the viable budgets."""
    config = as_config(config)
    identity = workdir.identity(config, "search")
    skips, mesh, levels = SkipLog(), scoring_mesh(config), source_kind(config).levels
    questions = single_questions(config, "validation", config.search.samples, skips)
    features = FeatureStore.of(config, workdir)
    chunks = ChunkStore(workdir, "search", identity, "full", with_features=features is not None)
    early = Early.of(config, model.arch.num_slots)

    def evaluate(subsets: Sequence[Bits]) -> list[Subset]:
        race = early.race(subsets, questions) if early else None
        scores = score(
            model.params,
            questions.batches(config.evaluate.batch_size, **early.batches if early else {}),
            subsets,
            model.arch,
            mesh=mesh,
            dtype=config.model.dtype,
            levels=levels,
            chunks=chunks,
            features=features,
            stopping=race,
        )
        return summarize(scores, model.arch, race.stopped if race else ())

    subsets = explore(evaluate, model.arch.num_slots, config.search.max_subsets, config.search.slots)
    kept, skipped = viable(subsets), skips.by_reason()
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
    if subsets := searched_at_once(num_slots, max_subsets, slots):
        return evaluate(subsets)
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
        frontier = sorted((subset for subset in level if subset.better is None), key=better_first)[:BEAM]
    return list(evaluated.values())


def grow(bits: Bits, slot: int) -> Bits:
    """Returns the subset with `slot` turned on."""
    return (*bits[:slot], True, *bits[slot + 1 :])


def better_first(subset: Subset) -> tuple[float, float, float]:
    """Sort key: higher accuracy, then lower loss, then fewer FLOPs."""
    return (-subset.accuracy, subset.loss, subset.flops)


def viable(subsets: Sequence[Subset]) -> list[Subset]:
    """Returns the Pareto front of accuracy against FLOPs plus the best subset of each count, cheapest first.

    Of subsets with the same cost the better one comes first, so taking the first suitable budget takes the better one.
    Subsets that were not asked all questions are not viable.
    """
    subsets = [s for s in subsets if s.better is None]
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


def summarize(scores: Scores, arch: Architecture, stopped: Sequence[Stopped] = ()) -> list[Subset]:
    """Converts scores to one `Subset` per budget; FLOPs of `stopped` ones, too, are means over all questions."""

    def of(bits: Bits, asked: Scores, row: int, better: Bits | None) -> Subset:
        tasks = task_accuracies(asked.correct[row], asked.tasks)
        accuracy, loss = float(np.mean(list(tasks.values()))), -float(asked.log_likelihood[row].mean())
        return Subset(bits, accuracy, loss, mean_decoder_flops(arch, bits, scores), tasks, len(asked.ids), better)

    partial = [scores_of_chunks([one.bits], one.chunks, scores.levels, scores.bytes_per_value) for one in stopped]
    return [
        *(of(bits, scores, row, None) for row, bits in enumerate(scores.budgets)),
        *(of(one.bits, asked, 0, one.better) for one, asked in zip(stopped, partial, strict=True)),
    ]


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
            "questions": s.questions,
            "better": bit_string(s.better) if s.better else None,
            **level_means(s.tasks, levels),
            "tasks": s.tasks,
        }
        for s in sorted(subsets, key=lambda s: (s.count, s.bits))
    ]
    folder = workdir.path / "search"
    text = io.StringIO()
    flat = [{**{k: v for k, v in row.items() if k != "tasks"}, **row["tasks"]} for row in rows]
    table = csv.DictWriter(text, fieldnames=list(max(flat, key=len)))  # a stopped subset may lack tasks
    table.writeheader()
    table.writerows(flat)
    write_text(folder / "subsets.csv", text.getvalue())
    names = [bit_string(s.bits) for s in kept]
    result = {"num_slots": arch.num_slots, "viable": names, "skipped": skipped, "subsets": rows, "identity": identity}
    write_json(folder / "viable.json", result)
