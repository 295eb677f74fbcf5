"""lmms-eval's interface to an export in PyTorch: `python -m lmms_eval --model visor_torch --model_args pretrained=DIR`.

In: the harness's requests. Out: texts with token counts, route and costs, as from the JAX model
(`visor_jax.evaluate.lmms_eval`). The module of the folder is this package's own, so no remote code runs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from visor_jax.budget import Bits
from visor_jax.data.row_shape import RowShape
from visor_jax.errors import RequestError
from visor_jax.evaluate.lmms_eval import NEW_TOKENS, Question, Result, Settings, VisorLmms
from visor_jax.evaluate.measure import requested_viable
from visor_jax.export.torch_model import VisorForConditionalGeneration, VisorProcessor
from visor_jax.export.torch_model.tiles_visor import open_picture
from visor_jax.export.torch_model.vision_visor import Size, tile_grid
from visor_jax.generate.answer import Answer, BudgetAnswers, PendingAnswer, Seconds
from visor_jax.generate.request import check_fits, check_length, checked_question
from visor_jax.hf.read import open_checkpoint
from visor_jax.loading import check_dtype
from visor_jax.workdir.supervision import beat


class VisorTorch(VisorLmms):
    """An export of plan "visor" in PyTorch."""

    def __init__(
        self,
        pretrained: str,
        budget: Any = "auto",
        dial: float = 0.0,
        dtype: str = "float32",
        max_new_tokens: int = NEW_TOKENS,
        seed: int = 0,
        batch_size: Any = 1,
        max_batch_size: Any = None,
        device: str | None = None,
    ) -> None:
        """
        Args:
          pretrained: the folder.
          budget: "auto", "full", "empty", a number of slots, or the bits of a viable budget.
          dial: shifts the policy toward cheaper (below 0) or more accurate (above 0) budgets.
          dtype: of the parameters.
          max_new_tokens: of an answer whose task does not say.
          seed: of samples, for tasks with a temperature.
          batch_size: questions that are answered together.
          max_batch_size: given by the harness and not used.
          device: of PyTorch; None: the first GPU, or the CPU if there is none.

        Raises:
          RequestError: there is no such folder, its plan is dense, or it has no such budget.
        """
        super().__init__(max_new_tokens, seed)
        check_dtype(dtype)
        checkpoint = open_checkpoint(pretrained)
        if checkpoint.arch.plan == "dense":
            raise RequestError(f"pretrained={pretrained}: has plan 'dense'; expected 'visor', or --model visor")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise RequestError(f"--batch_size={batch_size}: expected a whole number, at least 1")
        self.arch, self._dial, self._batch_size = checkpoint.arch, dial, int(batch_size)
        self.budgets = requested_viable(checkpoint, str(budget), searched=bool(checkpoint.viable_budgets))
        (self.budget,) = self.budgets
        self._place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.hardware = torch.cuda.get_device_name(self._place) if self._place.type == "cuda" else self._place.type
        self._dtype = getattr(torch, dtype)
        self.bytes_per_value = self._dtype.itemsize
        model = VisorForConditionalGeneration.from_pretrained(pretrained, dtype=self._dtype)
        self._model: Any = model.eval()
        self._model.to(self._place)
        self._processor = VisorProcessor.from_pretrained(pretrained)
        ends = model.generation_config.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])

    def results(self, questions: Iterable[Question], settings: Settings) -> list[Result]:
        """Answers questions in batches, in the harness's order."""
        results: list[Result] = []
        remaining = iter(questions)
        while wave := list(itertools.islice(remaining, self._batch_size)):
            sizes = [self._size_or_error(question, settings.max_new_tokens) for question in wave]
            askable = [
                (question, size) for question, size in zip(wave, sizes, strict=True) if isinstance(size, RowShape)
            ]
            answers = iter(
                self._answers([question for question, _ in askable], [size for _, size in askable], settings)
            )
            for size in sizes:
                answer = BudgetAnswers(size, {self.budget: next(answers)}) if isinstance(size, RowShape) else size
                results.append(answer)
            beat()
        return results

    def _size_or_error(self, question: Question, max_new_tokens: int) -> RowShape | RequestError:
        """Returns the size of a prompt, or why it cannot be asked."""
        pictures, prompt = question
        try:
            check_length(checked_question(prompt), (), self.arch)
            sizes = [(picture.height, picture.width) for picture in map(open_picture, pictures)]
            ids = self._processor.prompt_ids(prompt, sizes)
            visual = ids.count(self._processor.image_token_id)
            size = RowShape(self._num_tiles(sizes), visual, len(ids) - visual)
            check_fits(len(ids), size, max_new_tokens, self.arch)
        except RequestError as error:
            return error
        except ValueError as error:
            return RequestError(str(error))
        return size

    def _num_tiles(self, sizes: Sequence[Size]) -> int:
        """Returns the number of tiles of a prompt's pictures; only a single picture is cut."""
        if len(sizes) != 1 or not self._model.config.image_grid_pinpoints:
            return len(sizes)
        rows, columns = tile_grid(sizes[0], self._model.config)
        return 1 + rows * columns

    @torch.no_grad()
    def _answers(self, questions: Sequence[Question], sizes: Sequence[RowShape], settings: Settings) -> list[Answer]:
        """Answers one batch of questions that can be asked."""
        if not questions:
            return []
        first = FirstPass(self._place)
        inputs = self._processor.batch(questions).to(self._place)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        sampled = settings.temperature > 0
        # transformers' own default is to sample from the 50 best tokens only.
        options = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if sampled else {}
        torch.manual_seed(settings.seed)
        hook = self._model.register_forward_hook(first)
        try:
            tokens = self._model.generate(
                **inputs,
                **options,
                do_sample=sampled,
                budget=self.budget,
                dial=self._dial,
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=self._processor.pad_token_id,
            )
        finally:
            hook.remove()
        seconds = first.elapsed()
        new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        rows = zip(new, sizes, first.budgets, strict=True)
        return [self._answer(row, size, bits, first.seconds, seconds) for row, size, bits in rows]

    def _answer(self, row: list[int], size: RowShape, bits: Bits, first: float, seconds: float) -> Answer:
        """Returns the answer of one row of new tokens, which ends with its first end token."""
        end = next((place for place, token in enumerate(row) if token in self._ends), len(row))
        pending = PendingAnswer(
            size,
            bits,
            self.budgets[self.budget] is None,
            Seconds(),
            tokens=row[:end],
            complete=end < len(row),
            first=first,
            spent=Seconds(seconds),
        )
        return pending.answer(self._processor.decode(row[:end]), self.arch, self.bytes_per_value)


class FirstPass:
    """A forward hook that keeps what the first pass of `generate` shows: the budgets, and the time until its end.

    Attributes:
      budgets: of each row.
      seconds: from the making of this object.
    """

    def __init__(self, place: torch.device) -> None:
        self._place, self._start = place, time.perf_counter()
        self.budgets: list[Bits] = []
        self.seconds = 0.0

    def __call__(self, module: Any, inputs: Any, output: Any) -> None:
        if not self.budgets:
            self.budgets = [tuple(bits) for bits in output.budgets.tolist()]
            self.seconds = self.elapsed()

    def elapsed(self) -> float:
        """Returns the seconds since this object was made, when the device has done its work."""
        if self._place.type == "cuda":
            torch.cuda.synchronize(self._place)
        return time.perf_counter() - self._start
