"""Qwen2's decoder layer in NumPy, written from the formulas, over the tokens of one sample."""

from __future__ import annotations

from typing import Any

import numpy as np

from visor_jax.architecture import TextArchitecture

Layer = dict[str, Any]


def norm(x: np.ndarray, scale: np.ndarray, arch: TextArchitecture) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + arch.rms_norm_eps) * scale


def heads(layer: Layer, name: str, x: np.ndarray, arch: TextArchitecture) -> np.ndarray:
    """[H, T, E], key and value heads repeated for each query head."""
    part = layer["self_attn"][name]
    y = (x @ part["kernel"] + part["bias"]).reshape(len(x), -1, arch.head_dim).transpose(1, 0, 2)
    return np.repeat(y, arch.num_heads // len(y), axis=0)


def turned(x: np.ndarray, positions: np.ndarray, arch: TextArchitecture) -> np.ndarray:
    half = arch.head_dim // 2
    angles = positions[:, None] * arch.rope_theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention_of(
    layer: Layer, x: np.ndarray, positions: np.ndarray, arch: TextArchitecture, seen: np.ndarray | bool = True
) -> np.ndarray:
    """The attention weights [H, T, T] of a layer for its input.

    Args:
      seen: which query (row) may read which key, besides the causal order of positions.
    """
    y = norm(x, layer["input_layernorm"]["scale"], arch)
    query, key = (turned(heads(layer, name, y, arch), positions, arch) for name in ("q_proj", "k_proj"))
    logits = query @ key.transpose(0, 2, 1) / np.sqrt(arch.head_dim)
    logits = np.where(seen & (positions[None] <= positions[:, None]), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def decoder_layer(
    layer: Layer, x: np.ndarray, positions: np.ndarray, arch: TextArchitecture, seen: np.ndarray | bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The layer's output and its attention weights; arguments as of `attention_of`."""
    weights = attention_of(layer, x, positions, arch, seen)
    value = heads(layer, "v_proj", norm(x, layer["input_layernorm"]["scale"], arch), arch)
    mixed = (weights @ value).transpose(1, 0, 2).reshape(len(x), -1)
    x = x + mixed @ layer["self_attn"]["o_proj"]["kernel"]
    y, mlp = norm(x, layer["post_attention_layernorm"]["scale"], arch), layer["mlp"]
    gate = y @ mlp["gate_proj"]["kernel"]
    return x + (gate / (1 + np.exp(-gate)) * (y @ mlp["up_proj"]["kernel"])) @ mlp["down_proj"]["kernel"], weights
