"""Stops asking subsets of slots that are surely not viable, after a part of the questions (docs/search.md).

In: the subsets of a search, its questions in random order, and the scores of one chunk of questions after the other.
Out: the subsets that are still asked, and for each stopped one the better subset and what it scored until then.

A subset is stopped once another one of the same count, and so of the same cost, is surely more accurate over all
questions of the search. For each ordered pair of subsets a gambler bets, question by question, against the hypothesis
that the first one is no more accurate (I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random variables by
betting", 2024, sampling without replacement). If it holds, the wealth is a supermartingale over the random order of the
questions, so the probability that it ever reaches 1 / a is at most a (Ville's inequality), however often one looks. A
union bound over the pairs that can do harm gives the probability for the whole search (`Race`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from visor_jax.budget import Bits, bit_string, parse_bits
from visor_jax.data.questions import Place
from visor_jax.evaluate.chunks import ChunkScores
from visor_jax.scale.gather import gathered

BETS = (0.1, 0.25, 0.45, 0.65, 0.9)  # shares of the wealth that one question may lose; each begins with a fifth of it
ROUNDING = 1e-9  # of sums of weights whose mean is 1


class PairedBets:
    """The wealth of bets that one subset is more accurate than another one, for all ordered pairs of n subsets.

    The accuracy of a subset is the sum of the weights of the questions that it answers rightly.

    Attributes:
      lead: [a, b]: weights of the questions so far that only a answers rightly, less those that only b does.
      wealth: [a, b]: the largest so far of the bets that a is more accurate than b over all questions.
    """

    def __init__(self, count: int, weights: Float[np.ndarray, " N"]) -> None:
        """
        Args:
          count: n, the number of subsets.
          weights: of all questions, in the order in which they are asked: a random one.
        """
        weights = weights / weights.mean()
        self._weights, self._asked = weights, 0
        self._rest = np.append(np.cumsum(weights[::-1])[::-1], 0.0)  # sum of the weights from each question on
        self._largest = np.maximum.accumulate(weights[::-1])[::-1]  # the largest of them
        self._log_wealth = np.zeros((len(BETS), count, count))  # of each bet
        self.lead, self.wealth = np.zeros((count, count)), np.ones((count, count))

    def add(self, correct: Bool[np.ndarray, " n"]) -> None:
        """Takes the next question: which subsets answer it; of a question that cannot be used, none.

        If a is no more accurate than b, the mean of the remaining differences is at most `bound`, because with the lead
        they sum up to at most 0. None is below minus the largest weight, so a bet of g loses at most the share g.
        """
        weight, bound = self._weights[self._asked], -self.lead / (len(self._weights) - self._asked)
        most = bound + self._largest[self._asked]  # that a question can lose
        difference = weight * (correct[:, None].astype(float) - correct[None])
        gain = np.divide(difference - bound, most, out=np.zeros_like(most), where=most > ROUNDING)
        self._log_wealth += np.log1p(np.multiply.outer(BETS, gain))
        self.lead += difference
        self._asked += 1
        with np.errstate(over="ignore"):
            np.maximum(self.wealth, np.exp(self._log_wealth).mean(axis=0), out=self.wealth)
        self.wealth[self.lead > self._rest[self._asked] + ROUNDING] = np.inf  # whatever the remaining answers are

    def keep(self, rows: Sequence[int]) -> None:
        """Ends the bets on all other subsets."""
        pairs = np.ix_(rows, rows)
        self.lead, self.wealth = self.lead[pairs], self.wealth[pairs]
        self._log_wealth = self._log_wealth[:, *pairs]


@dataclass(frozen=True)
class Stopped:
    """A subset that was stopped: the one that is surely more accurate, and the scores of the chunks until then."""

    bits: Bits
    better: Bits
    chunks: list[ChunkScores]


class Race:
    """Which subsets a pass over the questions still asks.

    The best `survivors` subsets of every count are all asked every question, except with the probability `error`. If
    one of them is stopped, the bets of a worse one against it have misled: of each count with n subsets these are at
    most `survivors * (n - 1)` pairs, among which `error` is divided.

    Attributes:
      asked: the subsets that the next chunk is asked under.
      stopped: the others.
      chunks_per_look: the number of chunks between two looks; only then subsets are stopped.
    """

    def __init__(
        self,
        subsets: Sequence[Bits],
        tasks: Mapping[Place, str],
        *,
        error: float,
        survivors: int = 1,
        chunks_per_look: int = 1,
    ) -> None:
        """
        Args:
          subsets: those to ask at first.
          tasks: of the planned questions, in the order in which they are asked: a random one. Tasks count equally.
            Questions that replace unusable ones come after them, and no subset is stopped then.
        """
        self.asked, self.stopped, self.chunks_per_look = list(subsets), list[Stopped](), chunks_per_look
        self._groups = [[bits for bits in subsets if sum(bits) == count] for count in sorted(set(map(sum, subsets)))]
        pairs = sum(min(survivors, len(group)) * (len(group) - 1) for group in self._groups)
        self._survivors, self._enough = survivors, pairs / error
        counts, self._planned = Counter(tasks.values()), tasks.keys()
        weights = np.array([1 / counts[task] for task in tasks.values()])
        self._bets = [PairedBets(len(group), weights) for group in self._groups]
        self._scores: dict[Bits, list[ChunkScores]] = {bits: [] for bits in subsets}
        self._chunks, self._left = 0, len(tasks)

    def add(self, places: Sequence[Place], scores: ChunkScores) -> None:
        """Takes the next chunk's scores under the subsets of `asked`. After a look, there may be fewer."""
        row_of = {bits: row for row, bits in enumerate(self.asked)}
        for bits, row in row_of.items():
            self._scores[bits].append(scores.only([row]))
        if places[0] not in self._planned:
            return
        column_of, unusable = {id: column for column, id in enumerate(scores.ids)}, len(scores.ids)
        columns = [column_of.get(place.id, unusable) for place in places]
        correct = np.pad(scores.correct, [(0, 0), (0, 1)])[:, columns]
        for group, bets in zip(self._groups, self._bets, strict=True):
            rows = [row_of[bits] for bits in group]
            for question in correct[rows].T if len(group) > self._survivors else ():
                bets.add(question)
        self._chunks, self._left = self._chunks + 1, self._left - len(places)
        if self._left and self._chunks % self.chunks_per_look == 0:
            self._look()

    def _look(self) -> None:
        """Stops subsets; the first process decides for all, because others may round differently."""
        names = [[bit_string(bits), bit_string(better)] for bits, better in self._beaten()]
        names = json.loads(gathered([json.dumps(names).encode()])[0][0])
        for bits, better in (map(parse_bits, pair) for pair in names):
            self.stopped.append(Stopped(bits, better, self._scores[bits]))
            self.asked.remove(bits)
            for index, (group, bets) in enumerate(zip(self._groups, self._bets, strict=True)):
                if bits in group:
                    self._groups[index] = [other for other in group if other != bits]
                    bets.keep([row for row, other in enumerate(group) if other != bits])

    def _beaten(self) -> Iterator[tuple[Bits, Bits]]:
        """Yields subsets than which enough of the remaining ones are surely better, with the best of these."""
        for group, bets in zip(self._groups, self._bets, strict=True):
            remaining = np.ones(len(group), bool)
            for row in np.argsort(bets.lead.sum(axis=1), kind="stable"):  # the worst first
                better = remaining & (bets.wealth[:, row] >= self._enough)
                better[row] = False
                if better.sum() >= self._survivors:
                    remaining[row] = False
                    yield group[row], group[np.argmax(np.where(better, bets.lead.sum(axis=1), -np.inf))]
