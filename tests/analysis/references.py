"""A dense decoder in NumPy, float64, layer by layer; written from the formulas, without the package's layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from tests.analysis.conftest import ARCH, Case

TEXT = ARCH.text


class Sequence(NamedTuple):
    """One sample: hidden states of its tokens [N, D], visual ones first, and their positions."""

    hidden: np.ndarray
    positions: np.ndarray
    num_visual: int


def sequence_of(case: Case, row: int) -> tuple[Sequence, list[int]]:
    """Returns the tokens of a sample, without padding, and the places of those that predict its answer."""
    arrays = {name: np.asarray(x[row]) for name, x in case.arrays.items()}
    visual, text = arrays["visual_segments"] > 0, arrays["text_segments"] > 0
    embedded = np.asarray(case.params["embed_tokens"]["embedding"], np.float64)[arrays["text_tokens"][text]]
    hidden = np.concatenate([np.asarray(case.visual[row], np.float64)[visual], embedded])
    positions = np.concatenate([arrays["visual_positions"][visual], arrays["text_positions"][text]])
    asked = np.flatnonzero(arrays["loss_mask"][text][1:]).tolist()
    return Sequence(hidden, positions, int(visual.sum())), [int(visual.sum()) + place for place in asked]


def layer_of(case: Case, index: int) -> Any:
    """Returns the parameters of a layer."""
    place = ARCH.layers[index]
    stack, *path = place.path.split("/")
    params = case.params[stack]
    for name in path:
        params = params[name]
    return jax.tree.map(lambda x: np.asarray(x[place.index], np.float64), params)


def norm(x: np.ndarray, scale: Any) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + TEXT.rms_norm_eps) * np.asarray(scale, np.float64)


def rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    angles = positions[:, None, None] / TEXT.rope_theta ** (np.arange(0, TEXT.head_dim, 2) / TEXT.head_dim)
    real, imaginary = np.split(x, 2, axis=-1)
    pairs = (real + 1j * imaginary) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def layer(params: Any, sequence: Sequence, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs one Qwen2 layer; returns hidden states [N, D] and attention weights [heads, N, N].

    Args:
      seen: which query (row) may read which key, besides the causal order.
    """
    x = norm(sequence.hidden, params["input_layernorm"]["scale"])
    heads = {
        name: (x @ params["self_attn"][name]["kernel"] + params["self_attn"][name]["bias"]).reshape(
            len(x), -1, TEXT.head_dim
        )
        for name in ("q_proj", "k_proj", "v_proj")
    }
    query, key = rotated(heads["q_proj"], sequence.positions), rotated(heads["k_proj"], sequence.positions)
    groups = TEXT.num_heads // TEXT.num_kv_heads
    key, value = np.repeat(key, groups, axis=1), np.repeat(heads["v_proj"], groups, axis=1)
    logits = np.einsum("qhe,khe->hqk", query, key) / np.sqrt(TEXT.head_dim)
    mask = seen & (sequence.positions[None] <= sequence.positions[:, None])
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    read = np.einsum("hqk,khe->qhe", weights, value).reshape(len(x), -1)
    hidden = sequence.hidden + read @ params["self_attn"]["o_proj"]["kernel"]
    y, mlp = norm(hidden, params["post_attention_layernorm"]["scale"]), params["mlp"]
    gate = y @ mlp["gate_proj"]["kernel"]
    return hidden + (gate / (1 + np.exp(-gate)) * (y @ mlp["up_proj"]["kernel"])) @ mlp["down_proj"]["kernel"], weights


class Pass(NamedTuple):
    """A whole pass of one sample.

    Attributes:
      visual: V before each layer and after the last [L + 1, Nv, D].
      weights: attention [L, heads, N, N].
      log_probs: of the answer's predictions [A, vocab].
    """

    visual: np.ndarray
    weights: np.ndarray
    log_probs: np.ndarray


def run(case: Case, row: int, *, dropped: tuple[int, ...] = (), frozen: tuple[int, ...] = ()) -> Pass:
    """Runs all layers: the text of layers `dropped` sees text alone, and both kinds of layer leave V as it is."""
    sequence, places = sequence_of(case, row)
    count, number = sequence.num_visual, len(sequence.hidden)
    is_text = np.arange(number) >= count
    visual, all_weights = [sequence.hidden[:count]], []
    for index in range(TEXT.num_layers):
        seen = np.ones((number, number), bool)
        if index in dropped:
            seen = ~(is_text[:, None] & ~is_text[None])
        hidden, weights = layer(layer_of(case, index), sequence, seen)
        if index in dropped or index in frozen:
            hidden[:count] = sequence.hidden[:count]
        sequence = sequence._replace(hidden=hidden)
        visual.append(hidden[:count])
        all_weights.append(weights)
    table = case.params["lm_head"]["kernel"] if "lm_head" in case.params else case.params["embed_tokens"]["embedding"].T
    logits = norm(sequence.hidden[places], case.params["norm"]["scale"]) @ np.asarray(table, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return Pass(np.stack(visual), np.stack(all_weights), log_probs)


def labels(case: Case, row: int) -> np.ndarray:
    """Returns the tokens of a sample's answer."""
    text = np.asarray(case.arrays["text_segments"][row]) > 0
    targets = np.asarray(case.arrays["loss_mask"][row])[text]
    tokens = np.asarray(case.arrays["text_tokens"][row])[text]
    return tokens[1:][targets[1:]]
