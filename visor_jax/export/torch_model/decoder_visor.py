"""The decoder in PyTorch: Qwen2 layers, the cross-attention layers between them, and the policy.

In: visual tokens V [B, Nv, D], text tokens T [B, Nt, D], and where they stand (`Layout`). Out: V and T after the last
layer. In a "visor" plan every three layers are a super-block: text-only (T = TL(T)), cross-attention
(T = TL(T + CrossAttn(T, V))) and optional self-attention ([V; T] = TL([V; T]) where the sample's budget has it on, else
text-only); layers left over are text-only. In a "dense" plan every layer is a self-attention layer.
This file travels inside every export; it needs torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_visor import PADDING, KeysValues, Layout, VisorCache
from .configuration_visor import VisorConfig


class View(NamedTuple):
    """What the queries of one stream see: rotary cosine and sine [B, n, E], mask bool [B, n, keys] (None: all keys)."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    causal: bool  # each query sees the keys up to its own, in order; then there is no mask

    def rows(self, rows: Tensor) -> View:
        mask = None if self.mask is None else self.mask[rows]
        return View(self.cos[rows], self.sin[rows], mask, self.causal)


@dataclass
class State:
    """A batch on its way through the decoder; `run` changes `text` and `visual`."""

    text: Tensor
    visual: Tensor
    layout: Layout
    views: dict[str, View]  # of "text" and of "joint" layers
    cache: VisorCache
    hidden_states: list[Tensor] | None = None  # [B, S, D] at the entry of each layer, where they are asked for


class VisorRMSNorm(nn.Module):
    """Normalised in float32, as `transformers.models.qwen2.Qwen2RMSNorm`."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions; keys and values of earlier tokens come from the cache."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        text = config.text_config
        self.head_dim = config.head_dim
        heads, kv = text.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj, self.k_proj = nn.Linear(text.hidden_size, heads), nn.Linear(text.hidden_size, kv)
        self.v_proj, self.o_proj = nn.Linear(text.hidden_size, kv), nn.Linear(heads, text.hidden_size, bias=False)

    def project(self, x: Tensor, view: View) -> tuple[Tensor, KeysValues]:
        query, key, value = (split_heads(p(x), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(query, view), (rotate(key, view), value)

    def attend(self, query: Tensor, keys_values: KeysValues, view: View) -> Tensor:
        return self.o_proj(attention(query, keys_values, view.mask, view.causal))


class TextMLP(nn.Module):
    def __init__(self, config: VisorConfig):
        super().__init__()
        size, hidden = config.text_config.hidden_size, config.text_config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(size, hidden, bias=False), nn.Linear(size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    """One pretrained Qwen2 layer, TL. It changes nothing but its output, so it may run again in the backward pass."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        size, eps = config.text_config.hidden_size, config.text_config.rms_norm_eps
        self.self_attn, self.mlp = SelfAttention(config), TextMLP(config)
        self.input_layernorm, self.post_attention_layernorm = VisorRMSNorm(size, eps), VisorRMSNorm(size, eps)

    def forward(
        self,
        x: Tensor,
        view: View,
        past_key: Tensor | None = None,
        past_value: Tensor | None = None,
        peek: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [rows, n, D] through the layer, and all its keys and values so far: the past ones, then those of `x`.

        With `peek` there are the past ones alone: nobody sees `x`, itself included.
        """
        query, (key, value) = self.self_attn.project(self.input_layernorm(x), view)
        if past_key is not None and past_value is not None:
            key = past_key if peek else torch.cat([past_key, key], dim=2)
            value = past_value if peek else torch.cat([past_value, value], dim=2)
        x = x + self.self_attn.attend(query, (key, value), view)
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class CrossAttention(GradientCheckpointingLayer):
    """T + tanh(gate) * CrossAttn(T, V): every text token reads every visual token of its sample, without positions.

    V first gets its conditional position: a depthwise convolution over the visual sequence, added to it.
    """

    def __init__(self, config: VisorConfig):
        super().__init__()
        text, taps = config.text_config, config.cross_kernel_size
        size, eps = text.hidden_size, text.rms_norm_eps
        self.head_dim = config.head_dim
        heads, kv = text.num_attention_heads * self.head_dim, config.cross_num_key_value_heads * self.head_dim
        self.text_norm, self.visual_norm = VisorRMSNorm(size, eps), VisorRMSNorm(size, eps)
        self.q_proj, self.k_proj = nn.Linear(size, heads), nn.Linear(size, kv)
        self.v_proj, self.o_proj = nn.Linear(size, kv), nn.Linear(heads, size, bias=False)
        self.gate = nn.Parameter(torch.ones(()))
        self.conditional_position = nn.Conv1d(size, size, taps, padding=taps // 2, groups=size, bias=False)

    def keys_values(self, visual: Tensor) -> KeysValues:
        """Keys and values of V [B, Nv, D]; its padding must be zero, so that no tap reads anything there."""
        if visual.shape[1]:  # torch convolves nothing empty
            visual = visual + self.conditional_position(visual.transpose(1, 2)).transpose(1, 2)
        visual = self.visual_norm(visual)
        return split_heads(self.k_proj(visual), self.head_dim), split_heads(self.v_proj(visual), self.head_dim)

    def forward(
        self, text: Tensor, visual: Tensor, valid: Tensor | None, key: Tensor | None = None, value: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """T after reading V, and V's keys and values, which an earlier pass may have made already.

        `valid` bool [B, Nv] says which of V are not padding; None: all of them.
        """
        if key is None or value is None:
            key, value = self.keys_values(visual)
        if key.shape[2] == 0:
            return text, key, value
        query = split_heads(self.q_proj(self.text_norm(text)), self.head_dim)
        if valid is None or bool(valid.all()):
            read = self.o_proj(attention(query, (key, value), None, False))
        else:
            some = valid.any(1)  # a sample without any picture reads nothing, not the mean of its padding
            mask = (valid | ~some[:, None])[:, None].expand(-1, text.shape[1], -1)
            read = self.o_proj(attention(query, (key, value), mask, False))
            read = torch.where(some[:, None, None], read, 0)
        return text + torch.tanh(self.gate) * read, key, value


class Routing(nn.Module):
    """The routing token and the policy's MLP over its hidden state [B, D]: scores float32 [B, max_budgets]."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        size, hidden = config.text_config.hidden_size, config.policy_hidden_size
        self.token = nn.Parameter(torch.zeros(size))
        self.norm = VisorRMSNorm(size, config.text_config.rms_norm_eps)
        self.fc1, self.fc2 = nn.Linear(size, hidden), nn.Linear(hidden, config.policy_max_budgets)

    def forward(self, read: Callable[[Tensor], Tensor]) -> Tensor:
        """`read` takes the token [D] through the first layers: its hidden states [B, D]."""
        hidden = self.norm(read(self.token))
        return widened(self.fc2(functional.gelu(self.fc1(hidden), approximate="tanh")))


class Decoder(nn.Module):
    """All layers, the token embeddings and the final norm."""

    cross_attention: nn.ModuleList  # one for each "cross" layer of a "visor" plan

    def __init__(self, config: VisorConfig):
        super().__init__()
        text = config.text_config
        self.config, self.slots, self.crosses = config, config.slots, config.crosses
        self.shared_layers = config.shared_layers
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(text.num_hidden_layers))
        self.norm = VisorRMSNorm(text.hidden_size, text.rms_norm_eps)
        if config.plan == "visor":
            self.cross_attention = nn.ModuleList(CrossAttention(config) for _ in config.crosses)

    def layer(self, index: int) -> DecoderLayer:
        return cast(DecoderLayer, self.layers[index])

    def cross(self, index: int) -> CrossAttention:
        """The cross-attention of layer `index`."""
        return cast(CrossAttention, self.cross_attention[self.crosses[index]])

    def begin(
        self, text: Tensor, visual: Tensor, layout: Layout, cache: VisorCache, hidden_states: bool = False
    ) -> State:
        """New tokens behind those of the cache. Visual tokens can only come first, into an empty cache."""
        cache.extend(layout)
        assert cache.order is not None and cache.text_order is not None
        reach = layout.reach if self.config.bidirectional_vision and layout.visual_index.shape[1] else None
        views = {
            "text": self.view(layout.text_order, cache.text_order, text.dtype),
            "joint": self.view(layout.order, cache.order, text.dtype, reach),
        }
        return State(text, visual, layout, views, cache, [] if hidden_states else None)

    def view(self, order: Tensor, keys: Tensor, dtype: torch.dtype, reach: Tensor | None = None) -> View:
        """Queries at `order` [B, n] that see the keys whose order [B, m] is at most theirs (or their `reach`)."""
        cos, sin = rotary(order, self.config, dtype)
        new, total = order.shape[1], keys.shape[1]
        if reach is None and (new == 1 or new == total) and not bool((keys == PADDING).any()):
            return View(cos, sin, None, causal=new > 1)
        return View(cos, sin, keys[:, None] <= (order if reach is None else reach)[..., None], causal=False)

    def run(self, state: State, layers: range) -> None:
        """Take the batch through some of the layers; those with a slot need the cache's budgets to be decided."""
        dense, cache = self.config.plan == "dense", state.cache
        for index in layers:
            if state.hidden_states is not None:  # what is handed out is what the layer reads, for gradients' sake
                state.hidden_states.append(state.layout.merge(state.visual, state.text))
                state.visual, state.text = state.layout.split(state.hidden_states[-1])
            if index in self.crosses:
                number = self.crosses[index]
                past = cache.visual.get(number, ())
                state.text, *pair = self.cross(index)(state.text, state.visual, cache.visual_valid, *past)
                if self.keeps_layer(index):
                    cache.visual[number] = pair[0], pair[1]
            slot = self.slots.get(index)
            on = dense if slot is None or cache.budgets is None else cache.budgets[:, slot]
            for part, rows in parts_of(on):
                self.run_part(state, index, part, rows)

    def run_part(self, state: State, index: int, part: str, rows: Tensor | None) -> None:
        """One layer for the samples `rows` (None: all) in which it is of kind `part`."""
        layer, cache = self.layer(index), state.cache
        text, visual, layout, view = state.text, state.visual, state.layout, state.views[part]
        if rows is not None:
            text, visual, layout, view = text[rows], visual[rows], layout.rows(rows), view.rows(rows)
        past = cache.parts.get((index, part), ())
        if part == "text":
            text, *pair = layer(text, view, *past)
        else:
            both, *pair = layer(layout.merge(visual, text), view, *past)
            visual, text = layout.split(both)
        if self.keeps_layer(index):
            cache.parts[index, part] = pair[0], pair[1]
        if rows is not None:
            text, visual = state.text.index_copy(0, rows, text), state.visual.index_copy(0, rows, visual)
        state.text, state.visual = text, visual

    @property
    def checkpoints(self) -> bool:
        """Layers run again in the backward pass, so what they compute is not kept for later tokens."""
        if not (self.training and torch.is_grad_enabled()):
            return False
        return any(self.layer(index).gradient_checkpointing for index in range(len(self.layers)))

    def keeps_layer(self, index: int) -> bool:
        """Its keys and values stay in the cache; the routing token needs those before the first slot at once."""
        return index < self.shared_layers.stop or not self.checkpoints

    def routing_hidden(self, token: Tensor, state: State, prompt_length: Tensor) -> Tensor:
        """The routing token's hidden state [B, D] at the entry of the first slot, after the layers before it have run.

        It stands right behind its sample's prompt of `prompt_length` [B] tokens, and sees those.
        """
        cache, order = state.cache, prompt_length[:, None]
        assert cache.text_order is not None
        cos, sin = rotary(order, self.config, state.text.dtype)
        view = View(cos, sin, (cache.text_order < order)[:, None], causal=False)
        hidden = token.to(state.text.dtype).expand(len(order), 1, -1)
        for index in self.shared_layers:
            if index in self.crosses:
                past = cache.visual[self.crosses[index]]
                hidden, *_ = self.cross(index)(hidden, state.visual, cache.visual_valid, *past)
            hidden, *_ = self.layer(index)(hidden, view, *cache.parts[index, "text"], True)
        return hidden[:, 0]


def parts_of(on: Tensor | bool) -> Iterator[tuple[str, Tensor | None]]:
    """A layer's kinds and the samples of each (None: all), for one boolean, or one for each sample [B]."""
    every = on if isinstance(on, bool) else bool(on.all())
    if every or isinstance(on, bool) or not bool(on.any()):
        yield ("joint" if every else "text"), None
    else:
        yield "joint", on.nonzero()[:, 0]
        yield "text", (~on).nonzero()[:, 0]


def widened(x: Tensor) -> Tensor:
    """In float32, or in float64 where `x` is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, n, heads * E] to [B, heads, n, E]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotary(order: Tensor, config: VisorConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, n, E] of the rotary embedding at float32 angles; both halves of the head alike.

    Frequencies come from the CPU, as in transformers: powers round otherwise elsewhere, which far positions multiply.
    """
    size = config.head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies = (1.0 / (config.rotary_base**exponents)).to(order.device)
    angles = order.masked_fill(order == PADDING, 0).float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1).to(torch.promote_types(dtype, torch.float32))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, view: View) -> Tensor:
    """Applies rotary position embedding to `x`, in halves as in transformers' Qwen2."""
    first, second = x.chunk(2, dim=-1)
    return x * view.cos[:, None] + torch.cat([-second, first], dim=-1) * view.sin[:, None]


def attention(query: Tensor, keys_values: KeysValues, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention of query [B, H, n, E] over keys and values [B, K, m, E], as [B, n, H * E]; mask bool [B, n, m]."""
    groups = query.shape[1] // keys_values[0].shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in keys_values)
    mask = None if mask is None else mask[:, None]
    return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal).transpose(1, 2).flatten(2)
