"""How much of what is printed on a page a token reduction keeps, and how accuracy depends on it.

    python benchmarks/kept_ink.py --models runs/claims/dense_hired_4_1 runs/claims/dense_divprune_4_1

In: workdirs of models with a reduction that chooses tokens, and the dense model that they started from. All see the
same test questions. A pixel is ink if a color channel differs from the page's most frequent color by more than
`DIFFERENCE` of 255. Out: `benchmarks/results/kept_ink.json` (or `--out`) and a table: the share of patches that have
ink, the shares of patches and of ink that the method keeps, what as many patches could keep of the ink ("most
possible"), and, by how much of a page's ink is kept, the accuracy on hard questions, that of the dense base on the same
ones, and their number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np
from jaxtyping import Bool, Float
from shifts import by_folder_name, config_of, on_pages

import visor_jax
from visor_jax.config import Config
from visor_jax.data.collate import Batch
from visor_jax.data.questions import Questions, single_questions
from visor_jax.data.sources import source_kind
from visor_jax.errors import RequestError
from visor_jax.evaluate.scoring import score
from visor_jax.generate.visor import Visor
from visor_jax.model.reduction.api import METHODS, kept_candidates
from visor_jax.scale.mesh import scoring_mesh

RESULT = harness.RESULTS / "kept_ink.json"
DIFFERENCE = 40
BINS = (0.0, 0.5, 0.7, 0.9)  # lower ends, of the share of the ink that is kept


def ink_of(picture: np.ndarray, patch: int) -> Float[np.ndarray, " P"]:
    """Returns the share of a page's ink that is in each patch, in raster order; picture: uint8 [H, W, 3]."""
    colors, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    paper = colors[counts.argmax()].astype(int)
    ink = (np.abs(picture.astype(int) - paper).max(axis=2) > DIFFERENCE).astype(float)
    rows, columns = (size // patch for size in ink.shape)
    of_patch = ink.reshape(rows, patch, columns, patch).sum(axis=(1, 3)).ravel()
    return of_patch / max(of_patch.sum(), 1.0)


def kept_patches(batch: Batch, kept: Bool[np.ndarray, "B N"], patches: int) -> Bool[np.ndarray, "B P"]:
    """Returns which patches of each row's only tile remain."""
    found = np.zeros((len(kept), patches), bool)
    is_patch = (batch.arrays["visual_pictures"] > 0) & (batch.arrays["visual_gather"][..., 0] < patches)
    for row, column in np.argwhere(kept & is_patch):
        found[row, batch.arrays["visual_gather"][row, column, 0]] = True
    return found


def pages(model: Visor, questions: Questions, config: Config) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields of every question: id, share of the ink in each patch, which patches remain."""
    program, patch = jax.jit(partial(kept_candidates, arch=model.arch)), model.arch.vision.patch_size
    for batch in questions.batches(config.evaluate.batch_size):
        kept = np.asarray(program(model.params, batch.arrays))
        remaining = kept_patches(batch, kept, model.arch.vision.patches_per_tile)
        for row, id in enumerate(batch.ids):
            pictures, side = [np.asarray(picture) for picture in questions.find(id).images], model.arch.vision.tile_size
            if [picture.shape for picture in pictures] != [(side, side, 3)]:
                raise RequestError(f"question {id}: expected one picture of one tile of {side} x {side} pixels")
            yield id, ink_of(pictures[0], patch), remaining[row]


def answers(model: Visor, config: Config, questions: Questions) -> dict[str, tuple[str, bool]]:
    """Returns of every question its level and whether the model answers it with all slots on."""
    levels, full = source_kind(config).levels, (True,) * model.arch.num_slots
    batches = questions.batches(config.evaluate.batch_size)
    scores = score(model.params, batches, [full], model.arch, mesh=scoring_mesh(config))
    answered = zip(scores.ids, scores.tasks, scores.correct[0].tolist(), strict=True)
    return {id: (levels.get(task, ""), right) for id, task, right in answered}


def same_questions(own: Questions, other: Questions) -> bool:
    """Whether both ask the same about the same pictures, question by question."""
    pairs = ((own.read(place), other.read(place)) for place in own.plan())
    return own.plan() == other.plan() and all(
        a.turns == b.turns and all(map(np.array_equal, a.images, b.images)) for a, b in pairs
    )


def measured(
    name: str, base: Mapping[str, tuple[str, bool]], of_base: Questions, samples: int, seed: int
) -> dict[str, Any]:
    """Returns the figures of one model; `base`: what the dense base answers to the questions `of_base`."""
    model, config = visor_jax.load(name), on_pages(config_of(name), {}, samples, seed)
    if model.arch.reduction.method not in METHODS:
        raise RequestError(f"--models={name}: has no reduction that chooses tokens; expected {', '.join(METHODS)}")
    questions = single_questions(config, "test", samples)
    if not same_questions(questions, of_base):
        raise RequestError(
            f"--models={name}: is asked other questions than --base; expected a run whose data.* draws the same pages"
            " and has room for the same questions"
        )
    own = answers(model, config, questions)
    rows = [(id, ink, kept, float(ink[kept].sum())) for id, ink, kept in pages(model, questions, config)]
    hard = [(share, own[id][1], base[id][1]) for id, _, _, share in rows if own[id][0] == "hard"]
    by_share = {}
    for low, high in zip(BINS, (*BINS[1:], np.inf), strict=True):
        inside = [(right, of_base) for share, right, of_base in hard if low <= share < high]
        means = np.mean(inside, axis=0).tolist() if inside else [None, None]
        by_share[f"from {100 * low:.0f} %"] = {"hard": means[0], "base": means[1], "questions": len(inside)}
    return {
        "method": model.arch.reduction.method,
        "patches_with_ink": float(np.mean([(ink > 0).mean() for _, ink, _, _ in rows])),
        "patches_kept": float(np.mean([kept.mean() for _, _, kept, _ in rows])),
        "ink_kept": float(np.mean([share for *_, share in rows])),
        "most_possible": float(np.mean([np.sort(ink)[-kept.sum() :].sum() for _, ink, kept, _ in rows])),
        "hard": float(np.mean([right for _, right, _ in hard])),
        "by_ink_kept": by_share,
    }


def table(report: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table in Markdown."""
    columns = ("patches_with_ink", "patches_kept", "ink_kept", "most_possible", "hard")
    bins = list(next(iter(report.values()))["by_ink_kept"])
    yield "| model | " + " | ".join([name.replace("_", " ") for name in columns] + bins) + " |"
    yield "| --- |" + " ---: |" * (len(columns) + len(bins))
    for name, row in report.items():
        cells = [f"{100 * row[column]:.1f}" for column in columns]
        for part in row["by_ink_kept"].values():
            count = part["questions"]
            cells.append(f"{100 * part['hard']:.0f} of {100 * part['base']:.0f} ({count})" if count else "-")
        yield f"| {name} | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures all models; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="workdirs")
    parser.add_argument("--base", default="almanac-base")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1, help="of the questions")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(arguments)
    try:
        models = by_folder_name(args.models)
        config = on_pages(config_of(args.base), {}, args.samples, args.seed)
        questions = single_questions(config, "test", args.samples)
        base = answers(visor_jax.load(args.base), config, questions)
        report = {name: measured(model, base, questions, args.samples, args.seed) for name, model in models.items()}
    except RequestError as error:
        print(f"kept_ink.py: {error}", file=sys.stderr)
        return 2
    print(*table(report), sep="\n")
    harness.save(
        {"arguments": {name: value for name, value in vars(args).items() if name != "out"}, **report}, args.out
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
