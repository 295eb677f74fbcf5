"""Scores as the tests of early stopping want them: slot 0 answers every question, the others every fourth one.

As a program it runs a command of `visor` with such scores: `python wanted_scores.py search --workdir=RUN`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np

from visor_jax.__main__ import main
from visor_jax.budget import Bits
from visor_jax.data.questions import Chunk
from visor_jax.evaluate import scoring
from visor_jax.evaluate.chunks import ChunkScores

Score = Callable[[scoring.Scorer, Chunk[ChunkScores]], ChunkScores]


def as_wanted(score: Score, seen: Callable[[Sequence[Bits], int], object] = lambda *_: None) -> Score:
    """Returns `score` with the wanted answers; tells `seen` the budgets and the number of questions of each chunk."""

    def wanted(self: scoring.Scorer, part: Chunk[ChunkScores]) -> ChunkScores:
        budgets, scores = self.asked(), score(self, part)
        seen(budgets, len(scores.ids))
        easy = np.array([int(id.split("/")[0]) % 4 == 0 for id in scores.ids])
        for row, bits in enumerate(budgets):
            scores.correct[row] = easy | bits[0]
        return scores

    return wanted


if __name__ == "__main__":
    scoring.Scorer.score = as_wanted(scoring.Scorer.score)
    sys.exit(main())
