"""A dense decoder in NumPy, float64, layer by layer, without the package's layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from tests.analysis.conftest import ARCH, Case
from tests.model.numpy_layer import decoder_layer, norm

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
        hidden, weights = decoder_layer(layer_of(case, index), sequence.hidden, sequence.positions, TEXT, seen)
        if index in dropped or index in frozen:
            hidden[:count] = sequence.hidden[:count]
        sequence = sequence._replace(hidden=hidden)
        visual.append(hidden[:count])
        all_weights.append(weights)
    table = case.params["lm_head"]["kernel"] if "lm_head" in case.params else case.params["embed_tokens"]["embedding"].T
    logits = norm(sequence.hidden[places], np.asarray(case.params["norm"]["scale"]), TEXT) @ np.asarray(
        table, np.float64
    )
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return Pass(np.stack(visual), np.stack(all_weights), log_probs)


def labels(case: Case, row: int) -> np.ndarray:
    """Returns the tokens of a sample's answer."""
    text = np.asarray(case.arrays["text_segments"][row]) > 0
    targets = np.asarray(case.arrays["loss_mask"][row])[text]
    tokens = np.asarray(case.arrays["text_tokens"][row])[text]
    return tokens[1:][targets[1:]]
