"""Outputs of a VISOR model in PyTorch, and what `generate()` needs of it.

In: what the caller of `generate()` gives. Out: the inputs of each forward pass. transformers 5.24 renamed the cache,
`past_key_values` before, to `cache` in outputs, arguments and `generate()`; a VISOR model takes and answers both names
under every version.
This file travels inside every export; it needs torch and transformers only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from .cache_visor import VisorCache
from .configuration_visor import VisorConfig

NAMES = ("cache", "past_key_values")
NAME = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in NAMES)  # this transformers' own
PICTURES = ("pixel_values", "image_sizes", "batch_num_images")
OF_GENERATION = ("labels", "position_ids", "cache_position")  # what `generate()` carries along and no pass reads
OWN = (*PICTURES, "budget", "dial", "prompt_length")  # inputs that a text model does not have


class EitherName(ModelOutput):
    """Makes an output's cache readable and writable under both of its names."""

    def __getitem__(self, key):
        return super().__getitem__(NAME if key in NAMES else key)

    def __contains__(self, key) -> bool:
        return super().__contains__(NAME if key in NAMES else key)

    def get(self, key, default=None):
        return super().get(NAME if key in NAMES else key, default)

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(NAME if name in NAMES else name, value)

    def __getattr__(self, name: str):
        if name in NAMES and name != NAME:
            return getattr(self, NAME)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


@dataclass
class VisorModelOutput(EitherName, BaseModelOutputWithPast):
    """What `VisorModel` gives.

    Attributes:
        last_hidden_state: [B, S, D] after the final norm; in a "visor" plan a placeholder's column repeats that of the
            last text token before it.
        cache, past_key_values: keys and values so far.
        hidden_states: where asked for, [B, S, D] at the entry of each layer, visual tokens at their placeholders; and
            `last_hidden_state`.
        budgets: bool [B, slots], the slots that each sample had on.
        policy_logits: float32 [B, viable budgets], where the policy was asked.
    """

    budgets: Tensor | None = None
    policy_logits: Tensor | None = None


@dataclass
class VisorCausalLMOutput(EitherName, CausalLMOutputWithPast):
    """What a forward pass gives.

    Attributes:
        loss: mean cross-entropy of the labels, where there were labels.
        logits: [B, columns kept, vocab]. A placeholder's column repeats those of the last text token before it: in a
            "visor" plan only text predicts text.
        cache, past_key_values: keys and values so far, unless `use_cache` is false.
        hidden_states, budgets, policy_logits: see `VisorModelOutput`.
    """

    budgets: Tensor | None = None
    policy_logits: Tensor | None = None


def given_cache(past_key_values: Any, cache: Any) -> VisorCache | None:
    """The one cache that a caller gave under either name.

    Raises:
        ValueError: there are two of them.
        TypeError: it is another kind of cache.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("cache and past_key_values: two different caches; they are two names of one argument")
    found = cache if past_key_values is None else past_key_values
    if found is not None and not isinstance(found, VisorCache):
        raise TypeError(
            f"{NAME}: a {type(found).__name__}; expected a VisorCache: a VISOR layer keeps text and pictures"
            " apart. Leave it out, and the first forward pass makes one"
        )
    return found


def refuse_attentions(asked: bool | None) -> None:
    """Raises ValueError where attention weights are requested: the kernels never hold them."""
    if asked:
        raise ValueError(
            "output_attentions: a VISOR model gives no attention weights: its layers attend with PyTorch's fused"
            " kernel, over other tokens in each kind of layer. output_hidden_states works"
        )


class VisorGenerationMixin(GenerationMixin):
    """`generate()` with pictures, budgets and a `VisorCache`."""

    config: VisorConfig

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        """As `transformers.GenerationMixin.generate`, with `budget` and `dial` as in `forward`.

        Prompt lookup and assisted decoding work; the assistant is a VISOR model or any other with the same tokens.
        "auto" decides once, on the prompt.

        Raises:
            ValueError: attention weights are asked for, or another implementation of the cache.
            TypeError: a cache that is none of VISOR's.
        """
        found = given_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if found is not None:
            kwargs[NAME] = found
        parent: Any = super()
        return parent.generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        refuse_attentions(generation_config.output_attentions)
        kind = generation_config.cache_implementation
        if kind is not None and not kind.startswith("dynamic"):
            raise ValueError(f"cache_implementation: {kind!r}; a VISOR model has one kind of cache only, VisorCache")
        if model_kwargs.get(NAME) is None and generation_config.use_cache is not False:
            model_kwargs[NAME] = VisorCache(self.config)

    def _get_candidate_generator(self, *args, model_kwargs: dict, assistant_model: Any = None, **kwargs):
        """An assistant that knows no pictures or budgets is asked without them."""
        if assistant_model is not None:
            known = inspect.signature(assistant_model.forward).parameters
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in OWN or name in known}
        parent: Any = super()
        return parent._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: VisorCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: VisorCache | None = None,
        **kwargs,
    ) -> dict:
        """Inputs of the next forward pass: pictures with the first tokens only, behind a cache only the new tokens.

        Args:
            next_sequence_length: how many of the last tokens are new; None: all of them, or, where `attention_mask` is
                as long as `input_ids`, those that the cache does not hold.
        """
        held = given_cache(past_key_values, cache)
        past = 0 if held is None else held.get_seq_length()
        new = next_sequence_length if next_sequence_length is None or next_sequence_length > 0 else None
        if new is None and attention_mask is not None and past < input_ids.shape[1] == attention_mask.shape[1]:
            new = input_ids.shape[1] - past
        dropped = (*OF_GENERATION, *PICTURES) if past else OF_GENERATION
        inputs = {name: value for name, value in kwargs.items() if name not in dropped}
        if inputs_embeds is not None and is_first_iteration:
            tokens = {"inputs_embeds": inputs_embeds if new is None else inputs_embeds[:, -new:]}
        else:
            tokens = {"input_ids": (input_ids if new is None else input_ids[:, -new:]).contiguous()}
        return {
            **inputs,
            **tokens,
            NAME: held,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache", True),
        }

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, *args, **kwargs) -> dict:
        """Without a cache every step is a whole pass: it keeps the budgets that the prompt alone was given."""
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return {**updated, "budget": outputs.budgets}

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ) -> tuple:
        """Copies of each prompt for its beams: its pictures and its own budget are repeated with it."""
        tokens = model_kwargs.get("inputs_embeds")
        tokens = input_ids if tokens is None else tokens
        mask = model_kwargs.get("attention_mask")
        if tokens is not None:  # guesses of assisted decoding come with the prompt, and are none of it
            whole = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
            model_kwargs["prompt_length"] = whole if mask is None else mask.sum(1)
        counts, budget = model_kwargs.get("batch_num_images"), model_kwargs.get("budget")
        if expand_size > 1 and isinstance(budget, Sequence) and not isinstance(budget, str):
            fixed = self.config.resolve_budgets(budget, 1 if tokens is None else len(tokens))
            names = ["auto" if bits is None else list(bits) for bits in fixed]
            model_kwargs["budget"] = [name for name in names for _ in range(expand_size)]
        pictures = {name: model_kwargs.pop(name) for name in PICTURES[:2] if name in model_kwargs}
        parent: Any = super()
        ids, model_kwargs = parent._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if expand_size > 1 and (sizes := pictures.get("image_sizes")) is not None:
            own = torch.arange(len(sizes)).split([1] * len(sizes) if counts is None else [int(n) for n in counts])
            order = torch.cat([index for index in own for _ in range(expand_size)])
            if pictures["pixel_values"].dim() == 4:
                raise ValueError("pixel_values: several sequences for each prompt need [pictures, tiles, 3, S, S]")
            pictures = {name: value[order.to(value.device)] for name, value in pictures.items()}
        return ids, {**model_kwargs, **pictures}
