"""The decoder in PyTorch: Qwen2 layers, the cross-attention layers between them, and the policy.

In: visual tokens V [B, Nv, D], text tokens T [B, Nt, D], and their positions (`Layout`). Out: V and T after the last
layer. The kinds of the layers follow from the configuration's pattern: text-only (T = TL(T)), cross-attention
(T = TL(T + CrossAttn(T, V))) and optional self-attention ([V; T] = TL([V; T]) if the sample's budget has it on, else
text-only). In a "dense" plan every layer is a self-attention layer.
Every export contains this file; it needs torch and transformers only.
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
    """Rotary positions and mask of the queries of one stream.

    Attributes:
        cos, sin: [B, n, E], rotary cosine and sine.
        mask: bool [B, n, keys], the keys that each query attends to; None: all, or the causal ones.
        causal: each query attends to the keys up to its own; then `mask` is None.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    causal: bool

    def rows(self, rows: Tensor) -> View:
        """Returns the view of the samples `rows`, int64 [n]."""
        mask = None if self.mask is None else self.mask[rows]
        return View(self.cos[rows], self.sin[rows], mask, self.causal)


@dataclass
class State:
    """State of a forward pass between layers; `Decoder.run` updates `text` and `visual`."""

    text: Tensor
    visual: Tensor
    layout: Layout
    views: dict[str, View]  # of "text" and of "joint" layers
    cache: VisorCache
    hidden_states: list[Tensor] | None = None  # inputs [B, S, D] of the layers so far; None: not collected


class VisorRMSNorm(nn.Module):
    """RMS norm computed in float32, like `transformers.models.qwen2.Qwen2RMSNorm`."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` [..., D] normalized, in its dtype."""
        wide = widened(x)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        text = config.text_config
        self.head_dim = config.head_dim
        heads, kv = text.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj, self.k_proj = nn.Linear(text.hidden_size, heads), nn.Linear(text.hidden_size, kv)
        self.v_proj, self.o_proj = nn.Linear(text.hidden_size, kv), nn.Linear(heads, text.hidden_size, bias=False)

    def project(self, x: Tensor, view: View) -> tuple[Tensor, KeysValues]:
        """Returns the query [B, H, n, E] and the key and value [B, K, n, E] of `x` [B, n, D]."""
        query, key, value = (split_heads(p(x), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(query, view), (rotate(key, view), value)

    def attend(self, query: Tensor, keys_values: KeysValues, view: View) -> Tensor:
        """Returns the output [B, n, D] of attention over keys and values, which include those of earlier tokens."""
        return self.o_proj(attention(query, keys_values, view.mask, view.causal))


class TextMLP(nn.Module):
    """The gated MLP of a Qwen2 layer."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        size, hidden = config.text_config.hidden_size, config.text_config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(size, hidden, bias=False), nn.Linear(size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    """One pretrained Qwen2 layer, TL. It has no side effects, so gradient checkpointing may run it again."""

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
        """Runs the layer on `x` [rows, n, D]; returns its output and all keys and values so far.

        These are the past ones followed by those of `x`. With `peek` they are the past ones only: `x` attends to the
        past, and neither `x` nor a later token attends to `x`.
        """
        query, (key, value) = self.self_attn.project(self.input_layernorm(x), view)
        if past_key is not None and past_value is not None:
            key = past_key if peek else torch.cat([past_key, key], dim=2)
            value = past_value if peek else torch.cat([past_value, value], dim=2)
        x = x + self.self_attn.attend(query, (key, value), view)
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class CrossAttention(GradientCheckpointingLayer):
    """T + tanh(gate) * CrossAttn(T, V): every text token attends to every visual token of its sample.

    Attention has no rotary positions; V carries a conditional position, a depthwise convolution over the visual
    sequence that is added to it.
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
        """Returns keys and values of V [B, Nv, D]; its padding must be zero, because the convolution reads it."""
        if visual.shape[1]:  # torch rejects the convolution of an empty sequence
            visual = visual + self.conditional_position(visual.transpose(1, 2)).transpose(1, 2)
        visual = self.visual_norm(visual)
        return split_heads(self.k_proj(visual), self.head_dim), split_heads(self.v_proj(visual), self.head_dim)

    def forward(
        self, text: Tensor, visual: Tensor, valid: Tensor | None, key: Tensor | None = None, value: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns T with the attention's output added, and V's keys and values.

        Args:
            text: T [B, Nt, D].
            visual: V [B, Nv, D]; not used with `key` and `value`.
            valid: bool [B, Nv], False for padding of V; None: no padding.
            key, value: V's keys and values, if an earlier pass computed them.
        """
        if key is None or value is None:
            key, value = self.keys_values(visual)
        if key.shape[2] == 0:
            return text, key, value
        query = split_heads(self.q_proj(self.text_norm(text)), self.head_dim)
        if valid is None or bool(valid.all()):
            read = self.o_proj(attention(query, (key, value), None, False))
        else:
            has_picture = valid.any(1)  # other samples get 0 instead of the mean of their padding
            mask = (valid | ~has_picture[:, None])[:, None].expand(-1, text.shape[1], -1)
            read = self.o_proj(attention(query, (key, value), mask, False))
            read = torch.where(has_picture[:, None, None], read, 0)
        return text + torch.tanh(self.gate) * read, key, value


class Routing(nn.Module):
    """The routing token and the policy's MLP over the token's hidden state."""

    def __init__(self, config: VisorConfig):
        super().__init__()
        size, hidden = config.text_config.hidden_size, config.policy_hidden_size
        self.token = nn.Parameter(torch.zeros(size))
        self.norm = VisorRMSNorm(size, config.text_config.rms_norm_eps)
        self.fc1, self.fc2 = nn.Linear(size, hidden), nn.Linear(hidden, config.policy_max_budgets)

    def forward(self, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns scores float32 [B, max_budgets].

        Args:
            read: runs the token [D] through the layers before the first slot; returns its hidden states [B, D].
        """
        hidden = self.norm(read(self.token))
        return widened(self.fc2(functional.gelu(self.fc1(hidden), approximate="tanh")))


class Decoder(nn.Module):
    """All layers, the token embeddings and the final norm."""

    cross_attention: nn.ModuleList  # one per "cross" layer of a "visor" plan

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
        """Returns layer `index`."""
        return cast(DecoderLayer, self.layers[index])

    def cross(self, index: int) -> CrossAttention:
        """Returns the cross-attention that precedes layer `index`."""
        return cast(CrossAttention, self.cross_attention[self.crosses[index]])

    def begin(
        self, text: Tensor, visual: Tensor, layout: Layout, cache: VisorCache, hidden_states: bool = False
    ) -> State:
        """Appends new tokens' positions to the cache and returns the state of their forward pass.

        Args:
            text: T [B, Nt, D] of the new tokens.
            visual: V [B, Nv, D]; nonempty only with an empty cache.
            layout: positions of the new tokens.
            cache: keys and values of earlier tokens.
            hidden_states: collect the input of each layer.
        """
        cache.extend(layout)
        assert cache.order is not None and cache.text_order is not None
        reach = layout.reach if self.config.bidirectional_vision and layout.visual_index.shape[1] else None
        views = {
            "text": self.view(layout.text_order, cache.text_order, text.dtype),
            "joint": self.view(layout.order, cache.order, text.dtype, reach),
        }
        return State(text, visual, layout, views, cache, [] if hidden_states else None)

    def view(self, order: Tensor, keys: Tensor, dtype: torch.dtype, reach: Tensor | None = None) -> View:
        """Returns the view of queries at `order` [B, n], which attend to keys of at most that order (or `reach`).

        Args:
            order: int64 [B, n], of the queries.
            keys: int64 [B, m], order of the keys.
            dtype: of the rotary cosine and sine.
            reach: int64 [B, n], the last order that each query attends to; None: `order`.
        """
        cos, sin = rotary(order, self.config, dtype)
        new, total = order.shape[1], keys.shape[1]
        if reach is None and (new == 1 or new == total) and not bool((keys == PADDING).any()):
            return View(cos, sin, None, causal=new > 1)
        return View(cos, sin, keys[:, None] <= (order if reach is None else reach)[..., None], causal=False)

    def run(self, state: State, layers: range) -> None:
        """Runs some of the layers and updates `state`; layers with a slot require the cache's budgets."""
        dense, cache = self.config.plan == "dense", state.cache
        for index in layers:
            if state.hidden_states is not None:  # the layer reads the returned tensor, so that gradients reach it
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
        """Runs one layer for the samples `rows` (None: all), in which its kind is `part` ("text" or "joint")."""
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
        """Whether layers run again in the backward pass (gradient checkpointing); then the cache is not filled."""
        if not (self.training and torch.is_grad_enabled()):
            return False
        return any(self.layer(index).gradient_checkpointing for index in range(len(self.layers)))

    def keeps_layer(self, index: int) -> bool:
        """Returns whether layer `index` stores its keys and values in the cache.

        Layers before the first slot always do, because the routing token attends to them in the same pass.
        """
        return index < self.shared_layers.stop or not self.checkpoints

    def routing_hidden(self, token: Tensor, state: State, prompt_length: Tensor) -> Tensor:
        """Returns the routing token's hidden state [B, D] at the entry of the first slot.

        The layers before that slot must have run. The token follows its sample's prompt of `prompt_length` [B] tokens,
        and attends to the prompt.
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
    """Yields the kinds that a layer has in a batch, each with its samples (None: all).

    Args:
        on: whether the layer is a self-attention layer, one boolean or bool [B].
    """
    all_on = on if isinstance(on, bool) else bool(on.all())
    if all_on or isinstance(on, bool) or not bool(on.any()):
        yield ("joint" if all_on else "text"), None
    else:
        yield "joint", on.nonzero()[:, 0]
        yield "text", (~on).nonzero()[:, 0]


def widened(x: Tensor) -> Tensor:
    """Returns `x` in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Reshapes [B, n, heads * E] to [B, heads, n, E]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotary(order: Tensor, config: VisorConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine [B, n, E] of the rotary embedding at float32 angles, equal in both halves of a head.

    Frequencies are computed on the CPU, as in transformers: other devices round powers differently, and far positions
    multiply the difference.
    """
    size = config.head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies = (1.0 / (config.rotary_base**exponents)).to(order.device)
    angles = order.masked_fill(order == PADDING, 0).float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1).to(torch.promote_types(dtype, torch.float32))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, view: View) -> Tensor:
    """Applies the rotary position embedding to `x` [B, heads, n, E], in halves as in transformers' Qwen2."""
    first, second = x.chunk(2, dim=-1)
    return x * view.cos[:, None] + torch.cat([-second, first], dim=-1) * view.sin[:, None]


def attention(query: Tensor, keys_values: KeysValues, mask: Tensor | None, causal: bool) -> Tensor:
    """Returns attention [B, n, H * E] of query [B, H, n, E] over keys and values [B, K, m, E]; mask bool [B, n, m]."""
    groups = query.shape[1] // keys_values[0].shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in keys_values)
    mask = None if mask is None else mask[:, None]
    return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal).transpose(1, 2).flatten(2)
