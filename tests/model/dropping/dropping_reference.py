"""Decoders that drop visual tokens, in NumPy, one interleaved sequence at a time, as the authors' code runs them.

Written from pkunlp-icler/FastV d165972 (its model of Llama, in place) and its paper's section 4, from
Cooperx521/PyramidDrop 6444f30, and from Gumpest/SparseVLMs 26a5f48 (version 1_0, without the noise that it adds to
densities), with Qwen2's layers in place of Llama's. Sequences hold one picture: text, visual tokens `start` to
`start + count`, text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.model.numpy_layer import Layer, attention_of, decoder_layer
from visor_jax.architecture import TextArchitecture


def top(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def fastv(
    layers: Sequence[Layer],
    x: np.ndarray,
    start: int,
    count: int,
    prompt: int,
    arch: TextArchitecture,
    *,
    after: int,
    ratio: float,
    paper: bool,
) -> np.ndarray:
    """The states after the last layer; `prompt` tokens precede the answer."""
    positions, weights = np.arange(len(x)), None
    for index, layer in enumerate(layers):
        if index == after:
            mean = weights.mean(0)
            rated = mean[:prompt].mean(0) if paper else mean[prompt - 1]
            best = top(rated[start : start + count], int(count * ratio)) + start
            keep = np.concatenate([np.arange(start), best, np.arange(start + count, len(x))])
            x, positions = x[keep], keep
        x, weights = decoder_layer(layer, x, positions, arch)
    return x


def pyramiddrop(
    layers: Sequence[Layer],
    x: np.ndarray,
    start: int,
    count: int,
    asked: Callable[[int], np.ndarray],
    arch: TextArchitecture,
    *,
    after: Sequence[int],
    ratios: Sequence[float],
) -> np.ndarray:
    """The states after the last layer; `asked(n)` are the last tokens of instructions while n visual tokens remain."""
    total = count
    for index, layer in enumerate(layers):
        if index in after:
            positions = np.arange(len(x))
            weights = attention_of(layer, x, positions, arch)[:, asked(count)].mean(0)
            rated = weights[:, start : start + count].mean(0)
            best = top(rated, int(total * ratios[list(after).index(index)])) + start
            x = np.concatenate([x[:start], x[best], x[start + count :]])
            count = len(best)
        x, _ = decoder_layer(layer, x, np.arange(len(x)), arch)
    return x


def sparsevlm(
    layers: Sequence[Layer],
    x: np.ndarray,
    start: int,
    count: int,
    prompt: int,
    arch: TextArchitecture,
    *,
    after: Sequence[int],
    ratios: Sequence[float],
) -> tuple[np.ndarray, int]:
    """The states after the last layer, and how many visual tokens remain; `prompt` tokens precede the answer."""
    total, behind, asked = count, start + count, prompt - start - count
    logits = x[start:behind] @ x[behind:prompt].T
    shares = np.exp(logits - logits.max(1, keepdims=True))
    relevance = (shares / shares.sum(1, keepdims=True)).mean(0)
    raters = np.flatnonzero(relevance > relevance.mean())
    assert 0 < len(raters) < asked
    for index, layer in enumerate(layers):
        x, weights = decoder_layer(layer, x, np.arange(len(x)), arch)
        if index + 1 not in after:
            continue
        behind = start + count
        rated = weights.mean(0)[behind + raters, start:behind].mean(0)
        kept = top(rated, min(int(total * ratios[list(after).index(index + 1)]), count - 1))
        dropped = np.setdiff1d(np.arange(count), kept)
        best = dropped[np.argsort(-rated[dropped], kind="stable")[: int(len(dropped) * 0.3) + 1]]
        merged = clustered(x[start + best], int(len(best) / 10) + 1)
        x = np.concatenate([x[:start], x[start + kept], merged, x[behind:]])
        count = len(kept) + len(merged)
    return x, count


def clustered(x: np.ndarray, count: int) -> np.ndarray:
    """Density peaks of k nearest neighbors: the means of `count` clusters."""
    distance = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)) / np.sqrt(x.shape[1])
    density = np.exp(-(np.sort(distance, axis=1)[:, :count] ** 2).mean(1))
    to_denser = [min([*distance[i][density > density[i]], distance.max()]) for i in range(len(x))]
    centers = np.argsort(-(np.array(to_denser) * density), kind="stable")[:count]
    group = distance[centers].argmin(0)
    group[centers] = np.arange(count)
    return np.stack([x[group == i].sum(0) / ((group == i).sum() + 1e-6) for i in range(count)])
