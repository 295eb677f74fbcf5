"""A model specialized to one budget and one shape of prompt, as `torch.export` and ahead-of-time compilers want it.

The model itself decides while it runs: where pictures stand, which samples have which slots on, how large the cache is.
Here all of that is settled once, from example inputs and a budget, and what is left are two programs without a choice:

    prefill: (input_ids [B, S], pixel_values) -> logits [B, S, vocab], keys and values
    step: (input_ids [B, 1], position [B, 1], keys and values) -> logits [B, 1, vocab], keys and values, longer by one

In: a model, example inputs and a budget. Out: modules, or `torch.export` programs of them. Prompts have no padding, all
rows of a batch have their pictures in the same columns, and pictures have the sizes of the example's.
This file travels inside every export; it needs torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cache_visor import Layout
from .configuration_visor import Bits
from .decoder_visor import Decoder, View, rotary

Cache = list[Tensor]  # in the decoder's order: a cross-attention layer's key and value, then those of its own layer


class Programs(NamedTuple):
    """What `export_programs` gives; `start` is the position of the first token behind the prompt."""

    prefill: torch.export.ExportedProgram
    step: torch.export.ExportedProgram
    start: int


class Specialized(nn.Module):
    """What both programs share: the decoder with the slots of one budget on."""

    def __init__(self, model: Any, bits: Bits):
        super().__init__()
        if model.config.plan != "visor":
            raise ValueError("specialize: a dense plan has no budgets; export transformers' own class")
        self.model, self.bits = model, bits

    @property
    def decoder(self) -> Decoder:
        return self.model.model.language_model

    def run(
        self, text: Tensor, visual: Tensor, layout: Layout | None, views: Mapping[str, View], past: Cache | None
    ) -> tuple[Tensor, Tensor, Cache]:
        """Text and visual tokens after the last layer, and all keys and values so far."""
        before, cache = iter(past or ()), []

        def pair() -> tuple[Tensor, ...]:
            return () if past is None else (next(before), next(before))

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
        return self.model.lm_head(self.decoder.norm(text))


class Prefill(Specialized):
    """Reads prompts of the example's shape."""

    def __init__(self, model: Any, bits: Bits, inputs: Mapping[str, Any]):
        super().__init__(model, bits)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and not bool(mask.bool().all()):
            raise ValueError("specialize: the prompts are padded; expected prompts of one length")
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
        layout = Layout(**{name: getattr(self, name) for name in self.names})
        embedded = self.decoder.embed_tokens(input_ids)
        text = embedded.gather(1, layout.text_index[..., None].expand(-1, -1, embedded.shape[2]))
        visual = text.new_zeros((len(input_ids), 0, embedded.shape[2]))
        if pixel_values is not None:
            seen: Any = self.model.model.get_image_features(pixel_values, self.sizes, self.counts, False, True)
            visual = torch.cat(list(seen.pooler_output)).to(text.dtype).unflatten(0, (len(input_ids), -1))
        views = {"text": self.view(layout.text_order, None), "joint": self.view(layout.order, layout)}
        text, _, cache = self.run(text, visual, layout, views, None)
        index = self.get_buffer("last_text")[..., None].expand(-1, -1, text.shape[2])
        return self.logits(text.gather(1, index)), cache

    def view(self, order: Tensor, layout: Layout | None) -> View:
        cos, sin = rotary(order, self.model.config, self.model.dtype)
        if layout is None or not self.model.config.bidirectional_vision:
            return View(cos, sin, None, causal=True)
        return View(cos, sin, order[:, None] <= layout.reach[..., None], causal=False)


class Step(Specialized):
    """Reads one token behind the keys and values of those before it."""

    def forward(self, input_ids: Tensor, position: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        text = self.decoder.embed_tokens(input_ids)
        cos, sin = rotary(position, self.model.config, text.dtype)
        view = View(cos, sin, None, causal=False)
        text, _, cache = self.run(text, text[:, :0], None, {"text": view, "joint": view}, cache)
        return self.logits(text), cache

    def dynamic_shapes(self) -> dict[str, Any]:
        """Of its arguments: every layer's own keys and values grow, those of visual tokens do not."""
        lengths: list[dict[int, Any] | None] = []
        for index in range(len(self.decoder.layers)):
            if index in self.decoder.crosses:
                lengths += [None, None]
            lengths += [{2: torch.export.Dim.AUTO}] * 2
        return {"input_ids": None, "position": None, "cache": lengths}


def specialize(model: Any, inputs: Mapping[str, Any], budget: str | Sequence[bool]) -> tuple[Prefill, Step]:
    """The two modules for prompts such as `inputs`, under a budget that is no "auto" (`model.route` decides that one).

    Raises:
        ValueError: the budget is "auto" or none of this model's, prompts are padded or differ in where pictures stand.
    """
    bits = model.config.resolve_budget(budget)
    if bits is None:
        raise ValueError(
            "specialize: budget 'auto' is a choice; ask model.route(**inputs) first, then specialize to it"
        )
    return Prefill(model, bits, inputs).eval(), Step(model, bits).eval()


@torch.no_grad()
def export_programs(model: Any, inputs: Mapping[str, Any], budget: str | Sequence[bool]) -> Programs:
    """`torch.export` programs of both; see `specialize`. The step takes a cache of any length."""
    prefill, step = specialize(model, inputs, budget)
    ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
    first = torch.export.export(prefill, (ids,) if pixels is None else (ids, pixels))
    _, cache = prefill(ids, pixels)
    position = torch.full((len(ids), 1), ids.shape[1])
    second = torch.export.export(step, (ids[:, -1:], position, cache), dynamic_shapes=step.dynamic_shapes())
    return Programs(first, second, ids.shape[1])
