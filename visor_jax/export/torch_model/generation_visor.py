"""Output classes of a VISOR model in PyTorch, and its `generate()`.

In: the arguments of `generate()`. Out: the inputs of each forward pass. transformers 5.24 renamed the cache from
`past_key_values` to `cache` in outputs, arguments and `generate()`; a VISOR model supports both names under every
version.
Every export contains this file; it needs torch and transformers only.
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
NAME = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in NAMES)  # of this transformers
PICTURES = ("pixel_values", "image_sizes", "batch_num_images")
OF_GENERATION = ("labels", "position_ids", "cache_position")  # `generate()` passes these on; `forward` lacks them
OWN = (*PICTURES, "budget", "dial", "prompt_length")  # inputs that a text model does not have


class EitherName(ModelOutput):
    """Makes an output's cache readable and writable under both of its names."""

    def __getitem__(self, key):
        return super().__getitem__(NAME if key in NAMES else key)

    def __contains__(self, key) -> bool:
        return super().__contains__(NAME if key in NAMES else key)

    def get(self, key, default=None):
        """Returns a field's value, or `default` if it is absent."""
        return super().get(NAME if key in NAMES else key, default)

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(NAME if name in NAMES else name, value)

    def __getattr__(self, name: str):
        if name in NAMES and name != NAME:
            return getattr(self, NAME)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


@dataclass
class VisorModelOutput(EitherName, BaseModelOutputWithPast):
    """Output of `VisorModel`.

    Attributes:
        last_hidden_state: [B, S, D] after the final norm; in a "visor" plan a placeholder's column repeats that of the
            last text token before it.
        cache, past_key_values: keys and values so far.
        hidden_states: if requested, the input [B, S, D] of each layer, visual tokens at their placeholders; and
            `last_hidden_state`.
        budgets: bool [B, slots], the slots that each sample had on.
        policy_logits: float32 [B, viable budgets] if the policy ran, else None.
    """

    budgets: Tensor | None = None
    policy_logits: Tensor | None = None


@dataclass
class VisorCausalLMOutput(EitherName, CausalLMOutputWithPast):
    """Output of `VisorForConditionalGeneration`.

    Attributes:
        loss: mean cross-entropy of the labels, if labels were given.
        logits: [B, columns kept, vocab]. In a "visor" plan only text predicts text: a placeholder's column repeats the
            logits of the last text token before it.
        cache, past_key_values: keys and values so far, unless `use_cache` is false.
        hidden_states, budgets, policy_logits: see `VisorModelOutput`.
    """

    budgets: Tensor | None = None
    policy_logits: Tensor | None = None


def given_cache(past_key_values: Any, cache: Any) -> VisorCache | None:
    """Returns the cache that a caller passed under either name, or None.

    Raises:
        ValueError: two different caches were passed.
        TypeError: the cache is not a `VisorCache`.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("cache and past_key_values: two different caches; they are two names of one argument")
    given = cache if past_key_values is None else past_key_values
    if given is not None and not isinstance(given, VisorCache):
        raise TypeError(
            f"{NAME}: a {type(given).__name__}; expected a VisorCache, which stores text and pictures separately."
            " Omit it, and the first forward pass creates one"
        )
    return given


def refuse_attentions(requested: bool | None) -> None:
    """Raises ValueError if attention weights are requested: the fused kernels do not return them."""
    if requested:
        raise ValueError(
            "output_attentions: a VISOR model does not return attention weights: its layers use PyTorch's fused"
            " kernel, over different tokens in each kind of layer. output_hidden_states works"
        )


class VisorGenerationMixin(GenerationMixin):
    """`generate()` with pictures, budgets and a `VisorCache`."""

    config: VisorConfig

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        """Generates like `transformers.GenerationMixin.generate`, with `budget` and `dial` as in `forward`.

        Prompt lookup and assisted decoding work; the assistant is a VISOR model or any other with the same tokens. The
        budget "auto" is decided once, from the prompt.

        Raises:
            ValueError: attention weights or another implementation of the cache are requested.
            TypeError: the cache is not a `VisorCache`.
        """
        given = given_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if given is not None:
            kwargs[NAME] = given
        parent: Any = super()
        return parent.generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        refuse_attentions(generation_config.output_attentions)
        kind = generation_config.cache_implementation
        if kind is not None and not kind.startswith("dynamic"):
            raise ValueError(f"cache_implementation: {kind!r}; a VISOR model has only one kind of cache, VisorCache")
        if model_kwargs.get(NAME) is None and generation_config.use_cache is not False:
            model_kwargs[NAME] = VisorCache(self.config)

    def _get_candidate_generator(self, *args, model_kwargs: dict, assistant_model: Any = None, **kwargs):
        """Drops pictures and budgets from the assistant's inputs if its `forward` does not take them."""
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
        """Returns the inputs of the next forward pass: with a filled cache, only the new tokens and no pictures.

        Args:
            next_sequence_length: how many of the last tokens are new; None: those that the cache does not hold if
                `attention_mask` is as long as `input_ids`, else all.
        """
        given = given_cache(past_key_values, cache)
        past = 0 if given is None else given.get_seq_length()
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
            NAME: given,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache", True),
        }

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, *args, **kwargs) -> dict:
        """Fixes the budgets of the first pass for later steps, which without a cache would decide again."""
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return {**updated, "budget": outputs.budgets}

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ) -> tuple:
        """Repeats each prompt `expand_size` times for its beams, with its pictures and its budget."""
        tokens = model_kwargs.get("inputs_embeds")
        tokens = input_ids if tokens is None else tokens
        mask = model_kwargs.get("attention_mask")
        if tokens is not None:  # the first pass of assisted decoding also gets candidate tokens, after the prompt
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
            by_prompt = torch.arange(len(sizes)).split([1] * len(sizes) if counts is None else [int(n) for n in counts])
            order = torch.cat([index for index in by_prompt for _ in range(expand_size)])
            if pictures["pixel_values"].dim() == 4:
                raise ValueError("pixel_values: several sequences per prompt need [pictures, tiles, 3, S, S]")
            pictures = {name: value[order.to(value.device)] for name, value in pictures.items()}
        return ids, {**model_kwargs, **pictures}
