"""The proof of an export: the PyTorch model, loaded back from the written folder, against the JAX model.

In: a model and the folder. Out: a `Parity`: for each prompt, for every viable budget and for "auto", the largest
difference between logits and whether 64 greedy tokens are equal, and the largest difference between routes. PyTorch
prepares its inputs by the folder's own files and decodes with its cache; JAX reads the whole sequence at once. The JAX
model's greedy tokens are found without decoding: its best token behind every prefix that PyTorch wrote must be the one
that PyTorch wrote next.

Weights stored in bfloat16 are compared as rounded, both sides computing in float32: rounding is the format's, no
error of the export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from visor_jax.architecture import Architecture
from visor_jax.budget import budget_name
from visor_jax.data.chat import encode_prompt
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.errors import RunError

Bits = tuple[bool, ...]
NEW_TOKENS = 64
SEED = 0


class ExportedModel(Protocol):
    """What an export needs of a model; `visor_jax.api.Visor` has it."""

    params: Any  # nested dict of arrays
    arch: Architecture
    tokenizer: ChatTokenizer
    viable_budgets: list[Bits]
    system: str | None
    has_policy: bool

    def logits(self, token_ids: Sequence[int], images: Sequence[Image.Image], budget: str) -> np.ndarray: ...
    def route(self, image: Sequence[Image.Image], question: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Prompt:
    name: str
    images: list[Image.Image]
    question: str


@dataclass(frozen=True)
class Comparison:
    """One prompt under one budget."""

    prompt: str
    budget: str
    used: str  # the budget that "auto" became, else the same
    max_logit_difference: float
    greedy_tokens_equal: bool
    max_route_difference: float = 0.0
    routes_equal: bool = True


@dataclass(frozen=True)
class Parity:
    """All comparisons of an export, and the bound that they must keep."""

    bound: float
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def max_logit_difference(self) -> float:
        return max(own.max_logit_difference for own in self.comparisons)

    @property
    def max_route_difference(self) -> float:
        return max(own.max_route_difference for own in self.comparisons)

    @property
    def greedy_tokens_equal(self) -> bool:
        return all(own.greedy_tokens_equal for own in self.comparisons)

    @property
    def holds(self) -> bool:
        return (
            self.max_logit_difference <= self.bound
            and self.max_route_difference <= self.bound
            and self.greedy_tokens_equal
            and all(own.routes_equal for own in self.comparisons)
        )

    def why_not(self) -> str:
        """One line on the worst comparison."""
        worst = max(
            self.comparisons,
            key=lambda own: (
                not own.routes_equal,
                not own.greedy_tokens_equal,
                max(own.max_logit_difference, own.max_route_difference),
            ),
        )
        tokens, routes = ("equal" if same else "differ" for same in (worst.greedy_tokens_equal, worst.routes_equal))
        return (
            f"PyTorch and JAX do not agree (prompt {worst.prompt!r}, budget {worst.budget}): logits differ by up to "
            f"{worst.max_logit_difference:.3g}, allowed {self.bound:g}; {NEW_TOKENS} greedy tokens {tokens}, routes "
            f"{routes} (probabilities by up to {worst.max_route_difference:.3g})"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "bound": self.bound,
            "max_logit_difference": self.max_logit_difference,
            "max_route_difference": self.max_route_difference,
            "greedy_tokens_equal": self.greedy_tokens_equal,
            "new_tokens": NEW_TOKENS,
            "computed_in": "float32",
            "budgets": sorted({own.budget for own in self.comparisons}),
            "comparisons": [vars(own) for own in self.comparisons],
        }


def sample_prompts(arch: Architecture) -> list[Prompt]:
    """One picture of an odd shape, and two pictures: noise, the same every time."""
    rng, tile = np.random.default_rng(SEED), arch.vision.tile_size

    def picture(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))

    return [
        Prompt("one picture", [picture(2 * tile // 3 + 1, 3 * tile // 2)], "Which digit is below the letter A?"),
        Prompt(
            "two pictures",
            [picture(tile, tile // 2 + 1), picture(tile // 3 + 1, tile)],
            "<image>\n<image>\nWhat differs?",
        ),
    ]


def bound_of(params: Mapping[str, Any]) -> float:
    """1e-5, and 2e-4 from 0.1 billion parameters on: float32 sums of that length round further apart."""
    import jax

    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    return 1e-5 if count < 100_000_000 else 2e-4


def compare(model: ExportedModel, folder: Path) -> Parity:
    """Every comparison of a model with what its exported folder loads as.

    Raises:
      RunError: the folder does not load completely, or its tokenizer gives other ids.
    """
    exported = load_exported(folder, model.arch)
    budgets = [budget_name(bits) for bits in model.viable_budgets] if model.arch.plan == "visor" else ["dense"]
    budgets += ["auto"] if model.arch.plan == "visor" and model.has_policy else []
    parity = Parity(bound_of(model.params))
    for prompt in sample_prompts(model.arch):
        for budget in budgets:
            parity.comparisons.append(compare_one(model, exported, prompt, budget))
    return parity


def compare_one(model: ExportedModel, exported: Exported, prompt: Prompt, budget: str) -> Comparison:
    """One prompt under one budget: logits at every text token and behind each of 64 greedy ones, tokens, route."""
    token_ids = encode_prompt(model.tokenizer, prompt.question, len(prompt.images), model.system)
    answer = exported.answer(prompt, budget)
    if answer.prompt_ids != token_ids:
        raise RunError(f"export: the folder's processor encodes {prompt.name!r} as other token ids than this model")
    used, routes_equal, route_difference = budget, True, 0.0
    if budget == "auto":
        route = model.route(prompt.images, prompt.question)
        bits = model.viable_budgets[int(np.argmax(route))]
        used, routes_equal = budget_name(answer.bits), bits == answer.bits
        route_difference = float(np.max(np.abs(route - answer.route)))
    expected = model.logits(
        [*token_ids, *answer.tokens[:-1]], prompt.images, "full" if model.arch.plan == "dense" else used
    )
    best = greedy(expected[-NEW_TOKENS:], model.tokenizer.image_token_id)
    return Comparison(
        prompt=prompt.name,
        budget=budget,
        used=used,
        max_logit_difference=float(np.max(np.abs(expected - answer.logits))),
        greedy_tokens_equal=best.tolist() == answer.tokens,
        max_route_difference=route_difference,
        routes_equal=routes_equal,
    )


def greedy(logits: np.ndarray, image_token_id: int) -> np.ndarray:
    """The best token at each position; a picture's placeholder, which nobody may say, is never it."""
    logits = logits.copy()
    logits[:, image_token_id] = -np.inf
    return logits.argmax(axis=-1)


# --- the PyTorch side -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportedAnswer:
    """`logits` float32 [prompt's text tokens + 63, V]; `tokens` are 64; `bits` and `route` as the model decided."""

    prompt_ids: list[int]
    logits: np.ndarray
    tokens: list[int]
    bits: Bits
    route: np.ndarray | None


@dataclass(frozen=True)
class Exported:
    """The folder's model and processor."""

    model: Any
    processor: Any
    arch: Architecture

    def answer(self, prompt: Prompt, budget: str) -> ExportedAnswer:
        """Prefill and 63 cached steps, greedily."""
        import torch

        inputs = self.processor(prompt.images, prompt.question)
        placeholder = self.processor.config.image_token_index
        ids = inputs["input_ids"][0].tolist()
        prompt_ids = [token for at, token in enumerate(ids) if token != placeholder or self._starts_picture(inputs, at)]
        extra = {} if self.arch.plan == "dense" else {"budget": budget}
        with torch.no_grad():
            output = first = self.model(**self._twice(inputs), **extra, use_cache=True)
            is_text = [token != placeholder for token in ids]
            rows = [first.logits[0].float().numpy()[is_text]]
            tokens = greedy(rows[0][-1:], placeholder).tolist()
            while len(tokens) < NEW_TOKENS:
                step = torch.tensor([tokens[-1:]] * len(output.logits))
                output = self.model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
                rows.append(output.logits[0, -1:].float().numpy())
                tokens += greedy(rows[-1], placeholder).tolist()
        scores = getattr(first, "policy_logits", None)
        bits = tuple(bool(bit) for bit in first.budgets[0]) if self.arch.plan == "visor" else ()
        route = None if scores is None else scores[0].softmax(0).numpy()
        return ExportedAnswer(prompt_ids, np.concatenate(rows), tokens, bits, route)

    def _starts_picture(self, inputs: Mapping[str, Any], at: int) -> bool:
        """Whether a placeholder is the first of its picture's."""
        sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
        lengths = [self.processor.num_visual_tokens(size, len(sizes)) for size in sizes]
        starts = np.cumsum([0, *lengths[:-1]])
        before = int((inputs["input_ids"][0, :at] == self.processor.config.image_token_index).sum())
        return before in starts.tolist()

    def _twice(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs for the stock class. It cuts every single picture into tiles, which a model without grids does not:
        the prompt is given twice, as one group of two pictures, and those stay whole.
        """
        import torch

        if self.arch.plan == "visor" or self.arch.anyres.pinpoints or len(inputs.get("image_sizes", ())) != 1:
            return dict(inputs)
        doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
        return {**doubled, "batch_num_images": torch.tensor([2])}


def load_exported(folder: Path, arch: Architecture) -> Exported:
    """What a user gets from the folder, in float32.

    Raises:
      RunError: a weight is missing or has no place.
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
