"""VISOR in PyTorch: LLaVA-OneVision's inputs, and a budget of self-attention layers for every sample.

In: `input_ids` with one placeholder per visual token, `pixel_values`, `image_sizes`, `attention_mask`, `labels`, in the
form of transformers' LLaVA-OneVision processor and trainer, and `budget`. Out: logits, loss, cache and the budgets that
were used; `generate()` works as for any model of transformers.
Every export contains this file; it needs torch and transformers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .cache_visor import PADDING, Layout, VisorCache
from .configuration_visor import Bits, VisorConfig
from .decoder_visor import CrossAttention, Decoder, Routing, State
from .generation_visor import (
    NAME,
    NAMES,
    VisorCausalLMOutput,
    VisorGenerationMixin,
    VisorModelOutput,
    given_cache,
    refuse_attentions,
)
from .vision_visor import Connector, VisionTower, pack, tile_grid

LOSS_ARGUMENTS = {"num_items_in_batch", "ignore_index", "shift_labels", "reduction"}  # of transformers' loss function
Budget = str | int | Sequence[bool] | Sequence[str] | Sequence[Sequence[bool]] | Tensor


class VisorPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization of both VISOR models, from transformers."""

    config: VisorConfig
    config_class = VisorConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["DecoderLayer", "CrossAttention", "VisionLayer"]
    _skip_keys_device_placement: ClassVar = list(NAMES)
    supports_gradient_checkpointing = True

    def _returns_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

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
        """Returns the token embeddings [vocab, D]."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embeddings."""
        self.language_model.embed_tokens = value

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor,
        batch_num_images: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Returns each picture's visual tokens [length, D] in `pooler_output`, patch features in `last_hidden_state`.

        Args:
            pixel_values: normalized tiles [pictures, tiles, 3, S, S], padded to the picture with most tiles, or
                [all tiles, 3, S, S].
            image_sizes: int [pictures, 2], (height, width) of the original pictures.
            batch_num_images: number of pictures of each prompt with pictures; None: one each. Only a prompt's single
                picture is cut into tiles.
            output_hidden_states: also return the inputs of the tower's layers and its output; None: as configured.
            return_dict: return an output object instead of a tuple; None: as configured.

        Raises:
            ValueError: the numbers of pictures or tiles do not fit together.
        """
        counts = [1] * len(image_sizes) if batch_num_images is None else [int(n) for n in batch_num_images]
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        is_single = [count == 1 for count in counts for _ in range(count)]
        if len(is_single) != len(sizes):
            raise ValueError(f"batch_num_images: {sum(counts)} pictures; image_sizes has {len(sizes)}")
        tiles = [self._num_tiles(size) if single else 1 for size, single in zip(sizes, is_single, strict=True)]
        if pixel_values.dim() == 5:
            if len(pixel_values) != len(sizes) or pixel_values.shape[1] < max(tiles):
                raise ValueError(
                    f"pixel_values: {list(pixel_values.shape[:2])} pictures and tiles; image_sizes give {tiles} tiles"
                )
            pixel_values = torch.cat([picture[:count] for picture, count in zip(pixel_values, tiles, strict=True)])
        elif len(pixel_values) != sum(tiles):
            raise ValueError(f"pixel_values: {len(pixel_values)} tiles; image_sizes give {sum(tiles)}")
        collect = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states: list[Tensor] | None = [] if collect else None
        patches = self.vision_tower(pixel_values, hidden_states)
        features = self.multi_modal_projector(patches).split(tiles)
        pictures: Any = tuple(
            pack(of_picture, size, self.image_newline.to(of_picture.dtype), self.config)
            for of_picture, size in zip(features, sizes, strict=True)
        )
        output = BaseModelOutputWithPooling(
            last_hidden_state=patches,
            pooler_output=pictures,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def _num_tiles(self, size: tuple[int, int]) -> int:
        if not self.config.image_grid_pinpoints:
            return 1
        rows, columns = tile_grid(size, self.config)
        return 1 + rows * columns

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        budget: Budget | None = None,
        dial: float = 0.0,
        prompt_length: Tensor | None = None,
        past_key_values: VisorCache | None = None,
        cache: VisorCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> VisorModelOutput | tuple:
        """Returns final hidden states, cache, budgets and policy scores.

        Arguments and errors are those of `VisorForConditionalGeneration.forward`.
        """
        refuse_attentions(self.config.output_attentions if output_attentions is None else output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        held = self._checked_cache(given_cache(past_key_values, cache), use_cache)
        fresh = held.get_seq_length() == 0
        if pixel_values is not None and not fresh:
            raise ValueError("pixel_values: pictures can only come with the first tokens, not behind a cache")
        embeddings, is_image = self._embedded(input_ids, inputs_embeds)
        new = torch.ones_like(is_image)
        if attention_mask is not None:
            new = attention_mask[:, -new.shape[1] :].bool()
        # With a filled cache, pictures are impossible: a placeholder that was generated is an ordinary text token.
        is_image = is_image & new if fresh else torch.zeros_like(new)
        mask = new if held.order is None else torch.cat([held.order != PADDING, new], dim=1)
        layout = Layout.of(is_image, mask, self.config.bidirectional_vision)
        text = embeddings.gather(1, layout.text_index[..., None].expand(-1, -1, embeddings.shape[2]))
        visual = self._visual_tokens(layout, text, pixel_values, image_sizes, batch_num_images)

        state = self.language_model.begin(text, visual, layout, held, bool(output_hidden_states))
        self.language_model.run(state, self.language_model.shared_layers)
        scores = None
        if held.budgets is None:
            lengths = new.sum(1) if prompt_length is None else prompt_length
            held.budgets, scores = self._decide(budget, dial, state, lengths)
        first = self.language_model.shared_layers.stop
        self.language_model.run(state, range(first, len(self.language_model.layers)))
        if self.config.plan == "dense":
            hidden = layout.merge(state.visual, state.text)
        else:
            index = layout.last_text[..., None].expand(-1, -1, state.text.shape[2])
            hidden = state.text.gather(1, index)
        hidden = self.language_model.norm(hidden)
        kept: Any = None if self.language_model.checkpoints or use_cache is False else held
        output = VisorModelOutput(
            last_hidden_state=hidden,
            hidden_states=None if state.hidden_states is None else (*state.hidden_states, hidden),
            budgets=held.budgets,
            policy_logits=scores,
            **{NAME: kept},
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def _checked_cache(self, cache: VisorCache | None, use_cache: bool | None) -> VisorCache:
        if self.language_model.checkpoints and (use_cache or cache is not None):
            raise ValueError("use_cache: gradient checkpointing keeps no cache; expected use_cache=False and no cache")
        return VisorCache(self.config) if cache is None else cache

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the columns' embeddings [B, S, D], and which columns are placeholders of pictures, bool [B, S]."""
        placeholder = self.config.image_token_index
        if input_ids is not None and inputs_embeds is None:
            return self.language_model.embed_tokens(input_ids), input_ids == placeholder
        if inputs_embeds is None or input_ids is not None:
            raise ValueError("input_ids and inputs_embeds: expected one of them")
        token = torch.tensor(placeholder, device=inputs_embeds.device)
        return inputs_embeds, (inputs_embeds == self.language_model.embed_tokens(token)).all(-1)

    def _visual_tokens(self, layout: Layout, text: Tensor, pixel_values, image_sizes, batch_num_images) -> Tensor:
        """Returns V [B, Nv, D] for the first layer: visual tokens in the order of their placeholders, padded with 0."""
        visual = text.new_zeros((*layout.visual_index.shape, text.shape[2]))
        features: list[Tensor] = []
        if pixel_values is not None:
            if image_sizes is None:
                raise ValueError("image_sizes: missing, though pixel_values is given")
            output: Any = self.get_image_features(pixel_values, image_sizes, batch_num_images, False, True)
            features = list(output.pooler_output)
        placeholders, expected = int(layout.visual_valid.sum()), sum(len(of_picture) for of_picture in features)
        if placeholders != expected:
            raise ValueError(f"input_ids: {placeholders} image placeholders; pictures have {expected} visual tokens")
        if features:
            visual[layout.visual_valid] = torch.cat(features).to(visual.dtype)
        return visual

    def _decide(
        self, budget: Budget | None, dial: float, state: State, prompt_length: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the slots of each sample, bool [B, slots], and the policy's scores if a sample's budget is "auto"."""
        batch, device = len(state.text), state.text.device
        fixed = self.config.resolve_budgets(budget, batch)
        scores = None
        if any(bits is None for bits in fixed):
            decoder = self.language_model
            scores = self.routing(lambda token: decoder.routing_hidden(token, state, prompt_length))
            scores = scores[:, : len(self.config.viable_budgets)]
            viable = self.config.viable
            best = choose(scores, self._costs(viable, state, prompt_length).to(device), dial)
            fixed = [viable[i] if bits is None else bits for bits, i in zip(fixed, best.tolist(), strict=True)]
        return torch.tensor(fixed, dtype=torch.bool, device=device).reshape(batch, self.config.num_slots), scores

    def _costs(self, viable: list[Bits], state: State, prompt_length: Tensor) -> Tensor:
        """Returns the decoder FLOPs of each prompt under each viable budget: [B, viable]."""
        num_visual = state.layout.visual_valid.sum(1).tolist()
        num_text = (state.layout.text_order < prompt_length[:, None]).sum(1).tolist()
        counts = zip(num_visual, num_text, strict=True)
        return torch.tensor([[self.config.decoder_flops(bits, nv, nt) for bits in viable] for nv, nt in counts])


def choose(scores: Tensor, costs: Tensor, dial: float) -> Tensor:
    """Returns the index [B] of the budget with the highest score + dial * log(cost / lowest cost) for each sample.

    Every budget has a threshold, the dial above which it beats all cheaper budgets. The most expensive budget whose
    threshold is exceeded is chosen, so a higher dial never selects a cheaper budget, whatever the rounding. Of budgets
    with equal cost, the one with the highest score counts, then the first.

    Args:
        scores: [B, viable], the policy's scores.
        costs: [B, viable], decoder FLOPs.
        dial: above 0 favors expensive budgets, below 0 cheap ones.

    Raises:
        ValueError: `dial` is not a number.
    """
    if math.isnan(dial):
        raise ValueError("dial=nan: expected a number")
    cost, other_cost = costs[:, :, None], costs[:, None, :]
    log_costs = torch.log(costs / costs.min(1, keepdim=True).values)
    deficit = scores[:, None, :] - scores[:, :, None]  # [B, i, j]: how far i's score is below j's
    cost_gap = (log_costs[:, :, None] - log_costs[:, None, :]).clamp_min(torch.finfo(log_costs.dtype).tiny)
    index = torch.arange(costs.shape[1], device=costs.device)
    beaten = (cost == other_cost) & ((deficit > 0) | ((deficit == 0) & (index[None, :] < index[:, None])))
    threshold = torch.where(cost > other_cost, deficit / cost_gap, torch.where(beaten, math.inf, -math.inf))
    exceeded = threshold.amax(2) < min(max(dial, -1e38), 1e38)
    return torch.where(exceeded, costs, -math.inf).argmax(1)


class VisorForConditionalGeneration(VisorPreTrainedModel, VisorGenerationMixin):
    """The model with its output head: `forward`, `generate`, and `route`."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: VisorConfig):
        super().__init__(config)
        self.model = VisorModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Returns the token embeddings [vocab, D]."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embeddings."""
        self.model.set_input_embeddings(value)

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling | tuple:
        """Calls `VisorModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Linear:
        """Returns the output head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the output head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
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
        inputs_embeds: Tensor | None = None,
        prompt_length: Tensor | None = None,
        cache: VisorCache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **loss_arguments,
    ) -> VisorCausalLMOutput | tuple:
        """Runs the model on a batch of prompts, or on the next tokens after those of a cache.

        Args:
            input_ids: int [B, S]; each picture is a run of placeholders, one per visual token.
            pixel_values, image_sizes, batch_num_images: see `VisorModel.get_image_features`.
            attention_mask: [B, S] or [B, past + S], 0 for padding, which may be on either side.
            labels: int [B, S], -100 for no target; "auto" is then decided from the tokens before the first target.
            budget: the slots that are on: "auto", "full", "empty", 3, "0b101", one boolean per slot, or a list (or a
                bool tensor [B, slots]) with one budget per sample. A filled cache keeps its budgets.
            dial: shifts "auto": above 0 toward more expensive budgets, below 0 toward cheaper ones.
            past_key_values, cache: two names of one argument, the cache of the tokens so far.
            use_cache: whether the output holds the cache; None: `config.use_cache`, but no with labels or in training.
            logits_to_keep: number of last columns to compute logits for, 0 for all; or the columns themselves.
            inputs_embeds: [B, S, D], embeddings in place of `input_ids`.
            prompt_length: int [B], number of tokens of each sample's prompt, from which "auto" is decided; None: all.
            output_hidden_states: see `VisorModelOutput`.
            loss_arguments: passed to transformers' loss function.

        Raises:
            ValueError: placeholders, pictures, tiles or budgets do not fit together, or attention weights are
                requested.
            TypeError: an argument is unknown, or the cache is not a `VisorCache`.
        """
        given = {name for name, value in loss_arguments.items() if value is not None and value is not False}
        if unknown := sorted(given - LOSS_ARGUMENTS):
            raise TypeError(f"forward: unexpected arguments {', '.join(unknown)}; slots are chosen by `budget`")
        if labels is not None and prompt_length is None:
            is_token = torch.ones_like(labels) if attention_mask is None else attention_mask
            prompt_length = (is_token * ((labels != -100).cumsum(1) == 0)).sum(1)
        if use_cache is None:
            fresh = given_cache(past_key_values, cache) is None
            use_cache = not fresh or (self.config.use_cache and not self.training and labels is None)
        body: Any = self.model(
            input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            batch_num_images=batch_num_images,
            inputs_embeds=inputs_embeds,
            budget=budget,
            dial=dial,
            prompt_length=prompt_length,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        kept_columns = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        logits = self.lm_head(body.last_hidden_state[:, kept_columns])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **loss_arguments)
        output = VisorCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=body.hidden_states,
            budgets=body.budgets,
            policy_logits=body.policy_logits,
            **{NAME: body.get(NAME)},
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()

    @torch.no_grad()
    def route(self, input_ids: Tensor, **inputs) -> Tensor:
        """Returns the policy's probabilities over the viable budgets, float32 [B, viable].

        Raises:
            ValueError: the model has no policy.
        """
        scores = self.model(input_ids, **{**inputs, "budget": "auto", "return_dict": True}).policy_logits
        if scores is None:
            raise ValueError("route: a dense plan has no policy")
        return scores.softmax(1)
