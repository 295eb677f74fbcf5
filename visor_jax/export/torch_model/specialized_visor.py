"""Specializes a model to one budget and one prompt shape, for `torch.export` and ahead-of-time compilers.

The model itself has data-dependent control flow: positions of pictures, slots of each sample, size of the cache. Here
all of that is fixed from example inputs and a budget, which gives two programs without such control flow:

    prefill: (input_ids [B, S], pixel_values) -> logits [B, S, vocab], keys and values
    step: (input_ids [B, 1], position [B, 1], keys and values) -> logits [B, 1, vocab], keys and values, longer by one

In: a model, example inputs and a budget. Out: modules, or their `torch.export` programs. Prompts have no padding, all
rows of a batch have their pictures in the same columns, and pictures have the sizes of the example's pictures.
Every export contains this file; it needs torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cache_visor import Layout
from .configuration_visor import Bits
from .decoder_visor import Decoder, View, rotary

Cache = list[Tensor]  # key and value of each layer in order; before it those of its cross-attention, if it has one


class Programs(NamedTuple):
    """Result of `export_programs`; `start` is the position of the first token after the prompt."""

    prefill: torch.export.ExportedProgram
    step: torch.export.ExportedProgram
    start: int


class Specialized(nn.Module):
    """Base class of both programs: the decoder with the slots of one budget on."""

    def __init__(self, model: Any, bits: Bits):
        super().__init__()
        if model.config.plan != "visor":
            raise ValueError("specialize: a dense plan has no budgets; export transformers' class instead")
        self.model, self.bits = model, bits

    @property
    def decoder(self) -> Decoder:
        """The model's decoder."""
        return self.model.model.language_model

    def run(
        self, text: Tensor, visual: Tensor, layout: Layout | None, views: Mapping[str, View], past: Cache | None
    ) -> tuple[Tensor, Tensor, Cache]:
        """Runs all layers; returns text and visual tokens after the last one, and all keys and values so far.

        Args:
            text: [B, Nt, D].
            visual: [B, Nv, D].
            layout: positions of the tokens in a prefill; None in a decoding step.
            views: of "text" and "joint" layers.
            past: keys and values of earlier tokens; None in a prefill.
        """
        past_tensors, cache = iter(past or ()), []

        def pair() -> tuple[Tensor, ...]:
            return () if past is None else (next(past_tensors), next(past_tensors))

        for index in range(len(self.decoder.layers)):
            if index in self.decoder.crosses:
                text, *new = self.decoder.cross(index)(text, visual, None, *pair())
                cache += new
            layer = self.decoder.layer(index)
            if index in self.decoder.slots and self.bits[self.decoder.slots[index]]:
                both = text if layout is None else layout.merge(visual, text)
                both, *new = layer(both, views["joint"], *pair())
                visual, text = (visual, both) if layout is None else layout.split(both)
            else:
                text, *new = layer(text, views["text"], *pair())
            cache += new
        return text, visual, cache

    def logits(self, text: Tensor) -> Tensor:
        """Returns the logits [B, n, vocab] of hidden states [B, n, D]."""
        return self.model.lm_head(self.decoder.norm(text))


class Prefill(Specialized):
    """Prefills prompts that have the example's shape.

    Raises:
        ValueError: prompts are padded, or their pictures are in different columns.
    """

    def __init__(self, model: Any, bits: Bits, inputs: Mapping[str, Any]):
        super().__init__(model, bits)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError("specialize: the prompts are padded; expected prompts of equal length")
        is_image = ids == model.config.image_token_index
        if not bool((is_image == is_image[:1]).all()):
            raise ValueError("specialize: expected pictures in the same columns of every prompt")
        layout = Layout.of(is_image, torch.ones_like(is_image), model.config.bidirectional_vision)
        self.names = list(vars(layout))
        for name, value in vars(layout).items():
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("last_text", layout.last_text, persistent=False)
        self.sizes = [(int(height), int(width)) for height, width in inputs.get("image_sizes", ())]
        counts = inputs.get("batch_num_images")
        self.counts = [1] * len(self.sizes) if counts is None else [int(count) for count in counts]

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Returns logits [B, S, vocab] of `input_ids` int64 [B, S], and keys and values."""
        layout = Layout(**{name: getattr(self, name) for name in self.names})
        embedded = self.decoder.embed_tokens(input_ids)
        text = embedded.gather(1, layout.text_index[..., None].expand(-1, -1, embedded.shape[2]))
        visual = text.new_zeros((len(input_ids), 0, embedded.shape[2]))
        if pixel_values is not None:
            output: Any = self.model.model.get_image_features(pixel_values, self.sizes, self.counts, False, True)
            visual = torch.cat(list(output.pooler_output)).to(text.dtype).unflatten(0, (len(input_ids), -1))
        views = {"text": self.view(layout.text_order, None), "joint": self.view(layout.order, layout)}
        text, _, cache = self.run(text, visual, layout, views, None)
        index = self.get_buffer("last_text")[..., None].expand(-1, -1, text.shape[2])
        return self.logits(text.gather(1, index)), cache

    def view(self, order: Tensor, layout: Layout | None) -> View:
        """Returns the view of tokens at `order` [B, n]: causal, or bidirectional within pictures given their layout."""
        cos, sin = rotary(order, self.model.config, self.model.dtype)
        if layout is None or not self.model.config.bidirectional_vision:
            return View(cos, sin, None, causal=True)
        return View(cos, sin, order[:, None] <= layout.reach[..., None], causal=False)


class Step(Specialized):
    """Decodes one token per sample, given the keys and values of the tokens before it."""

    def forward(self, input_ids: Tensor, position: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Returns logits [B, 1, vocab] of `input_ids` int64 [B, 1] at `position` int64 [B, 1], and keys and values."""
        text = self.decoder.embed_tokens(input_ids)
        cos, sin = rotary(position, self.model.config, text.dtype)
        view = View(cos, sin, None, causal=False)
        text, _, cache = self.run(text, text[:, :0], None, {"text": view, "joint": view}, cache)
        return self.logits(text), cache

    def dynamic_shapes(self) -> dict[str, Any]:
        """Returns the dynamic shapes of `forward`: keys and values of layers grow, those of cross-attention do not."""
        lengths: list[dict[int, Any] | None] = []
        for index in range(len(self.decoder.layers)):
            if index in self.decoder.crosses:
                lengths += [None, None]
            lengths += [{2: torch.export.Dim.AUTO}] * 2
        return {"input_ids": None, "position": None, "cache": lengths}


def specialize(model: Any, inputs: Mapping[str, Any], budget: str | Sequence[bool]) -> tuple[Prefill, Step]:
    """Returns the two modules for prompts with the shape of `inputs`, under one budget.

    Raises:
        ValueError: the budget is "auto" (`model.route` decides it first) or not a budget of this model, prompts are
            padded, or their pictures are in different columns.
    """
    bits = model.config.resolve_budget(budget)
    if bits is None:
        raise ValueError(
            "specialize: budget 'auto' is not fixed; decide with model.route(**inputs) first, then specialize to that"
        )
    return Prefill(model, bits, inputs).eval(), Step(model, bits).eval()


@torch.no_grad()
def export_programs(model: Any, inputs: Mapping[str, Any], budget: str | Sequence[bool]) -> Programs:
    """Returns `torch.export` programs of both modules of `specialize`; the step takes a cache of any length."""
    prefill, step = specialize(model, inputs, budget)
    ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
    first = torch.export.export(prefill, (ids,) if pixels is None else (ids, pixels))
    _, cache = prefill(ids, pixels)
    position = torch.full((len(ids), 1), ids.shape[1])
    second = torch.export.export(step, (ids[:, -1:], position, cache), dynamic_shapes=step.dynamic_shapes())
    return Programs(first, second, ids.shape[1])
