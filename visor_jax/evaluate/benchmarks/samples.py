"""The questions of public benchmarks with a model's own answers, as a source of samples.

In: opened tables and a model. Out: `AnsweredBenchmarks`, which `data.questions` reads like any other source, and the
benchmark's score of each answer. Passes that compare a changed model with the whole one use it, such as the analysis of
layers: a benchmark accepts many spellings of an answer, and the model has one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Sequence

import numpy as np

from visor_jax.data.chat import mark_pictures
from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.sample import NO_PICTURE, Sample, Turn
from visor_jax.errors import RequestError
from visor_jax.evaluate.benchmarks.base import Line
from visor_jax.evaluate.benchmarks.folder import PICTURES, Table
from visor_jax.evaluate.benchmarks.predictions import answered, read_ahead
from visor_jax.generate.visor import Visor
from visor_jax.workdir.supervision import beat

log = logging.getLogger(__name__)


class AnsweredBenchmarks:
    """The first questions of each table that a dense model answers; the task of a question is its benchmark's name.

    Attributes:
      levels: of the benchmarks.
      scores: of the answers, by index.
    """

    name = "benchmarks"

    def __init__(self, tables: Sequence[Table], model: Visor, *, limit: int, batch_size: int) -> None:
        """Asks the questions.

        Left out are those that cannot be asked, that the model answers with nothing, or at greater length than the
        benchmark's `max_new_tokens`.

        Args:
          limit: of the questions of each benchmark.
          batch_size: questions that are answered together.

        Raises:
          RequestError: no question is answered.
        """
        self.levels = {table.benchmark.name: table.benchmark.level for table in tables}
        self._places: list[tuple[Table, Line]] = []
        for table in tables:
            lines = own_answers(table, model, min(limit, len(table)), batch_size)
            answered = [line for line in lines if line["answer"].strip() and IMAGE_MARKER not in line["answer"]]
            # The passes ask whether a changed model ends its answer there too, which one that was cut off does not.
            usable = [line for line in answered if line["complete"]]
            for problem, count in (
                ("have no answer", len(lines) - len(answered)),
                ("have an answer that was cut off", len(answered) - len(usable)),
            ):
                if count:
                    log.warning("%s: %d questions %s and are left out", table.benchmark.name, count, problem)
            self._places += [(table, line) for line in usable]
        if not self._places:
            raise RequestError(f"--benchmark={','.join(self.levels)}: the model answers none of the questions")
        self.scores = [float(next(iter(line["scores"].values()))) for _, line in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """Returns a question with its pictures and the model's answer.

        Raises:
          SkipSample: a picture is broken or missing.
          IndexError: there is no such question.
        """
        table, line = self._places[index]
        return self._sample(index, table.pictures(line["row"]))

    def outline(self, index: int) -> Sample:
        """Returns a question with `NO_PICTURE` for each picture; whole if a column holds any number of them.

        Raises:
          SkipSample, IndexError: as `[]`.
        """
        table, line = self._places[index]
        names = table.items[line["row"]].pictures
        if any(table.benchmark.columns.get(name) == PICTURES[1] for name in names):
            return self[index]
        return self._sample(index, [NO_PICTURE] * len(names))

    def _sample(self, index: int, pictures: Sequence[np.ndarray]) -> Sample:
        table, line = self._places[index]
        name = table.benchmark.name
        (question,) = mark_pictures([line["question"]], len(pictures))  # as `Visor.answer` asks it
        turn = Turn(question, line["answer"], name)
        return Sample(f"{name}/{line['row']}", tuple(pictures), (turn,), name, table.benchmark.level)


def own_answers(table: Table, model: Visor, count: int, batch_size: int) -> list[Line]:
    """Returns a dense model's predictions for the first `count` questions."""
    lines: list[Line] = []
    with contextlib.closing(read_ahead(table, range(count), batch_size)) as opened:
        while batch := list(itertools.islice(opened, batch_size)):
            beat()
            lines += answered(table.benchmark, model, {"dense": ()}, batch)
    return lines
