"""Compares an exported folder, loaded as a PyTorch model, with the JAX model.

In: a model and the folder. Out: a `Parity`: for each prompt and every viable budget and "auto", the largest difference
between logits, whether 64 greedy tokens are equal, and the largest difference between routes. PyTorch prepares inputs
from the folder's files and decodes with its cache; JAX runs the whole sequence at once. The greedy tokens are equal if
JAX's best token after every prefix that PyTorch generated is the token that PyTorch generated next.

PyTorch generates in float32, as users run it. Logits and routes are compared in float64 on both sides, so that any
difference is a defect; in float32, rounding alone reaches 3e-5 at logits of 17 in a trained model with sharp attention.
The float32 difference is recorded as well. A bfloat16 export is compared with the rounded weights, because the rounding
belongs to the format.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, budget_name
from visor_jax.data.chat import encode_prompt
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.errors import RunError
from visor_jax.workdir.supervision import beat

NEW_TOKENS = 64
SEED = 0


class ExportedModel(Protocol):
    """The interface that an export needs; `visor_jax.loading.Visor` implements it.

    Attributes:
      params: nested dict of arrays.
      arch: shape of the model.
      tokenizer: tokenizer with the chat template.
      viable_budgets: budgets that the policy chooses from, in the order of its outputs.
      system: text of the system turn; None: no system turn.
      has_policy: the policy was trained.
    """

    params: Any
    arch: Architecture
    tokenizer: ChatTokenizer
    viable_budgets: list[Bits]
    system: str | None
    has_policy: bool

    def with_params(self, params: Any) -> ExportedModel:
        """Returns the same model with other parameters."""
        ...

    def logits(self, token_ids: Sequence[int], images: Sequence[Image.Image], budget: str) -> np.ndarray:
        """Returns the logits [T, vocab] at every text token; `token_ids` has one placeholder per picture."""
        ...

    def route(self, image: Sequence[Image.Image], question: str) -> np.ndarray:
        """Returns the policy's probabilities over the viable budgets, [viable]."""
        ...


@dataclass(frozen=True)
class Prompt:
    """A prompt of the comparison; `routed` adds the budget "auto"."""

    name: str
    images: list[Image.Image]
    question: str
    routed: bool = False


@dataclass(frozen=True)
class Comparison:
    """Differences for one prompt under one budget."""

    prompt: str
    budget: str
    used: str  # the budget that "auto" selected, else `budget`
    max_logit_difference: float
    greedy_tokens_equal: bool
    float32_logit_difference: float = 0.0
    max_route_difference: float = 0.0
    routes_equal: bool = True


@dataclass(frozen=True)
class Parity:
    """All comparisons of an export.

    Attributes:
      bound: the largest allowed difference of logits, and of route probabilities.
      comparisons: one per prompt and budget.
    """

    bound: float
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def max_logit_difference(self) -> float:
        """Largest difference of logits in float64 over all comparisons."""
        return max(c.max_logit_difference for c in self.comparisons)

    @property
    def max_route_difference(self) -> float:
        """Largest difference of route probabilities in float64 over all comparisons."""
        return max(c.max_route_difference for c in self.comparisons)

    @property
    def greedy_tokens_equal(self) -> bool:
        """Whether all greedy tokens of all comparisons are equal."""
        return all(c.greedy_tokens_equal for c in self.comparisons)

    @property
    def float32_logit_difference(self) -> float:
        """Largest difference of logits over all comparisons, with PyTorch in float32."""
        return max(c.float32_logit_difference for c in self.comparisons)

    @property
    def holds(self) -> bool:
        """Whether differences are within `bound`, and all greedy tokens and routes are equal."""
        return (
            self.max_logit_difference <= self.bound
            and self.max_route_difference <= self.bound
            and self.greedy_tokens_equal
            and all(c.routes_equal for c in self.comparisons)
        )

    def why_not(self) -> str:
        """Describes the worst comparison in one line."""
        worst = max(
            self.comparisons,
            key=lambda c: (
                not c.routes_equal,
                not c.greedy_tokens_equal,
                max(c.max_logit_difference, c.max_route_difference),
            ),
        )
        tokens, routes = ("equal" if same else "differ" for same in (worst.greedy_tokens_equal, worst.routes_equal))
        return (
            f"PyTorch and JAX do not agree (prompt {worst.prompt!r}, budget {worst.budget}): logits differ by up to "
            f"{worst.max_logit_difference:.3g}, allowed {self.bound:g}; {NEW_TOKENS} greedy tokens {tokens}, routes "
            f"{routes} (probabilities by up to {worst.max_route_difference:.3g})"
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the content of parity.json that describes the comparison."""
        return {
            "bound": self.bound,
            "max_logit_difference": self.max_logit_difference,
            "max_route_difference": self.max_route_difference,
            "greedy_tokens_equal": self.greedy_tokens_equal,
            "new_tokens": NEW_TOKENS,
            "computed_in": "float64",
            "float32_logit_difference": self.float32_logit_difference,
            "budgets": sorted({c.budget for c in self.comparisons}),
            "comparisons": [vars(c) for c in self.comparisons],
        }


def sample_prompts(arch: Architecture) -> list[Prompt]:
    """Returns two prompts of fixed noise: one picture with an unusual shape, and two pictures."""
    rng, tile = np.random.default_rng(SEED), arch.vision.tile_size

    def picture(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))

    return [
        Prompt(
            "one picture",
            [picture(2 * tile // 3 + 1, 3 * tile // 2)],
            "Which word is below Iron?",
            routed=True,
        ),
        Prompt(
            "two pictures",
            [picture(tile, tile // 2 + 1), picture(tile // 3 + 1, tile)],
            "<image>\n<image>\nWhat differs?",
        ),
    ]


def is_small(params: Mapping[str, Any]) -> bool:
    """Returns whether the model has fewer than 0.1 billion parameters."""
    import jax

    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) < 100_000_000


def compare(model: ExportedModel, folder: Path) -> Parity:
    """Compares a model with its exported folder, for all prompts and budgets.

    Raises:
      RunError: the folder does not load completely, or its processor encodes a prompt differently.
    """
    import jax

    exported, wide = load_exported(folder, model.arch), in_float64(model)
    small = is_small(model.params)
    parity = Parity(bound=1e-5 if small else 2e-4)  # float32 sums over a large model's widths round further apart
    for prompt in sample_prompts(model.arch):
        budgets = [budget_name(bits) for bits in model.viable_budgets] if model.arch.plan == "visor" else ["dense"]
        budgets += ["auto"] if prompt.routed and model.arch.plan == "visor" and model.has_policy else []
        token_ids = encode_prompt(model.tokenizer, prompt.question, len(prompt.images), model.system)
        if exported.prompt_ids(prompt) != token_ids:
            raise RunError(f"export: the folder's processor encodes {prompt.name!r} as other token ids than this model")
        beat()
        with few_threads(small):
            answers = exported.answers(prompt, budgets)
            exact = exported.in_float64().answers(prompt, budgets, [answer.tokens for answer in answers])
        with jax.enable_x64(True):
            for budget, answer, wide_answer in zip(budgets, answers, exact, strict=True):
                beat()
                parity.comparisons.append(compare_one(wide, prompt, token_ids, budget, answer, wide_answer))
    return parity


def in_float64(model: ExportedModel) -> ExportedModel:
    """Returns the model with float64 weights; it computes in float64 inside `jax.enable_x64(True)`."""
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        return model.with_params(jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), model.params))


def compare_one(
    model: ExportedModel,
    prompt: Prompt,
    token_ids: list[int],
    budget: str,
    answer: ExportedAnswer,
    exact: ExportedAnswer,
) -> Comparison:
    """Compares one prompt under one budget: logits at every text token and 64 greedy ones, tokens and route.

    Args:
      model: computes in float64.
      prompt: the prompt.
      token_ids: its tokens, one placeholder per picture.
      budget: a budget's name, "auto" or "dense".
      answer: PyTorch's in float32.
      exact: PyTorch's in float64, for the same tokens.
    """
    used, routes_equal, route_difference = budget, True, 0.0
    if budget == "auto":
        route = model.route(prompt.images, prompt.question)
        used, routes_equal = budget_name(answer.bits), model.viable_budgets[int(np.argmax(route))] == answer.bits
        route_difference = float(np.max(np.abs(route - exact.route)))
    jax_budget = "full" if model.arch.plan == "dense" else used
    expected = model.logits([*token_ids, *answer.tokens[:-1]], prompt.images, jax_budget)
    best = greedy(expected[-NEW_TOKENS:], model.tokenizer.image_token_id)
    return Comparison(
        prompt=prompt.name,
        budget=budget,
        used=used,
        max_logit_difference=float(np.max(np.abs(expected - exact.logits))),
        float32_logit_difference=float(np.max(np.abs(expected - answer.logits))),
        greedy_tokens_equal=best.tolist() == answer.tokens,
        max_route_difference=route_difference,
        routes_equal=routes_equal,
    )


def greedy(logits: np.ndarray, image_token_id: int) -> np.ndarray:
    """Returns the best token at each position [T]; the picture's placeholder is never generated."""
    logits = logits.copy()
    logits[:, image_token_id] = -np.inf
    return logits.argmax(axis=-1)


# --- the PyTorch side -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportedAnswer:
    """PyTorch's answer: `logits` [the prompt's text tokens + 63, V], 64 `tokens`, chosen `bits` and `route`."""

    logits: np.ndarray
    tokens: list[int]
    bits: Bits
    route: np.ndarray | None


@dataclass(frozen=True)
class Exported:
    """The model and processor of an exported folder."""

    model: Any
    processor: Any
    arch: Architecture

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Returns the processor's token ids with one placeholder per picture."""
        sizes = [(image.height, image.width) for image in prompt.images]
        ids, placeholder = self.processor.prompt_ids(prompt.question, sizes), self.processor.config.image_token_index
        lengths = [self.processor.num_visual_tokens(size, len(sizes)) for size in sizes]
        token_ids: list[int] = []
        while ids:
            token_ids.append(ids[0])
            ids = ids[lengths.pop(0) if ids[0] == placeholder else 1 :]
        return token_ids

    def in_float64(self) -> Exported:
        """Returns a copy that computes in float64, including the pixels."""
        processor = copy.copy(self.processor)
        processor.dtype = np.dtype(np.float64)
        return dataclasses.replace(self, model=copy.deepcopy(self.model).double(), processor=processor)

    def answers(
        self, prompt: Prompt, budgets: Sequence[str], tokens_of: Sequence[list[int]] | None = None
    ) -> list[ExportedAnswer]:
        """Runs prefill and 63 cached steps for all budgets in one batch, greedily or with the tokens in `tokens_of`."""
        import torch

        visor, placeholder = self.arch.plan == "visor", self.processor.config.image_token_index
        inputs = self.copies(self.processor(prompt.images, prompt.question), len(budgets))
        is_text = (inputs["input_ids"][0] != placeholder).numpy()
        with torch.no_grad():
            output = first = self.model(**inputs, **({"budget": list(budgets)} if visor else {}), use_cache=True)
            rows = [first.logits.numpy()[:, is_text]]
            tokens = [greedy(rows[0][:, -1], placeholder)]
            while len(tokens) < NEW_TOKENS:
                previous = tokens[-1]
                if tokens_of is not None:
                    previous = np.resize([ids[len(tokens) - 1] for ids in tokens_of], len(previous))  # copies too
                step = torch.from_numpy(previous)[:, None]
                name = "cache" if "cache" in output else "past_key_values"  # the latter before transformers 5.24
                output = self.model(input_ids=step, use_cache=True, **{name: output[name]})
                rows.append(output.logits.numpy())
                tokens.append(greedy(rows[-1][:, 0], placeholder))
        logits, chosen = np.concatenate(rows, axis=1), np.stack(tokens, axis=1)
        scores = first.policy_logits if visor else None
        return [
            ExportedAnswer(
                logits[row],
                chosen[row].tolist(),
                tuple(first.budgets[row].tolist()) if visor else (),
                None if scores is None else scores[row].softmax(0).numpy(),
            )
            for row in range(len(budgets))
        ]

    def copies(self, inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Returns `count` copies of a prompt as one batch, or two copies for a dense model without grids.

        The stock class splits a prompt's only picture into tiles, which a model without grids does not. Two copies that
        form one group of pictures are not split.
        """
        import torch

        whole = self.arch.plan == "dense" and not self.arch.anyres.pinpoints and len(inputs.get("image_sizes", ())) == 1
        batch = {name: torch.cat([value] * (2 if whole else count)) for name, value in inputs.items()}
        return {**batch, "batch_num_images": torch.tensor([2])} if whole else batch


@contextlib.contextmanager
def few_threads(small: bool) -> Iterator[None]:
    """Limits torch to one thread for a small model, which more threads do not speed up."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_exported(folder: Path, arch: Architecture) -> Exported:
    """Loads the folder in float32, as users do.

    Raises:
      RunError: a weight is missing or unexpected.
    """
    import torch
    from transformers import LlavaOnevisionForConditionalGeneration

    from visor_jax.export.torch_model import VisorForConditionalGeneration, VisorProcessor

    kind = VisorForConditionalGeneration if arch.plan == "visor" else LlavaOnevisionForConditionalGeneration
    loaded: Any = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if wrong:
        raise RunError(f"export: the written folder does not load completely: {wrong}")
    return Exported(model.eval(), VisorProcessor.from_pretrained(folder), arch)
