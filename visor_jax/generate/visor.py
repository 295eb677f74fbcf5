"""`Visor`: a loaded model that answers questions about pictures and says what each answer cost.

In: parameters, architecture, tokenizer, viable budgets. Out: answers (whole, in batches, in pieces), logits, routes.
A `Visor` compiles per bucket of shapes and per budget, and keeps what it compiled (`visor_jax.generate.engine`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, Budget, budget_name
from visor_jax.cost import decoder_flops
from visor_jax.data.collate import Example
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.errors import RequestError
from visor_jax.generate.answer import Answer, AnswerStream, PendingAnswer, Seconds
from visor_jax.generate.buckets import batches
from visor_jax.generate.detokenize import Characters
from visor_jax.generate.engine import Engine, PrefillState
from visor_jax.generate.request import (
    EXPECTED_QUESTION,
    History,
    Pictures,
    QuestionItem,
    Request,
    check_fits,
    checked_item,
    checked_stops,
    prompt_of,
    tokens_of,
)
from visor_jax.generate.sampling import Sampling
from visor_jax.model.layers import Params

PREFILL_AHEAD = 32  # questions whose pictures are encoded before the first of them is answered


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt after its shared prefill: the state, the budget it continues under, and the seconds spent so far."""

    prompt: Example
    state: PrefillState
    bits: Bits
    routed: bool
    spent: Seconds


class Visor:
    """A model with its tokenizer: answers, logits, routes. Made by `load`.

    What is asked about, in `answer`, `answer_many`, `stream` and `route`:

      image: a picture, several in a list, or None (or an empty list) for a question without one. A picture is a file's
        path or its bytes (JPEG, PNG, WebP, GIF), a PIL image, uint8 [H, W, 3], or a video's frames, uint8 [F, H, W, 3].
      question: text; `<image>` in it says where a picture belongs, without it they come first.
      history: the turns before this question, [(question, answer), ...]. The pictures belong to the whole
        conversation and stand in its first question, as in training.

    `answer`, `answer_many` and `stream` share their settings:

      budget: "auto" (the policy decides), "full", "empty", a number of slots, or the bits of a viable budget.
      max_new_tokens: the answer is cut off there.
      dial: shifts the policy towards cheaper (below 0) or more accurate (above 0) budgets.
      temperature, top_p, seed: 0 takes the best token; otherwise tokens are drawn (`generate.sampling.Sampling`), and
        the same seed draws the same answer.
      stop: texts of one token each that end an answer, beside the end of the turn.

    Each raises RequestError for an unusable picture or question, one that is longer than the model's positions, a
    budget that does not fit or is not viable, "auto" without a policy, and settings outside their ranges.

    Attributes:
      source: where the model was loaded from.
      stage: the training stage that it comes from, "" where there was none.
    """

    def __init__(
        self,
        params: Params,
        arch: Architecture,
        tokenizer: ChatTokenizer,
        viable_budgets: Sequence[Bits],
        *,
        system: str | None = None,
        has_policy: bool = False,
        searched: bool = False,
        stage: str = "",
        stop_token_ids: Sequence[int] = (),
        source: str = "",
    ):
        self.arch, self.tokenizer, self.system = arch, tokenizer, system
        self.stage, self.source = stage, source
        self.fingerprint = ""  # of the run's stage that it is: `StageFolder.fingerprint`
        self.viable_budgets = [tuple(bits) for bits in viable_budgets]
        self.has_policy, self.searched = has_policy, searched
        self.stop_token_ids = frozenset({tokenizer.end_token_id, *stop_token_ids})
        self._engine = Engine(params, arch, len(self.viable_budgets), tokenizer.image_token_id)

    @property
    def params(self) -> Params:
        """The parameters: arrays in the tree of `model.visor.init_params`, stacked again after the first question."""
        return self._engine.params

    def with_params(self, params: Params) -> Visor:
        """The same model with other parameters of the same shapes."""
        return Visor(
            params,
            self.arch,
            self.tokenizer,
            self.viable_budgets,
            system=self.system,
            has_policy=self.has_policy,
            searched=self.searched,
            stage=self.stage,
            stop_token_ids=tuple(self.stop_token_ids),
            source=self.source,
        )

    def __repr__(self) -> str:
        """Size, plan, budgets and where it comes from, on one line."""
        where = f" from {self.source}" if self.source else ""
        stage = f", stage {self.stage}" if self.stage else ""
        parts = [f"{self._engine.num_parameters:,} parameters in {self._engine.dtype}", f"plan {self.arch.plan}"]
        if self.arch.plan == "visor":
            kind = "viable budgets" if self.searched else "budgets, not searched:"
            names = [*(["auto"] if self.has_policy else []), *map(budget_name, self.viable_budgets)]
            parts += [f"{self.arch.num_slots} slots", f"{kind} {' '.join(names)}"]
            parts += ["with a policy" if self.has_policy else "no policy"]
        return f"<Visor{where}{stage}: {', '.join(parts)}>"

    # --- questions ----------------------------------------------------------------------------------------------------

    def answer(
        self,
        image: Pictures,
        question: str,
        budget: str | Budget = "auto",
        max_new_tokens: int = 64,
        dial: float = 0.0,
        *,
        history: History = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Answer:
        """The answer to one question about one picture, several or none, after the turns of `history`."""
        request = self._request(budget, max_new_tokens, dial, Sampling(temperature, top_p, seed), stop)
        return self._answers([self._asked(image, question, history, request)], request)[0]

    def answer_many(
        self,
        questions: Iterable[QuestionItem],
        budget: str | Budget = "auto",
        max_new_tokens: int = 64,
        dial: float = 0.0,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """Answers to many questions, in order: the same as one by one, in batches of one route and of alike size.

        `questions` is any iterable of (image, question) or (image, question, history). It is read as it is answered,
        `PREFILL_AHEAD` questions at a time, so that a generator's pictures are never all in memory.
        """
        request = self._request(budget, max_new_tokens, dial, Sampling(temperature, top_p, seed), stop)
        if isinstance(questions, str | bytes | dict) or not isinstance(questions, Iterable):
            raise RequestError(f"questions: {EXPECTED_QUESTION}s, any iterable of them, got {type(questions).__name__}")
        numbered, answers = enumerate(questions), list[Answer]()
        while wave := list(itertools.islice(numbered, PREFILL_AHEAD)):
            prompts = [self._numbered(number, item, request) for number, item in wave]
            answers += self._answers(prompts, request)
        return answers

    def stream(
        self,
        image: Pictures,
        question: str,
        budget: str | Budget = "auto",
        max_new_tokens: int = 64,
        dial: float = 0.0,
        *,
        history: History = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> AnswerStream:
        """The same answer in pieces of whole characters, as tokens are chosen; `.answer` of the stream is the whole
        answer with its costs.
        """
        request = self._request(budget, max_new_tokens, dial, Sampling(temperature, top_p, seed), stop)
        return AnswerStream(self._pieces(self._asked(image, question, history, request), request))

    def logits(
        self, token_ids: Sequence[int], images: Pictures, budget: str | Budget = "full"
    ) -> Float[np.ndarray, "S V"]:
        """Next-token logits at every text token of a sequence with one placeholder id per picture, in order.

        Any budget may be asked for, viable or not.
        """
        prompt = tokens_of(token_ids, images, self.tokenizer, self.arch)
        bits = self._budget(budget)
        if bits is None:
            bits = self._pick(self._engine.prefill_shared(prompt, routed=True), prompt, 0.0)
        return self._engine.logits(prompt, bits)

    def route(self, image: Pictures, question: str, history: History = ()) -> Float[np.ndarray, " viable"]:
        """The policy's probabilities over `viable_budgets`; the routing token stands behind `question`."""
        self._require_policy()
        scores = self._engine.prefill_shared(self._prompt(image, question, history), routed=True).scores
        found = np.asarray(scores)[0, : len(self.viable_budgets)]
        weights = np.exp(found - found.max())
        return weights / weights.sum()

    # --- from questions to answers ------------------------------------------------------------------------------------

    def _answers(self, prompts: Sequence[Example], request: Request) -> list[Answer]:
        asked = [self._prepare(prompt, request) for prompt in prompts]
        answers: dict[int, Answer] = {}
        for bits in dict.fromkeys(one.bits for one in asked):
            same = [index for index, one in enumerate(asked) if one.bits == bits]
            for group in batches([asked[index].state.row_shape for index in same]):
                members = [same[i] for i in group]
                answers |= zip(members, self._answer_batch([asked[i] for i in members], request), strict=True)
        return [answers[index] for index in range(len(asked))]

    def _prepare(self, prompt: Example, request: Request) -> Question:
        """Runs the shared prefill and chooses the budget."""
        routed, spent = request.budget is None, Seconds()
        with self._engine.programs.timed(spent):
            state = self._engine.prefill_shared(prompt, routed=routed)
            bits = self._pick(state, prompt, request.dial) if request.budget is None else request.budget
            jax.block_until_ready(state.prefix)
        return Question(prompt, state, bits, routed, spent)

    def _answer_batch(self, asked: Sequence[Question], request: Request) -> list[Answer]:
        """Answers of one batch, all of whose questions have the same budget."""
        pending = [PendingAnswer(one.prompt.size, one.bits, one.routed, one.spent) for one in asked]
        for _ in self._steps(asked, pending, request):
            pass
        return [self._finish(answer) for answer in pending]

    def _pieces(self, prompt: Example, request: Request) -> Generator[str, None, Answer]:
        """Yields the text of one answer as its tokens are chosen; returns the answer."""
        asked = self._prepare(prompt, request)
        characters = Characters(self.tokenizer)
        pending = PendingAnswer(prompt.size, asked.bits, asked.routed, asked.spent)
        for _ in self._steps([asked], [pending], request):
            piece = "" if pending.complete else characters.add(pending.tokens[-1])
            if piece:
                yield piece
        rest = characters.rest()
        if rest:
            yield rest
        return self._finish(pending)

    def _steps(self, asked: Sequence[Question], pending: Sequence[PendingAnswer], request: Request) -> Iterator[None]:
        """Decodes: each step adds a token to every pending answer that has not ended, or ends it."""
        rows, bits, batch = [one.state for one in asked], asked[0].bits, Seconds()
        steps = self._engine.tokens(rows, bits, request.sampling, request.stops, request.max_new_tokens)
        while True:
            with self._engine.programs.timed(batch):  # what the caller does between two steps is not counted
                tokens = next(steps, None)
            if tokens is None:
                return
            for answer, token in zip(pending, tokens, strict=True):
                if token is not None:
                    answer.add(token, token in request.stops, batch)
            yield

    def _finish(self, pending: PendingAnswer) -> Answer:
        text = self.tokenizer.decode(pending.tokens)
        return pending.answer(text, self.arch, self._engine.bytes_per_value)

    # --- requests and budgets -----------------------------------------------------------------------------------------

    def _request(
        self, budget: str | Budget, max_new_tokens: int, dial: float, sampling: Sampling, stop: Sequence[str]
    ) -> Request:
        bits = self._budget(budget)
        if self.searched and bits is not None and self.arch.plan == "visor" and bits not in self.viable_budgets:
            names = ", ".join((["auto"] if self.has_policy else []) + [budget_name(b) for b in self.viable_budgets])
            raise RequestError(f"budget {budget_name(bits)!r} is not viable: expected one of {names}")
        stops = self.stop_token_ids | {self.tokenizer.single(text) for text in checked_stops(stop)}
        return Request(bits, dial, max_new_tokens, sampling, stops)

    def _budget(self, budget: str | Budget) -> Bits | None:
        """The bits of a budget, or None for "auto"."""
        wanted = budget if isinstance(budget, Budget) else Budget.parse(str(budget))
        if self.arch.plan == "dense":
            return ()
        if str(wanted) == "auto":
            self._require_policy()
            return None
        return wanted.resolve(self.arch.num_slots, self.viable_budgets or None)

    def _require_policy(self) -> None:
        if not self.has_policy:
            raise RequestError(
                "budget=auto: this model has no trained policy; name a budget (empty, full, 0b...) or run stage policy"
            )

    def _pick(self, state: PrefillState, prompt: Example, dial: float) -> Bits:
        """The policy's budget for one prompt."""
        size = prompt.size
        costs = [decoder_flops(self.arch, bits, size.visual, size.text) for bits in self.viable_budgets]
        return self.viable_budgets[self._engine.pick(state, costs, dial)]

    def _prompt(self, image: Pictures, question: str, history: History = ()) -> Example:
        return prompt_of(image, question, self.tokenizer, self.arch, self.system, history)

    def _asked(self, image: Pictures, question: str, history: History, request: Request) -> Example:
        """The prompt, checked to fit the model's positions together with its answer."""
        prompt = self._prompt(image, question, history)
        check_fits(prompt, request.max_new_tokens, self.arch)
        return prompt

    def _numbered(self, number: int, item: Any, request: Request) -> Example:
        """The prompt of one of many questions; an error in it names its number."""
        try:
            return self._asked(*checked_item(item), request)
        except RequestError as error:
            raise RequestError(f"questions[{number}]: {error}") from None
