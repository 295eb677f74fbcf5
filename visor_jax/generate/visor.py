"""`Visor`: a loaded model that answers questions about pictures and reports the cost of each answer.

It returns answers (whole, in batches, in pieces), logits and routes. A `Visor` compiles one program per bucket of
shapes and per budget, and caches the programs (`visor_jax.generate.engine`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, Budget, budget_name, check_viable
from visor_jax.cost import decoder_flops
from visor_jax.data.collate import Example
from visor_jax.data.tiles import Origin
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.errors import RequestError
from visor_jax.generate.answer import Answer, AnswerStream, BudgetAnswers, PendingAnswer, Seconds
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
from visor_jax.workdir.supervision import beat

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
    """A model with its tokenizer, as `load` returns it: computes answers, logits and routes.

    Arguments of `answer`, `answer_many`, `stream` and `route`:

      image: a picture, several in a list, or None (or an empty list) for a question without one. A picture is a file's
        path or its bytes (JPEG, PNG, WebP, GIF), a PIL image, uint8 [H, W, 3], or a video's frames, uint8 [F, H, W, 3].
      question: text; `<image>` marks the place of a picture; without markers the pictures come first.
      history: the turns before this question, [(question, answer), ...]. The pictures belong to the whole
        conversation and go into its first question, as in training.

    Settings of `answer`, `answer_many` and `stream`:

      budget: "auto" (the policy decides), "full", "empty", a number of slots, or the bits of a viable budget.
      max_new_tokens: maximum length of an answer.
      dial: shifts the policy toward cheaper (below 0) or more accurate (above 0) budgets.
      temperature, top_p, seed: a temperature of 0 takes the best token; otherwise tokens are sampled
        (`generate.sampling.Sampling`), and the same seed gives the same answer.
      stop: texts of one token each that end an answer, in addition to the end of the turn.

    Each raises RequestError for an invalid picture or question, a question longer than the model's positions, a budget
    that does not fit or is not viable, "auto" without a policy, and settings outside their ranges.

    Attributes:
      source: where the model was loaded from.
      stage: the training stage that it comes from; "" if unknown.
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
        self.fingerprint = ""  # of its stage in a workdir: `StageFolder.fingerprint`
        self.viable_budgets = [tuple(bits) for bits in viable_budgets]
        self.has_policy, self.searched = has_policy, searched
        self.stop_token_ids = frozenset({tokenizer.end_token_id, *stop_token_ids})
        self._engine = Engine(params, arch, len(self.viable_budgets), tokenizer.image_token_id)

    @property
    def params(self) -> Params:
        """Returns the parameters in the tree of `model.visor.init_params`; stacks them after the first question."""
        return self._engine.params

    @property
    def dtype(self) -> np.dtype:
        """Returns the dtype of the parameters, and of what is computed with them."""
        return self._engine.dtype

    def with_params(self, params: Params) -> Visor:
        """Returns this model with other parameters of the same shapes."""
        return self._of(params, self.arch)

    def with_arch(self, arch: Architecture) -> Visor:
        """Returns this model as another architecture with parameters of the same shapes."""
        return self._of(self.params, arch)

    def _of(self, params: Params, arch: Architecture) -> Visor:
        return Visor(
            params,
            arch,
            self.tokenizer,
            self.viable_budgets,
            system=self.system,
            has_policy=self.has_policy,
            searched=self.searched,
            stage=self.stage,
            stop_token_ids=tuple(self.stop_token_ids),
            source=self.source,
        )

    def at_ratio(self, ratio: float) -> Visor:
        """Returns this model reading fewer or more visual tokens: at another of the scales that it was trained at.

        Raises:
          RequestError: the ratio is none of `model.reduction.scales`.
        """
        scales = self.arch.reduction.scales
        if ratio not in scales:
            expected = f"one of model.reduction.scales={scales}" if scales else "a model with model.reduction.scales"
            raise RequestError(f"ratio={ratio:g}: expected {expected}")
        reduction = dataclasses.replace(self.arch.reduction, ratio=ratio)
        return self.with_arch(dataclasses.replace(self.arch, reduction=reduction))

    def __repr__(self) -> str:
        """Describes size, plan, budgets and origin in one line."""
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
        origin: tuple[int, int] | None = None,
    ) -> Answer:
        """Answers one question about one picture, several or none, after the turns of `history`.

        With `origin`, row and column in the tile's grid of patches, the one picture keeps its size there; only models
        that were trained with `data.small_pictures` can read it.
        """
        request = self._request(budget, max_new_tokens, dial, Sampling(temperature, top_p, seed), stop)
        return self._answers([self._checked_prompt(image, question, history, request, origin)], request)[0]

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
        """Answers many questions, in order, with the same results as one by one.

        Batches hold questions of one budget and similar size. `questions` is any iterable of (image, question) or
        (image, question, history). At most `PREFILL_AHEAD` questions are read ahead, so that a generator's pictures
        are never all in memory.
        """
        request = self._request(budget, max_new_tokens, dial, Sampling(temperature, top_p, seed), stop)
        if isinstance(questions, str | bytes | dict) or not isinstance(questions, Iterable):
            raise RequestError(f"questions: {EXPECTED_QUESTION}s, any iterable of them, got {type(questions).__name__}")
        numbered, answers = enumerate(questions), list[Answer]()
        while wave := list(itertools.islice(numbered, PREFILL_AHEAD)):
            prompts = [self._numbered(number, item, request) for number, item in wave]
            answers += self._answers(prompts, request)
        return answers

    def answer_budgets(
        self,
        questions: Iterable[tuple[Pictures, str]],
        budgets: Mapping[str, Bits | None],
        max_new_tokens: int = 64,
        dial: float = 0.0,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[BudgetAnswers | RequestError]:
        """Answers each question under several budgets; the shared prefill runs once per question.

        Args:
          questions: (pictures, question) pairs.
          budgets: name -> bits; None: the policy decides. It costs no second decoding if the budget that it picks is
            also there by itself.

        Returns:
          for each question its answers by name of the budget, or the error that says why it cannot be asked.
        """
        if None in budgets.values():
            self._require_policy()
        request = Request(None, dial, max_new_tokens, Sampling(temperature, top_p, seed), self.stop_token_ids)
        results, remaining = list[BudgetAnswers | RequestError](), iter(questions)
        while wave := list(itertools.islice(remaining, PREFILL_AHEAD)):
            prompts = [self._prompt_or_error(item, request) for item in wave]
            answered = iter(self._under_budgets([p for p in prompts if isinstance(p, Example)], budgets, request))
            results += [next(answered) if isinstance(prompt, Example) else prompt for prompt in prompts]
        return results

    def timed_answer(
        self, image: Pictures, question: str, bits: Bits | None, new_tokens: int, *, origin: Origin | None = None
    ) -> Answer:
        """Answers greedily with exactly `new_tokens` tokens, past the end of the answer, to measure its times.

        Args:
          bits: of the budget; None: the policy decides.
        """
        if bits is None:
            self._require_policy()
        request = Request(bits, 0.0, new_tokens, Sampling(), frozenset())
        return self._answers([self._checked_prompt(image, question, (), request, origin)], request)[0]

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
        """Yields the answer in pieces of whole characters as tokens are chosen.

        `.answer` of the stream is the whole answer with its costs.
        """
        request = self._request(budget, max_new_tokens, dial, Sampling(temperature, top_p, seed), stop)
        return AnswerStream(self._pieces(self._checked_prompt(image, question, history, request), request))

    def logits(
        self, token_ids: Sequence[int], images: Pictures, budget: str | Budget = "full"
    ) -> Float[np.ndarray, "S V"]:
        """Returns next-token logits at every text token of a sequence with one placeholder id per picture, in order.

        The budget need not be viable.
        """
        prompt = tokens_of(token_ids, images, self.tokenizer, self.arch)
        bits = self._budget(budget)
        if bits is None:
            bits = self._pick(self._engine.prefill_shared(prompt, routed=True), prompt, 0.0)
        return self._engine.logits(prompt, bits)

    def route(self, image: Pictures, question: str, history: History = ()) -> Float[np.ndarray, " viable"]:
        """Returns the policy's probabilities over `viable_budgets`; the routing token follows `question`."""
        self._require_policy()
        scores = self._engine.prefill_shared(self._prompt(image, question, history), routed=True).scores
        viable_scores = np.asarray(scores)[0, : len(self.viable_budgets)]
        weights = np.exp(viable_scores - viable_scores.max())
        return weights / weights.sum()

    # --- from questions to answers ------------------------------------------------------------------------------------

    def _answers(self, prompts: Sequence[Example], request: Request) -> list[Answer]:
        questions = [self._prepare(prompt, [request.budget], request.dial)[0] for prompt in prompts]
        return [self._finish(answer) for answer in self._decoded(questions, request)]

    def _under_budgets(
        self, prompts: Sequence[Example], budgets: Mapping[str, Bits | None], request: Request
    ) -> list[BudgetAnswers]:
        """Answers each prompt under every budget; two names of the same bits share one decoding."""
        asked = [self._prepare(prompt, list(budgets.values()), request.dial) for prompt in prompts]
        distinct = {(row, q.bits): q for row, questions in enumerate(asked) for q in questions}
        decoded = dict(zip(distinct, self._decoded(list(distinct.values()), request), strict=True))
        results = []
        for row, (prompt, questions) in enumerate(zip(prompts, asked, strict=True)):
            pending = [dataclasses.replace(decoded[row, q.bits], routed=q.routed) for q in questions]
            answers = dict(zip(budgets, map(self._finish, pending), strict=True))
            results.append(BudgetAnswers(prompt.size, answers))
        return results

    def _prepare(self, prompt: Example, budgets: Sequence[Bits | None], dial: float) -> list[Question]:
        """Runs the shared prefill; returns the question under each budget, for None under the one that is picked."""
        routed, spent = None in budgets, Seconds()
        with self._engine.programs.timed(spent):
            state = self._engine.prefill_shared(prompt, routed=routed)
            picked = self._pick(state, prompt, dial) if routed else ()
            jax.block_until_ready(state.prefix)
        return [Question(prompt, state, picked if bits is None else bits, bits is None, spent) for bits in budgets]

    def _decoded(self, questions: Sequence[Question], request: Request) -> list[PendingAnswer]:
        """Decodes the answers of prepared questions, in batches of the same budget and similar size."""
        pending = [PendingAnswer(q.prompt.size, q.bits, q.routed, q.spent) for q in questions]
        for bits in dict.fromkeys(question.bits for question in questions):
            same = [index for index, question in enumerate(questions) if question.bits == bits]
            for group in batches([questions[index].state.row_shape for index in same]):
                members = [same[i] for i in group]
                for _ in self._steps([questions[i] for i in members], [pending[i] for i in members], request):
                    beat()
        return pending

    def _pieces(self, prompt: Example, request: Request) -> Generator[str, None, Answer]:
        """Yields the text of one answer as its tokens are chosen; returns the answer."""
        (question,) = self._prepare(prompt, [request.budget], request.dial)
        characters = Characters(self.tokenizer)
        pending = PendingAnswer(prompt.size, question.bits, question.routed, question.spent)
        for _ in self._steps([question], [pending], request):
            piece = "" if pending.complete else characters.add(pending.tokens[-1])
            if piece:
                yield piece
        rest = characters.rest()
        if rest:
            yield rest
        return self._finish(pending)

    def _steps(
        self, questions: Sequence[Question], pending: Sequence[PendingAnswer], request: Request
    ) -> Iterator[None]:
        """Decodes: each step adds a token to every pending answer that has not ended, or ends it."""
        rows, bits, batch = [question.state for question in questions], questions[0].bits, Seconds()
        steps = self._engine.tokens(rows, bits, request.sampling, request.stops, request.max_new_tokens)
        while True:
            with self._engine.programs.timed(batch):  # excludes the caller's time between two steps
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
        if self.searched and bits is not None and self.arch.plan == "visor":
            check_viable(bits, self.viable_budgets, has_policy=self.has_policy)
        stops = self.stop_token_ids | {self.tokenizer.single(text) for text in checked_stops(stop)}
        return Request(bits, dial, max_new_tokens, sampling, stops)

    def _budget(self, budget: str | Budget) -> Bits | None:
        """Returns the bits of a budget, or None for "auto"."""
        parsed = budget if isinstance(budget, Budget) else Budget.parse(str(budget))
        if self.arch.plan == "dense":
            return ()
        if str(parsed) == "auto":
            self._require_policy()
            return None
        return parsed.resolve(self.arch.num_slots, self.viable_budgets or None)

    def _require_policy(self) -> None:
        if not self.has_policy:
            raise RequestError(
                "budget=auto: this model has no trained policy; name a budget (empty, full, 0b...) or run stage policy"
            )

    def _pick(self, state: PrefillState, prompt: Example, dial: float) -> Bits:
        """Returns the policy's budget for one prompt."""
        size = prompt.size
        costs = [decoder_flops(self.arch, bits, size.visual, size.text) for bits in self.viable_budgets]
        return self.viable_budgets[self._engine.pick(state, costs, dial)]

    def _prompt(self, image: Pictures, question: str, history: History = (), origin: Origin | None = None) -> Example:
        return prompt_of(image, question, self.tokenizer, self.arch, self.system, history, origin)

    def _checked_prompt(
        self, image: Pictures, question: str, history: History, request: Request, origin: Origin | None = None
    ) -> Example:
        """Returns the prompt, after checking that it fits the model's positions together with its answer."""
        prompt = self._prompt(image, question, history, origin)
        check_fits(prompt.length, prompt.size, request.max_new_tokens, self.arch)
        return prompt

    def _prompt_or_error(self, item: Any, request: Request) -> Example | RequestError:
        """Returns the prompt of one of many questions, or why it cannot be asked."""
        try:
            return self._checked_prompt(*checked_item(item), request)
        except RequestError as error:
            return error

    def _numbered(self, number: int, item: Any, request: Request) -> Example:
        """Returns the prompt of one of many questions; an error names its number."""
        try:
            return self._checked_prompt(*checked_item(item), request)
        except RequestError as error:
            raise RequestError(f"questions[{number}]: {error}") from None
