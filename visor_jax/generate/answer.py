"""Answers with their costs, and the stream that yields an answer piece by piece.

FLOPs and cache bytes are those of `visor_jax.cost` for the sample alone, without padding and without other rows of its
batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, budget_name
from visor_jax.cost import cache_bytes, decode_flops, decoder_flops, route_flops, visual_flops
from visor_jax.data.collate import RowShape


@dataclass(frozen=True)
class Answer:
    """An answer and its cost.

    Attributes:
      text: the answer, without special tokens.
      budget: name of its budget.
      flops: all FLOPs of this answer: tower, connector, reduction, routing, prefill and every decoding step.
      seconds_to_first_token, seconds: wall time for its picture, its prompt and then its batch, until its first and
        its last token, without compilation.
      cache_bytes: size of this sample's cached keys and values at the end of the answer.
      decoder_flops: FLOPs of the decoder and routing.
      complete: whether the model ended it; False if `max_new_tokens` did.
      new_tokens: number of tokens of the text, without the one that ends it.
      seconds_compiling: wall time for compiling programs for new shapes and, before a model's first answer, for
        unstacking its parameters.
    """

    text: str
    budget: str
    flops: float
    seconds_to_first_token: float
    seconds: float
    cache_bytes: int
    decoder_flops: float
    complete: bool
    new_tokens: int
    seconds_compiling: float


@dataclass(frozen=True)
class BudgetAnswers:
    """One question's answers under several budgets.

    Attributes:
      size: of its prompt: tiles, visual positions and text tokens.
      answers: by the name under which a budget was asked for.
    """

    size: RowShape
    answers: dict[str, Answer]


@dataclass
class Seconds:
    """Wall time, with compilation separate."""

    running: float = 0.0
    compiling: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.running + other.running, self.compiling + other.compiling)


@dataclass
class PendingAnswer:
    """An unfinished answer: its tokens and cost so far."""

    size: RowShape
    bits: Bits
    routed: bool
    before: Seconds  # spent before the batch began
    tokens: list[int] = field(default_factory=list)
    complete: bool = False
    first: float = 0.0
    spent: Seconds = field(default_factory=Seconds)

    def add(self, token: int, is_stop: bool, batch: Seconds) -> None:
        """Adds a token, `batch` seconds after its batch began; a stop token ends the answer and is not part of it."""
        self.spent = self.before + batch
        if not self.tokens:
            self.first = self.spent.running
        if is_stop:
            self.complete = True
        else:
            self.tokens.append(token)

    def answer(self, text: str, arch: Architecture, bytes_per_value: int) -> Answer:
        """Returns the finished answer; the last token of an answer that was cut off has not been fed back."""
        visual, prompt = self.size.visual, self.size.text
        fed = len(self.tokens) if self.complete else len(self.tokens) - 1
        decoder = decoder_flops(arch, self.bits, visual, prompt)
        decoder += sum(decode_flops(arch, self.bits, visual, prompt + step) for step in range(1, fed + 1))
        if self.routed:
            decoder += route_flops(arch, visual, prompt)
        return Answer(
            text=text,
            budget=budget_name(self.bits) if self.bits else "dense",
            flops=decoder + visual_flops(arch, self.size.tiles, visual),
            seconds_to_first_token=self.first,
            seconds=self.spent.running,
            cache_bytes=cache_bytes(arch, self.bits, visual, prompt + fed, bytes_per_value),
            decoder_flops=decoder,
            complete=self.complete,
            new_tokens=len(self.tokens),
            seconds_compiling=self.spent.compiling,
        )


class AnswerStream(Iterator[str]):
    """Yields pieces of one answer's text, each of whole characters; joined they are `answer.text`."""

    def __init__(self, pieces: Generator[str, None, Answer]):
        self._pieces = pieces
        self._answer: Answer | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._answer = self._answer or end.value
            raise StopIteration from None

    @property
    def answer(self) -> Answer:
        """Returns the whole answer with its costs; waits for the remaining pieces."""
        for _ in self:
            pass
        if self._answer is None:
            raise RuntimeError("this stream ended with an error and has no answer")
        return self._answer
