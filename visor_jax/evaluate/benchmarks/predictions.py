"""Answers the questions of a benchmark greedily under several budgets, and keeps the answers chunk by chunk.

In: an opened `Table`, a model, budgets. Out: a prediction for every question and budget, a JSON object each (`Line`):

    {"row", "id", "budget", "route", "question", "answer", "reference", "scores": {metric: score}, "facts",
     "decoder_flops", "prompt_decoder_flops", "flops", "cache_bytes", "prompt_cache_bytes", "visual_tokens",
     "whole_visual_tokens", "text_tokens", "tiles", "complete", "problem"}

`budget` is the name that was asked for and `route` the budget that answered, which differ for "auto". `decoder_flops`
include the new tokens and the routing, `prompt_decoder_flops` end with the logits of the first new token; likewise
`cache_bytes` are those at the end of the answer, and `prompt_cache_bytes` those of the prompt. `whole_visual_tokens`
would be read without packing and reduction. A question that cannot be asked, because a picture is broken or the prompt
is longer than the model's positions, has a `problem`, and its answer is wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, Budget, bit_string
from visor_jax.cost import cache_bytes, decoder_flops, route_flops
from visor_jax.data.anyres import whole_token_count
from visor_jax.data.questions import READ_THREADS
from visor_jax.data.row_shape import RowShape
from visor_jax.data.sample import SkipSample
from visor_jax.errors import RequestError
from visor_jax.evaluate.benchmarks.base import Benchmark, Item, Line, each_question
from visor_jax.evaluate.benchmarks.folder import Table
from visor_jax.evaluate.chunks import PassFolder, ProcessShares
from visor_jax.files.json_shape import AMOUNT, COUNT, FLAG, FRACTION, TEXT, check_shape, each, list_of
from visor_jax.files.read_write import parse_json, read_regular, write_bytes
from visor_jax.generate.answer import Answer, BudgetAnswers
from visor_jax.loading import Visor
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.supervision import beat

log = logging.getLogger(__name__)

MAX_CHUNK_BYTES = 2**28
SHAPE = list_of(
    {
        "row": COUNT,
        **dict.fromkeys(("visual_tokens", "whole_visual_tokens", "text_tokens", "tiles"), COUNT),
        **dict.fromkeys(("cache_bytes", "prompt_cache_bytes"), COUNT),
        **dict.fromkeys(("id", "budget", "route", "question", "answer", "problem"), TEXT),
        "scores": each(FRACTION),
        "complete": FLAG,
        **dict.fromkeys(("decoder_flops", "prompt_decoder_flops", "flops"), AMOUNT),
    }
)
Budgets = Mapping[str, Bits | None]


class PredictionStore(PassFolder):
    """The predictions of one pass, a file of JSON lines for each chunk."""

    def load(self, rows: Sequence[int], budgets: Budgets) -> list[Line] | None:
        """Returns the predictions of a chunk; None if they are not stored, or damaged (with a warning)."""
        path = self._path(rows, budgets)
        if not path.exists():
            return None
        try:
            lines = unpack(read_regular(path, MAX_CHUNK_BYTES))
            check_shape(lines, SHAPE, path)
            if [(line["row"], line["budget"]) for line in lines] != [(row, name) for row in rows for name in budgets]:
                raise ValueError("its predictions are of other questions or budgets")
        except (RequestError, ValueError) as error:
            log.warning("%s: cannot be used and is computed again: %s", path, error)
            return None
        return lines

    def save(self, rows: Sequence[int], budgets: Budgets, lines: Sequence[Line]) -> None:
        """Writes the predictions of a chunk."""
        write_bytes(self._path(rows, budgets), pack(lines))

    def _path(self, rows: Sequence[int], budgets: Budgets):
        bits = {name: None if bits is None else bit_string(bits) for name, bits in budgets.items()}
        return self.path({"rows": list(rows), "budgets": bits}, ".jsonl")


@dataclass(frozen=True)
class Opened:
    """A question with its pictures, or the problem with them."""

    row: int
    item: Item
    pictures: Sequence[np.ndarray]
    problem: str = ""


def predict(
    table: Table, model: Visor, budgets: Budgets, store: PredictionStore, *, count: int, batch_size: int
) -> list[Line]:
    """Returns the predictions of the first `count` questions, by row and then by budget.

    A chunk of `batch_size` questions is written when it is complete, and read if an earlier run has written it. Several
    processes divide the chunks; each returns all predictions.
    """
    chunks = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    known = [store.load(rows, budgets) for rows in chunks]
    shares = ProcessShares[list[Line]](pack, unpack)
    mine = shares.mine([index for index, lines in enumerate(known) if lines is None])
    with contextlib.closing(read_ahead(table, [row for index in mine for row in chunks[index]], batch_size)) as opened:
        for number, index in enumerate(mine):
            beat()
            fault_point("score")
            lines = answered(table.benchmark, model, budgets, list(itertools.islice(opened, len(chunks[index]))))
            store.save(chunks[index], budgets, lines)
            shares.add(lines)
            fault_point("chunk", number)
    return [line for lines in shares.fill(known) for line in lines]


def read_ahead(table: Table, rows: Sequence[int], ahead: int) -> Generator[Opened]:
    """Yields questions with their pictures, which a few threads read and decode up to `ahead` questions earlier."""
    if not rows:
        return

    def load(row: int) -> Opened:
        try:
            return Opened(row, table.items[row], table.pictures(row))
        except SkipSample as why:
            log.warning("--data: %s: counts as wrong: %s", table.place(row), why)
            return Opened(row, table.items[row], [], f"{why.reason}: {why}")

    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=max(ahead, READ_THREADS))
    found = iter(grain.MapDataset.source(rows).map(load).to_iter_dataset(options))
    try:
        yield from found
    finally:
        found.close()


def answered(benchmark: Benchmark, model: Visor, budgets: Budgets, opened: Sequence[Opened]) -> list[Line]:
    """Returns the predictions for questions, by question and then by budget."""

    def asked() -> Iterator[tuple[Sequence[np.ndarray], str]]:
        for question in opened:
            if not question.problem:
                beat()
                yield question.pictures, question.item.prompt

    results, lines = iter(model.answer_budgets(asked(), budgets, benchmark.max_new_tokens)), []
    for question in opened:
        result = None if question.problem else next(results)
        if isinstance(result, BudgetAnswers):
            lines += [answer_line(benchmark, model, question, result, name, budgets[name]) for name in budgets]
        else:
            problem = question.problem if result is None else f"not_askable: {result}"
            lines += [problem_line(benchmark, question, name, problem) for name in budgets]
    return lines


def answer_line(
    benchmark: Benchmark, model: Visor, question: Opened, result: BudgetAnswers, name: str, bits: Bits | None
) -> Line:
    """Returns the prediction of one budget."""
    answer = result.answers[name]
    return {
        **common(question, name),
        "answer": answer.text,
        "scores": checked_scores(benchmark, answer.text, question.item),
        **answer_costs(answer, result.size, model.arch, model.dtype.itemsize, routed=bits is None),
        "whole_visual_tokens": whole_token_count([picture.shape[:-1] for picture in question.pictures], model.arch),
        "problem": "",
    }


def checked_scores(benchmark: Benchmark, answer: str, item: Item) -> dict[str, float]:
    """Returns the scores of an answer.

    Raises:
      RequestError: one is not in [0, 1], or there are several and the benchmark does not say which counts.
    """
    scores = benchmark.score(answer, item)
    where = f"benchmark {benchmark.name}: score({answer!r:.60}, ...)"
    for name, value in scores.items():
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise RequestError(f"{where}: {name} is {value!r}; expected a number from 0 to 1")
    if benchmark.units is each_question and len(scores) != 1:
        raise RequestError(
            f"{where}: has {len(scores)} scores, {', '.join(scores) or 'none'}; expected one, or a function `units`"
            " that says which value of a question counts in the headline"
        )
    return scores


def answer_costs(
    answer: Answer, size: RowShape, arch: Architecture, bytes_per_value: int, *, routed: bool
) -> dict[str, Any]:
    """Returns the fields of a prediction that say what its answer cost.

    Args:
      answer: the answer.
      size: of its prompt.
      arch: of the model.
      bytes_per_value: of the cache.
      routed: whether the policy chose the budget.
    """
    bits = () if arch.plan == "dense" else Budget.parse(answer.budget).resolve(arch.num_slots)
    routing = route_flops(arch, size.visual, size.text) if routed else 0.0
    return {
        "route": answer.budget,
        "decoder_flops": answer.decoder_flops,
        "prompt_decoder_flops": routing + decoder_flops(arch, bits, size.visual, size.text),
        "flops": answer.flops,
        "cache_bytes": answer.cache_bytes,
        "prompt_cache_bytes": cache_bytes(arch, bits, size.visual, size.text, bytes_per_value),
        "visual_tokens": size.visual,
        "text_tokens": size.text,
        "tiles": size.tiles,
        "complete": answer.complete,
    }


def problem_line(benchmark: Benchmark, question: Opened, name: str, problem: str) -> Line:
    """Returns the prediction for a question that cannot be asked: an empty answer whose scores are 0."""
    costs = ("decoder_flops", "prompt_decoder_flops", "flops", "cache_bytes", "prompt_cache_bytes")
    numbers = (*costs, "visual_tokens", "whole_visual_tokens", "text_tokens", "tiles")
    return {
        **common(question, name),
        "route": "",
        "answer": "",
        "scores": dict.fromkeys(benchmark.score("", question.item), 0.0),
        **dict.fromkeys(numbers, 0),
        "complete": False,
        "problem": problem,
    }


def common(question: Opened, name: str) -> dict[str, Any]:
    """Returns the fields of a prediction that depend on the question only, and the budget's name."""
    return {"row": question.row, "budget": name, **common_fields(question.item)}


def common_fields(item: Item) -> dict[str, Any]:
    """Returns the fields of a question's predictions that are the same for every model."""
    reference = item.reference if isinstance(item.reference, str) else list(item.reference)
    return {"id": item.id, "question": item.prompt, "reference": reference, "facts": dict(item.facts)}


def pack(lines: Sequence[Line]) -> bytes:
    """Returns predictions as lines of JSON."""
    return "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")


def unpack(content: bytes) -> list[Line]:
    """Returns the predictions in lines of JSON.

    Raises:
      ValueError: a line is not JSON.
    """
    return [parse_json(line) for line in content.splitlines()]
