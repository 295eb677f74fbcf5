"""Runs the layers of a dense decoder on one batch, looks at each of them, and takes vision away from some.

In: parameters, visual tokens V(0), a batch of questions with their answers. Out: what observers see in every layer
(`observe`), and how the answers change if the text of some layers does not see the picture, or if some layers leave V
as it is (`ablate`). `Probe` runs both for one batch and keeps each pass, so that analyses share them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture
from visor_jax.model.decoder import layer_params
from visor_jax.model.layers import Params, rms_norm
from visor_jax.model.stream import TokenStream, with_order
from visor_jax.model.super_block import joint_layer
from visor_jax.model.visor import embed, head, stream_of


class Answers(NamedTuple):
    """The next-token predictions that make the answers, A per row at most.

    Attributes:
      places: of the token that predicts, in its row.
      labels: the predicted token.
      valid: False: padding.
    """

    places: Int[Array | np.ndarray, "B A"]
    labels: Int[Array | np.ndarray, "B A"]
    valid: Bool[Array | np.ndarray, "B A"]


class LayerView(NamedTuple):
    """One layer of the unchanged model while it runs on a batch.

    Attributes:
      params: of the layer.
      visual, text: V and T before it.
      changed: V after it.
      first: V(0).
      kept: False: padding of V.
    """

    params: Params
    visual: Float[Array, "B Nv D"]
    text: Float[Array, "B Nt D"]
    changed: Float[Array, "B Nv D"]
    first: Float[Array, "B Nv D"]
    kept: Bool[Array, "B Nv"]
    stream: TokenStream
    answers: Answers
    arch: Architecture


Observer = Callable[[LayerView], Float[Array, " B"]]
Observers = tuple[tuple[str, Observer], ...]


class Effect(NamedTuple):
    """How a changed model answers, compared with the unchanged one.

    Attributes:
      right: the greedy answer is the reference.
      log_likelihood: of the reference, mean over its tokens.
      divergence: KL(changed || unchanged) in nats, mean over the answer's predictions.
      first_divergence: the same of the answer's first prediction, which the last token of the prompt makes.
    """

    right: Bool[Array | np.ndarray, " B"]
    log_likelihood: Float[Array | np.ndarray, " B"]
    divergence: Float[Array | np.ndarray, " B"]
    first_divergence: Float[Array | np.ndarray, " B"]


def answers_of(arrays: Mapping[str, np.ndarray]) -> Answers:
    """Returns the predictions of a batch with one sample of one turn per row; A is a power of two."""
    segments, targets = arrays["text_segments"], arrays["loss_mask"][:, 1:]
    targets = targets & (segments[:, 1:] == segments[:, :-1])
    counts = targets.sum(axis=1)
    width = 1 << max(int(counts.max(initial=1)) - 1, 0).bit_length()
    places = np.argsort(~targets, axis=1, kind="stable")[:, :width]  # the targets first, in order
    places = np.pad(places, ((0, 0), (0, width - places.shape[1])))
    labels = np.take_along_axis(arrays["text_tokens"], places + 1, axis=1)
    return Answers(places.astype(np.int32), labels.astype(np.int32), np.arange(width) < counts[:, None])


class Probe:
    """One batch, its unchanged pass, and the passes of changed models, each of which runs once.

    Attributes:
      num_layers: of the decoder.
      observed: name of an observer -> what it saw [L, B].
    """

    def __init__(
        self,
        params: Params,
        visual: Float[Array, "B Nv D"],
        batch: Mapping[str, Array],
        answers: Answers,
        arch: Architecture,
        observers: Mapping[str, Observer],
    ) -> None:
        """Runs the unchanged pass."""
        observing, self._ablating = programs(arch, tuple(observers.items()))
        self._inputs = params, visual, batch, answers
        self._unchanged, observed = observing(*self._inputs)
        self.observed = {name: np.asarray(values) for name, values in observed.items()}
        self.num_layers = len(arch.layers)
        self._effects: dict[tuple[frozenset[int], frozenset[int]], Effect] = {}

    def effect(self, dropped: Collection[int] = (), frozen: Collection[int] = ()) -> Effect:
        """Returns how the model answers if the text of the layers `dropped` sees no picture and `frozen` keep V."""
        key = frozenset(dropped), frozenset(frozen)
        if key not in self._effects:
            masks = (np.isin(np.arange(self.num_layers), [*layers]) for layers in key)
            self._effects[key] = jax.tree.map(np.asarray, self._ablating(*self._inputs, self._unchanged, *masks))
        return self._effects[key]


@lru_cache(maxsize=8)
def programs(arch: Architecture, observers: Observers = ()) -> tuple[Callable, Callable[..., Effect]]:
    """Returns the compiled `observe` and `ablate` of a dense architecture."""
    return jax.jit(partial(observe, arch=arch, observers=observers)), jax.jit(partial(ablate, arch=arch))


def observe(
    params: Params,
    visual: Float[Array, "B Nv D"],
    batch: Mapping[str, Array],
    answers: Answers,
    *,
    arch: Architecture,
    observers: Observers = (),
) -> tuple[Float[Array, "B A vocab"], dict[str, Float[Array, "L B"]]]:
    """Runs all layers of a dense plan; returns log-probabilities of the answers' predictions, and what was seen."""
    stream, text, first = with_order(stream_of(batch)), embed(params, batch["text_tokens"]), visual
    kept, observed = stream.visual_segments > 0, {name: [] for name, _ in observers}
    for place in arch.layers:
        layer, before = layer_params(params, place), text
        changed, text, _ = joint_layer(layer, visual, before, stream, arch)
        view = LayerView(layer, visual, before, changed, first, kept, stream, answers, arch)
        for name, observer in observers:
            observed[name].append(observer(view))
        visual = changed
    log_probs = answer_log_probs(params, text, answers, arch)
    return log_probs, {name: jnp.stack(values) for name, values in observed.items()}


def ablate(
    params: Params,
    visual: Float[Array, "B Nv D"],
    batch: Mapping[str, Array],
    answers: Answers,
    unchanged: Float[Array, "B A vocab"],
    dropped: Bool[Array | np.ndarray, " L"],
    frozen: Bool[Array | np.ndarray, " L"],
    *,
    arch: Architecture,
) -> Effect:
    """Runs all layers of a dense plan, some of them without vision, and compares the answers.

    Args:
      unchanged: log-probabilities that `observe` returned.
      dropped: layers whose text sees text alone; they leave V as it is.
      frozen: layers whose text sees V, but which leave V as it is.
    """
    stream, text = with_order(stream_of(batch)), embed(params, batch["text_tokens"])
    for index, place in enumerate(arch.layers):
        active = jnp.broadcast_to(~dropped[index], visual.shape[:1])
        changed, text, _ = joint_layer(layer_params(params, place), visual, text, stream, arch, active)
        visual = jnp.where(frozen[index], visual, changed)
    log_probs = answer_log_probs(params, text, answers, arch)
    reference = jnp.take_along_axis(log_probs, answers.labels[..., None], axis=2)[..., 0]
    right = jnp.all((jnp.argmax(log_probs, axis=2) == answers.labels) | ~answers.valid, axis=1)
    divergences = jnp.sum(jnp.exp(log_probs) * (log_probs - unchanged), axis=2)
    first = jnp.where(answers.valid[:, 0], divergences[:, 0], 0)
    return Effect(right, mean_where(reference, answers.valid), mean_where(divergences, answers.valid), first)


def answer_log_probs(
    params: Params, text: Float[Array, "B Nt D"], answers: Answers, arch: Architecture
) -> Float[Array, "B A vocab"]:
    """Returns log-probabilities of the answers' predictions, for T after the last layer."""
    hidden = jnp.take_along_axis(text, answers.places[..., None], axis=1)
    logits = rms_norm(params["norm"], hidden, arch.text.rms_norm_eps) @ head(params)
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def mean_where(values: Float[Array, "B A"], valid: Bool[Array | np.ndarray, "B A"]) -> Float[Array, " B"]:
    """Returns the mean over the valid entries of each row."""
    return jnp.sum(jnp.where(valid, values, 0), axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1)
