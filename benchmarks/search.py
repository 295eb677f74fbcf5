"""Compares the search's pass over subsets of slots with one that runs every subset from the first layer.

    python benchmarks/search.py --workdir runs/almanac_mini                 # the run's own questions and full model
    python benchmarks/search.py --layers 24 --questions 8 --visual 256 --out benchmarks/results/search_random.json

With a workdir, both passes score its search's questions, otherwise random ones with random weights. Reported are the
decoder FLOPs of both, the largest difference of the log-likelihoods, whether the viable budgets are the same, and the
quartiles of the ratio of the times, of rounds in random order.

`early_stopping`, of a workdir: the same scores as a search with `search.early_stopping` sees them, in `--orders` random
orders of the questions: how many times a subset is asked a question, the decoder's FLOPs, and in how many orders the
viable budgets are the same. `llava_ov_0p5b` is the shape of LLaVA-OneVision-0.5B with 8 slots, by formula: 256 subsets,
1,024 questions. Out: `benchmarks/results/search.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from visor_jax.adapt.early_stopping import Race
from visor_jax.adapt.search import summarize, viable
from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, all_subsets, budget_name
from visor_jax.config import architecture, from_dict, load_config
from visor_jax.cost import beginnings, decoder_flops, tree_flops
from visor_jax.data.questions import Place, single_questions
from visor_jax.evaluate.chunks import ChunkScores
from visor_jax.evaluate.prefixes import score_tree
from visor_jax.evaluate.scoring import Scores, one_budget, sample_sizes
from visor_jax.evaluate.visual_tokens import encoder
from visor_jax.loading import load
from visor_jax.testing import random_batch, random_params, tiny_architecture
from visor_jax.workdir.folder import Workdir

BATCH = 64  # questions of a chunk
RESULT = harness.RESULTS / "search.json"
VISUAL, TEXT, QUESTIONS = 2929, 80, 1024  # of the stated case: a page of five tiles


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parsed(argv)
    result: dict[str, Any] = {"arguments": harness.arguments_of(args), **harness.device_facts()}
    result["llava_ov_0p5b"] = stated()
    model = load(Path(args.workdir) / "full") if args.workdir else None
    arch = model.arch if model else tiny_architecture(args.layers)
    params = jax.tree.map(jnp.asarray, model.params if model else random_params(arch))
    batches = of_run(args.workdir) if args.workdir else [random_questions(arch, args)]
    found, scores = compared(params, arch, batches, args.rounds)
    result |= found
    if args.workdir:
        result["early_stopping"] = stopped_early(scores, arch, args)
    harness.save(result, args.out)
    return result


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="a run with a full stage; default: random weights")
    parser.add_argument("--layers", type=int, default=24, help="of the random model: a slot in every three")
    parser.add_argument("--questions", type=int, default=8, help="of the random model")
    parser.add_argument("--visual", type=int, default=256, help="visual positions of the random model's questions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--orders", type=int, default=100, help="random orders of the questions")
    parser.add_argument("--error", type=float, default=0.01, help="search.early_stopping")
    parser.add_argument("--look-every", type=int, default=64, help="search.look_every, in whole batches of 64")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(argv)


def of_run(workdir: str) -> list[Any]:
    """Returns the batches of a run's search."""
    config = from_dict(Workdir(workdir).config())
    questions = single_questions(config, "validation", config.search.samples)
    return list(questions.batches(config.evaluate.batch_size))


def random_questions(arch: Architecture, args: argparse.Namespace) -> Any:
    """Returns a batch of random questions, its visual stream padded to `--visual` random positions."""
    batch = random_batch(arch, [((12, 12),)] * args.questions)
    arrays, extra = dict(batch.arrays), args.visual - batch.arrays["visual_segments"].shape[1]
    for name in ("visual_segments", "visual_positions", "visual_gather", "visual_weights"):
        arrays[name] = np.concatenate([arrays[name], np.repeat(arrays[name][:, :1], extra, axis=1)], axis=1)
    return batch._replace(arrays=arrays)


def stated() -> dict[str, Any]:
    """Returns the FLOPs of searching all subsets of LLaVA-OneVision-0.5B's eight slots, by formula."""
    arch = architecture(load_config("llava_ov_0p5b", []))
    return {"visual_tokens": VISUAL, "text_tokens": TEXT, "questions": QUESTIONS,
            **flops(arch, all_subsets(arch.num_slots), [(VISUAL, TEXT)] * QUESTIONS)}  # fmt: skip


def flops(arch: Architecture, subsets: Sequence[Bits], sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Returns decoder TFLOP of both passes over questions with these numbers of visual and text tokens."""
    distinct = {size: sizes.count(size) for size in set(sizes)}
    naive = sum(n * decoder_flops(arch, bits, *size) for size, n in distinct.items() for bits in subsets)
    tree = sum(n * tree_flops(arch, subsets, *size) for size, n in distinct.items())
    blocks = len(subsets) * arch.num_blocks
    return {
        "subsets": len(subsets), "blocks": blocks, "blocks_of_tree": len(beginnings(subsets, arch.slots_per_block)),
        "decoder_tflop": naive / 1e12, "decoder_tflop_of_tree": tree / 1e12, "times_fewer": naive / tree,
    }  # fmt: skip


def stopped_early(scores: Scores, arch: Architecture, args: argparse.Namespace) -> dict[str, Any]:
    """Returns what a search with early stopping asks in each of several orders of the questions."""
    full = {budget_name(kept.bits) for kept in viable(summarize(scores, arch))}
    naive = flops(arch, scores.budgets, sizes_of(scores))["decoder_tflop_of_tree"]
    asked, spent, same = [], [], 0
    for seed in range(args.orders):
        left, questions, tflop = one_order(scores, arch, np.random.default_rng(seed), args)
        rows = [scores.budgets.index(bits) for bits in left]
        remaining = dataclasses.replace(
            scores, budgets=left, correct=scores.correct[rows], log_likelihood=scores.log_likelihood[rows]
        )
        same += {budget_name(kept.bits) for kept in viable(summarize(remaining, arch))} == full
        asked.append(questions)
        spent.append(tflop / naive)
    everything = scores.correct.size
    return {
        "orders": args.orders, "error": args.error, "same_viable": same,
        "times_asked_without": everything, "times_asked": harness.quartiles(np.array(asked, float)),
        "share_asked": harness.quartiles(np.array(asked) / everything),
        "share_of_the_tree_s_flops": harness.quartiles(np.array(spent)),
    }  # fmt: skip


def one_order(
    scores: Scores, arch: Architecture, rng: np.random.Generator, args: argparse.Namespace
) -> tuple[list[Bits], int, float]:
    """Returns the subsets that were not stopped, how often a subset was asked a question, and decoder TFLOP."""
    order = rng.permutation(len(scores.ids))
    places, sizes = [Place(int(i), 0) for i in range(len(order))], sizes_of(scores)
    tasks = {places[i]: scores.tasks[i] for i in order}
    race = Race(scores.budgets, tasks, error=args.error, chunks_per_look=-(-args.look_every // BATCH))
    asked, tflop = 0, 0.0
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        rows = [scores.budgets.index(bits) for bits in race.asked]
        asked += len(rows) * len(chosen)
        tflop += flops(arch, race.asked, [sizes[i] for i in chosen])["decoder_tflop_of_tree"]
        part = np.ix_(np.array(rows), chosen)
        ids = [places[i].id for i in chosen]
        shape, texts = np.zeros((len(chosen), 3), np.int64), [scores.tasks[i] for i in chosen]
        found = ChunkScores(scores.correct[part], scores.log_likelihood[part], None, shape, ids, texts, [])
        race.add([places[i] for i in chosen], found)
    return race.asked, asked, tflop


def sizes_of(scores: Scores) -> list[tuple[int, int]]:
    """Returns the numbers of visual and prompt tokens of each question."""
    return list(zip(scores.num_visual.tolist(), scores.num_prompt.tolist(), strict=True))


def compared(params: Any, arch: Architecture, batches: Sequence[Any], rounds: int) -> tuple[dict[str, Any], Scores]:
    """Runs both passes; returns their costs, differences and times, and the scores."""
    subsets = all_subsets(arch.num_slots)
    placed = [jax.tree.map(jnp.asarray, dict(batch.arrays)) for batch in batches]
    inputs = [(encoder(arch)(params, arrays), arrays) for arrays in placed]

    def one_by_one() -> list[Any]:
        return [[one_budget(arch)(params, *given, jnp.asarray(bits)) for bits in subsets] for given in inputs]

    def tree() -> list[Any]:
        return [score_tree(params, *given, subsets, arch) for given in inputs]

    passes = {"one_by_one": one_by_one, "tree": tree}
    scores = {name: scores_of(run(), batches, subsets, arch) for name, run in passes.items()}
    times = harness.interleaved({name: harness.timed(run) for name, run in passes.items()}, rounds)
    found = {name: [budget_name(kept.bits) for kept in viable(summarize(s, arch))] for name, s in scores.items()}
    first, second = (scores[name] for name in passes)
    sizes = sizes_of(second)
    result = {
        "questions": len(sizes),
        **flops(arch, subsets, sizes),
        "largest_difference_nats": float(np.abs(first.log_likelihood - second.log_likelihood).max()),
        "right_answers_differ": int(np.sum(first.correct != second.correct)),
        "viable": found["tree"],
        "same_viable": found["tree"] == found["one_by_one"],
        "times_faster": harness.quartiles(times["one_by_one"] / times["tree"]),
        "seconds": {name: harness.quartiles(of_pass) for name, of_pass in times.items()},
    }
    return result, second


def scores_of(passed: list[Any], batches: Sequence[Any], subsets: list[Bits], arch: Architecture) -> Scores:
    """Returns the scores of a pass over the rows that hold questions."""
    correct, likelihood, sizes, tasks, ids = [], [], [], [], []
    for of_batch, batch in zip(passed, batches, strict=True):
        rows = np.flatnonzero(batch.arrays["loss_mask"].any(axis=1))
        correct.append(np.stack([np.asarray(c)[rows] for c, _ in of_batch]))
        likelihood.append(np.stack([np.asarray(x)[rows] for _, x in of_batch]))
        sizes.append(sample_sizes(batch, arch)[rows])
        tasks += [batch.tasks[row][0] for row in rows]
        ids += [batch.ids[row] for row in rows]
    counts = np.concatenate(sizes).T
    return Scores(subsets, np.concatenate(correct, 1), np.concatenate(likelihood, 1), None, tasks, ids, *counts)


if __name__ == "__main__":
    main()
