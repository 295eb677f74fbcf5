"""lmms-eval's interface to our models: `python -m lmms_eval --model visor --model_args pretrained=RUN,budget=auto`.

In: the harness's requests: a task's prompt, pictures and settings of generation. Out: for each its text, with token
counts that also hold the route and the costs of the answer, under the names that `visor evaluate --benchmark` writes.
The harness logs them for every sample (`--log_samples`), and each task's means under "throughput" of its results.

`VisorJax` answers with the JAX model; `visor_jax.export.lmms_eval` answers with an export in PyTorch. Only lmms-eval
imports these files (`lmms_manifests.py`).
"""

from __future__ import annotations

import abc
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # pyright: ignore[reportMissingImports]
from PIL import Image
from tqdm import tqdm  # pyright: ignore[reportMissingModuleSource]

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits
from visor_jax.errors import RequestError
from visor_jax.evaluate.benchmarks.predictions import answer_costs
from visor_jax.evaluate.benchmarks.run import mean_costs
from visor_jax.evaluate.lmms_settings import Settings, cut, read_settings
from visor_jax.evaluate.measure import requested_viable
from visor_jax.evaluate.summary import shares
from visor_jax.generate.answer import BudgetAnswers
from visor_jax.loading import load

log = logging.getLogger(__name__)

NEW_TOKENS = 1024  # of an answer whose task does not say, as in the harness's own models

Question = tuple[Sequence[Image.Image], str]  # pictures and prompt
Result = BudgetAnswers | RequestError  # an answer, or why the question cannot be asked


@dataclass
class Costs(TokenCounts):
    """Token counts of an answer; `to_dict`, which the harness logs, also returns route and costs."""

    costs: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts and the costs as JSON values."""
        return {**super().to_dict(), **self.costs}


class VisorLmms(lmms):
    """Requests of the harness -> questions -> answers with costs; a subclass computes the answers.

    Attributes:
      budget: the name under which the budget was asked for.
      budgets: that name and the bits; None: the policy decides.
      arch: of the model.
      bytes_per_value: of its cache.
      hardware: what the times were measured on.
    """

    is_simple = True
    budget: str
    budgets: Mapping[str, Bits | None]
    arch: Architecture
    bytes_per_value: int
    hardware: str

    def __init__(self, max_new_tokens: int, seed: int) -> None:
        super().__init__()
        if (count := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise RequestError(f"WORLD_SIZE={count}: the harness runs in {count} processes; expected one")
        self._max_new_tokens, self._seed = max_new_tokens, seed

    @abc.abstractmethod
    def results(self, questions: Iterable[Question], settings: Settings) -> list[Result]:
        """Answers questions under `budget`."""

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers the requests of all tasks, those with the same settings together.

        Raises:
          RequestError: a setting or a kind of picture is not supported, or no question of a task can be asked.
        """
        groups: dict[Settings, list[int]] = {}
        repeated = Counter[tuple[str, str, Any]]()
        for place, request in enumerate(requests):
            _, settings, _, *which = request.args
            seed = self._seed + repeated[key := (which[1], which[2], which[0])]  # repeats of a sample differ
            repeated[key] += 1
            groups.setdefault(read_settings(settings, self._max_new_tokens, seed), []).append(place)
        answered: dict[int, GenerationResult] = {}
        start = time.perf_counter()
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as bar:
            for settings, places in groups.items():
                results = self.results(self._questions([requests[place] for place in places], bar), settings)
                for place, result in zip(places, results, strict=True):
                    answered[place] = self._generated(result, settings)
        outputs = [answered[place] for place in range(len(requests))]
        self._log([request.args[4] for request in requests], outputs, time.perf_counter() - start)
        return outputs

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuses tasks of type `loglikelihood` and `multiple_choice`."""
        raise RequestError("--tasks: one has output_type loglikelihood; expected tasks of type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuses tasks of several rounds."""
        raise RequestError("--tasks: one has output_type generate_until_multi_round; expected generate_until")

    def _questions(self, requests: Sequence[Any], bar: Any) -> Iterator[Question]:
        """Yields pictures and prompts; the harness decodes the pictures of a document when it is read."""
        for request in requests:
            prompt, _, doc_to_visual, doc_id, task, split = request.args
            pictures: list[Any] = list(doc_to_visual(self.task_dict[task][split][doc_id]) or ())
            for picture in pictures:
                if not isinstance(picture, Image.Image):
                    kind = type(picture).__name__
                    raise RequestError(f"--tasks={task}: sample {doc_id} has a {kind}; expected PIL pictures only")
            bar.update()
            yield pictures, prompt

    def _generated(self, result: Result, settings: Settings) -> GenerationResult:
        """Returns what the harness expects; a question that cannot be asked has an empty answer and a problem."""
        common = {"budget": self.budget, "device": self.hardware}
        if isinstance(result, RequestError):
            log.warning("counts as wrong: %s", result)
            problem = {"route": "", "problem": f"not_askable: {result}"}
            return GenerationResult("", Costs(0, 0, costs={**common, **problem}))
        answer = result.answers[self.budget]
        times = {"seconds_to_first_token": answer.seconds_to_first_token, "seconds": answer.seconds}
        routed = self.budgets[self.budget] is None
        of_answer = answer_costs(answer, result.size, self.arch, self.bytes_per_value, routed=routed)
        costs = {**common, **of_answer, **times, "problem": ""}
        count = result.size.visual + result.size.text
        return GenerationResult(cut(answer.text, settings.until), Costs(count, answer.new_tokens, costs=costs))

    def _log(self, tasks: Sequence[str], outputs: Sequence[GenerationResult], seconds: float) -> None:
        """Gives the harness each task's means of costs and shares of routes, which it prints and stores.

        Args:
          seconds: in which all answers were computed.

        Raises:
          RequestError: no question of a task can be asked.
        """
        counts: list[dict[str, Any]] = [output.token_counts.to_dict() for output in outputs]
        by_task: dict[str, list[dict[str, Any]]] = {}
        for task, one in zip(tasks, counts, strict=True):
            by_task.setdefault(task, []).append(one)
        for task, of_task in by_task.items():
            if all(one["problem"] for one in of_task):
                raise RequestError(f"--tasks={task}: no question can be asked; the first: {of_task[0]['problem']}")
        figures: dict[str, float] = {}
        for task, of_task in by_task.items():
            routes = shares([one["route"] for one in of_task if not one["problem"]])
            of_routes = {f"share_of_{route}": share for route, share in routes.items()}
            for name, value in {**mean_costs(self.arch, of_task), **of_routes}.items():
                figures[name if len(by_task) == 1 else f"{task}.{name}"] = value
        tokens = sum(one["output_tokens"] for one in counts)
        log_metrics(seconds, tokens, tokens / seconds, figures)


class VisorJax(VisorLmms):
    """The JAX model: of a workdir, one of its stages, an export, a LLaVA-OneVision checkpoint, or the hub."""

    def __init__(
        self,
        pretrained: str,
        budget: Any = "auto",
        dial: float = 0.0,
        dtype: str | None = None,
        max_new_tokens: int = NEW_TOKENS,
        seed: int = 0,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        """
        Args:
          pretrained: as `visor_jax.load` takes it.
          budget: "auto", "full", "empty", a number of slots, or the bits of a viable budget.
          dial: shifts the policy toward cheaper (below 0) or more accurate (above 0) budgets.
          dtype: of the parameters; None: float32.
          max_new_tokens: of an answer whose task does not say.
          seed: of samples, for tasks with a temperature.
          batch_size, max_batch_size, device: given by the harness and not used: questions are batched by size, on
            JAX's first device.

        Raises:
          RequestError: there is no model, or it has no such budget.
        """
        super().__init__(max_new_tokens, seed)
        self._model, self._dial = load(pretrained, dtype=dtype), dial
        self.arch, self.budgets = (
            self._model.arch,
            requested_viable(self._model, str(budget), searched=self._model.searched),
        )
        (self.budget,) = self.budgets
        self.bytes_per_value = self._model.dtype.itemsize
        self.hardware = jax.local_devices()[0].device_kind
        log.info("%r", self._model)

    def results(self, questions: Iterable[Question], settings: Settings) -> list[Result]:
        """Answers questions in batches of similar size."""
        return self._model.answer_budgets(
            questions,
            self.budgets,
            settings.max_new_tokens,
            self._dial,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
        )
