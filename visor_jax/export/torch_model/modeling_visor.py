"""VISOR in PyTorch: LLaVA-OneVision's inputs, and a budget of self-attention layers for every sample.

In: `input_ids` with one placeholder for each visual token, `pixel_values`, `image_sizes`, `attention_mask`, `labels`,
as transformers' LLaVA-OneVision processor and trainer give them, and `budget`. Out: logits, loss, cache and the budgets
that were used; `generate()` works as for any model of transformers.
This file travels inside every export; it needs torch and transformers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.generation.utils import GenerationMixin
from transformers.utils.generic import ModelOutput

from .cache_visor import PADDING, Layout, VisorCache
from .configuration_visor import Bits, VisorConfig
from .decoder_visor import CrossAttention, Decoder, Routing, State
from .vision_visor import Connector, VisionTower, pack, tile_grid

LOSS_ARGUMENTS = {"num_items_in_batch", "ignore_index", "shift_labels", "reduction"}  # of transformers' loss function
Budget = str | int | Sequence[bool] | Sequence[str] | Sequence[Sequence[bool]] | Tensor


@dataclass
class VisorCausalLMOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        loss: mean cross-entropy of the labels, where there were labels.
        logits: [B, columns kept, vocab]. A placeholder's column repeats those of the last text token before it: in a
            "visor" plan only text predicts text.
        past_key_values: the cache, where `use_cache` was set.
        budgets: bool [B, slots], the slots that each sample had on.
        policy_logits: float32 [B, viable budgets], where the policy was asked.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: VisorCache | None = None
    budgets: Tensor | None = None
    policy_logits: Tensor | None = None


class VisorPreTrainedModel(PreTrainedModel):
    config: VisorConfig
    config_class = VisorConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["DecoderLayer", "CrossAttention", "VisionLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisorModel):
            init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)
        elif isinstance(module, Routing):
            init.normal_(module.token, std=self.config.text_config.initializer_range)
        elif isinstance(module, CrossAttention):
            init.ones_(module.gate)


class VisorModel(VisorPreTrainedModel):
    """Everything up to the final norm: tower, connector, decoder, policy."""

    def __init__(self, config: VisorConfig):
        super().__init__(config)
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Connector(config)
        self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.language_model = Decoder(config)
        if config.plan == "visor":
            self.routing = Routing(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor, batch_num_images: Tensor | None = None
    ) -> list[Tensor]:
        """The visual tokens [length, D] of each picture.

        Args:
            pixel_values: normalised tiles [pictures, tiles, 3, S, S], padded to the picture with most tiles, or
                [all tiles, 3, S, S].
            image_sizes: int [pictures, 2], (height, width) of the pictures as they were.
            batch_num_images: how many pictures each prompt with pictures holds; None: one each. Only the picture of
                a prompt that has no other is cut into tiles.
        """
        counts = [1] * len(image_sizes) if batch_num_images is None else [int(n) for n in batch_num_images]
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        alone = [count == 1 for count in counts for _ in range(count)]
        if len(alone) != len(sizes):
            raise ValueError(f"batch_num_images: {sum(counts)} pictures; image_sizes has {len(sizes)}")
        tiles = [self._num_tiles(size) if single else 1 for size, single in zip(sizes, alone, strict=True)]
        if pixel_values.dim() == 5:
            if len(pixel_values) != len(sizes) or pixel_values.shape[1] < max(tiles):
                raise ValueError(
                    f"pixel_values: {list(pixel_values.shape[:2])} pictures and tiles; their sizes make {tiles} tiles"
                )
            pixel_values = torch.cat([picture[:count] for picture, count in zip(pixel_values, tiles, strict=True)])
        elif len(pixel_values) != sum(tiles):
            raise ValueError(f"pixel_values: {len(pixel_values)} tiles; the pictures' sizes make {sum(tiles)}")
        features = self.multi_modal_projector(self.vision_tower(pixel_values)).split(tiles)
        return [
            pack(own, size, self.image_newline.to(own.dtype), self.config)
            for own, size in zip(features, sizes, strict=True)
        ]

    def _num_tiles(self, size: tuple[int, int]) -> int:
        if not self.config.image_grid_pinpoints:
            return 1
        rows, columns = tile_grid(size, self.config)
        return 1 + rows * columns

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        past_key_values: VisorCache | None = None,
        budget: Budget | None = None,
        dial: float = 0.0,
        prompt_length: Tensor | None = None,
    ) -> tuple[Tensor, VisorCache, Tensor | None]:
        """Final hidden states [B, S, D] (see `VisorCausalLMOutput.logits`), the cache, and the policy's scores."""
        batch, device = len(input_ids), input_ids.device
        fresh = past_key_values is None or past_key_values.get_seq_length() == 0
        cache = VisorCache(self.config.num_slots, batch, device) if past_key_values is None else past_key_values
        if pixel_values is not None and not fresh:
            raise ValueError("pixel_values: pictures can only come with the first tokens, not behind a cache")
        new = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            new = attention_mask[:, -input_ids.shape[1] :].bool()
        # A placeholder that was generated, or stands behind a cache, is text as any other token.
        is_image = (input_ids == self.config.image_token_index) & new if fresh else torch.zeros_like(new)
        mask = torch.cat([cache.order != PADDING, new], dim=1)
        layout = Layout.of(is_image, mask, self.config.bidirectional_vision)
        embeddings = self.language_model.embed_tokens(input_ids)
        text = embeddings.gather(1, layout.text_index[..., None].expand(-1, -1, embeddings.shape[2]))
        visual = self._visual_tokens(layout, text, pixel_values, image_sizes, batch_num_images)

        state = self.language_model.begin(text, visual, layout, cache)
        self.language_model.run(state, range(2))
        scores = None
        if cache.budgets is None:
            lengths = new.sum(1) if prompt_length is None else prompt_length
            cache.budgets, scores = self._decide(budget, dial, state, lengths)
        self.language_model.run(state, range(2, len(self.language_model.layers)))
        if self.config.plan == "dense":
            hidden = layout.merge(state.visual, state.text)
        else:
            index = layout.last_text[..., None].expand(-1, -1, state.text.shape[2])
            hidden = state.text.gather(1, index)
        return self.language_model.norm(hidden), cache, scores

    def _visual_tokens(self, layout: Layout, text: Tensor, pixel_values, image_sizes, batch_num_images) -> Tensor:
        """V(0) [B, Nv, D]: the pictures' tokens in the order of their placeholders, zero where padded."""
        visual = text.new_zeros((*layout.visual_index.shape, text.shape[2]))
        features: list[Tensor] = []
        if pixel_values is not None:
            if image_sizes is None:
                raise ValueError("image_sizes: missing, though pixel_values is given")
            features = self.get_image_features(pixel_values, image_sizes, batch_num_images)
        placeholders, lengths = int(layout.visual_valid.sum()), [len(own) for own in features]
        if placeholders != sum(lengths):
            raise ValueError(
                f"input_ids: {placeholders} image placeholders; the pictures make {sum(lengths)} visual tokens"
            )
        if features:
            visual[layout.visual_valid] = torch.cat(features).to(visual.dtype)
        return visual

    def _decide(
        self, budget: Budget | None, dial: float, state: State, prompt_length: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Each sample's slots, bool [B, slots], and the policy's scores where some sample asks for "auto"."""
        batch, device = len(state.text), state.text.device
        fixed = self._budgets(budget, batch)
        scores = None
        if any(bits is None for bits in fixed):
            hidden = self.language_model.routing_hidden(self.routing.token, state, prompt_length)
            scores = self.routing(hidden)[:, : len(self.config.viable_budgets)]
            viable = self.config.viable
            best = choose(scores, self._costs(viable, state, prompt_length).to(device), dial)
            fixed = [viable[i] if bits is None else bits for bits, i in zip(fixed, best.tolist(), strict=True)]
        return torch.tensor(fixed, dtype=torch.bool, device=device).reshape(batch, self.config.num_slots), scores

    def _costs(self, viable: list[Bits], state: State, prompt_length: Tensor) -> Tensor:
        """Decoder FLOPs of each prompt under each viable budget: [B, viable]."""
        num_visual = state.layout.visual_valid.sum(1).tolist()
        num_text = (state.layout.text_order < prompt_length[:, None]).sum(1).tolist()
        counts = zip(num_visual, num_text, strict=True)
        return torch.tensor([[self.config.decoder_flops(bits, nv, nt) for bits in viable] for nv, nt in counts])

    def _budgets(self, budget: Budget | None, batch: int) -> list[Bits | None]:
        """The budget of each sample; None for one that the policy decides. One budget holds for all samples."""
        if budget is None:
            budget = "auto" if self.config.has_policy else "full"
        if isinstance(budget, int):
            budget = str(budget)
        asked: Any = budget.tolist() if isinstance(budget, Tensor) else budget
        if isinstance(asked, str) or all(isinstance(bit, bool | int) for bit in asked):
            return [self.config.resolve_budget(asked)] * batch
        if len(asked) != batch:
            raise ValueError(f"budget: {len(asked)} budgets for {batch} samples")
        return [self.config.resolve_budget(own) for own in asked]


def choose(scores: Tensor, costs: Tensor, dial: float) -> Tensor:
    """Index [B] of each sample's budget, of scores and costs [B, viable]: each score gains dial * log(cost / cheapest).

    The dearest budget wins whose dial, the one from which it beats all cheaper ones, has been passed: so a higher dial
    never picks a cheaper budget, rounding or not. Of equal cost the better and then the first one counts.
    """
    if math.isnan(dial):
        raise ValueError("dial=nan: expected a number")
    own, other = costs[:, :, None], costs[:, None, :]
    steps = torch.log(costs / costs.min(1, keepdim=True).values)
    behind = scores[:, None, :] - scores[:, :, None]  # [B, i, j]: by how much i's score is below j's
    dearer = (steps[:, :, None] - steps[:, None, :]).clamp_min(torch.finfo(steps.dtype).tiny)
    index = torch.arange(costs.shape[1], device=costs.device)
    outdone = (own == other) & ((behind > 0) | ((behind == 0) & (index[None, :] < index[:, None])))
    passed_from = torch.where(own > other, behind / dearer, torch.where(outdone, math.inf, -math.inf))
    passed = passed_from.amax(2) < min(max(dial, -1e38), 1e38)
    return torch.where(passed, costs, -math.inf).argmax(1)


class VisorForConditionalGeneration(VisorPreTrainedModel, GenerationMixin):
    """The model with its output head: `forward`, `generate`, and `route`."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: VisorConfig):
        super().__init__(config)
        self.model = VisorModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        budget: Budget | None = None,
        dial: float = 0.0,
        past_key_values: VisorCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **loss_arguments,
    ) -> VisorCausalLMOutput | tuple:
        """One pass over a batch of prompts, or over the next tokens behind a cache.

        Args:
            input_ids: int [B, S]; each picture as a run of placeholders, one for each of its visual tokens.
            pixel_values, image_sizes, batch_num_images: see `VisorModel.get_image_features`.
            attention_mask: [B, S] or [B, past + S], 0 at padding, on either side.
            labels: int [B, S], -100 where there is no target; "auto" then routes on what comes before the first one.
            budget: which slots are on; "auto", "full", "empty", 3, "0b101", one boolean a slot, or a list (or a bool
                tensor [B, slots]) with one budget for each sample. Behind a cache the cache's budgets hold.
            dial: shifts "auto": above 0 towards dearer budgets, below 0 towards cheaper ones.
            logits_to_keep: logits of this many last columns only, 0 for all; or the columns themselves.

        Raises:
            ValueError: placeholders, pictures, tiles or budgets do not fit together.
            TypeError: an argument that this model does not have.
        """
        given = {name for name, value in loss_arguments.items() if value is not None and value is not False}
        if unknown := sorted(given - LOSS_ARGUMENTS):
            raise TypeError(f"forward: unexpected arguments {', '.join(unknown)}; slots are chosen by `budget`")
        prompt_length = None
        if labels is not None:
            seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            prompt_length = (seen * ((labels != -100).cumsum(1) == 0)).sum(1)
        hidden, cache, scores = self.model(
            input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            batch_num_images=batch_num_images,
            past_key_values=past_key_values,
            budget=budget,
            dial=dial,
            prompt_length=prompt_length,
        )
        kept_columns = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        logits = self.lm_head(hidden[:, kept_columns])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **loss_arguments)
        kept = cache if use_cache or (use_cache is None and past_key_values is not None) else None
        output = VisorCausalLMOutput(loss, logits, kept, cache.budgets, scores)
        return output if return_dict in (None, True) else output.to_tuple()

    @torch.no_grad()
    def route(self, input_ids: Tensor, **inputs) -> Tensor:
        """The policy's probabilities over the viable budgets, float32 [B, viable]; prompts as `forward` takes them."""
        _, _, scores = self.model(input_ids, **{**inputs, "budget": "auto"})
        if scores is None:
            raise ValueError("route: a dense plan has no policy")
        return scores.softmax(1)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass makes a VisorCache

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: VisorCache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> dict:
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        names = ("batch_num_images", "budget", "dial", "logits_to_keep", "pixel_values", "image_sizes")
        inputs = {name: kwargs[name] for name in names if name in kwargs}
        if past:
            inputs = {name: value for name, value in inputs.items() if name not in names[-2:]}
            input_ids = input_ids[:, past:] if input_ids.shape[1] > past else input_ids  # else only the new ones came
        return {
            **inputs,
            "input_ids": input_ids.contiguous(),
            "past_key_values": past_key_values,
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
        counts, budget = model_kwargs.get("batch_num_images"), model_kwargs.get("budget")
        if expand_size > 1 and isinstance(budget, Sequence) and not isinstance(budget, str):
            fixed = self.model._budgets(budget, 1 if input_ids is None else len(input_ids))
            names = ["auto" if bits is None else list(bits) for bits in fixed]
            model_kwargs["budget"] = [name for name in names for _ in range(expand_size)]
        pictures = {name: model_kwargs.pop(name) for name in ("pixel_values", "image_sizes") if name in model_kwargs}
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
