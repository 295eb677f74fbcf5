"""Observes the layers of a dense decoder on one batch: attention to the picture, change of V, effect of every layer.

In: parameters, visual tokens V(0), a batch of questions with their answers. Out: per layer and sample

* the share of the answer's attention that visual tokens get (VISOR paper, figure 2; FastV's observation);
* linear CKA of V before and after (figure 3; Kornblith et al., 2019);
* how the answer changes if a layer's text does not see the picture (vision drop, figure 4), or if a layer leaves V
  as it is (ShortV's layer contribution, arXiv 2504.00502).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture
from visor_jax.model.decoder import layer_params
from visor_jax.model.decoders.qwen2 import project_qkv, rotary
from visor_jax.model.layers import Params, rms_norm
from visor_jax.model.stream import TokenStream, with_order
from visor_jax.model.super_block import joint_layer, joint_mask
from visor_jax.model.visor import embed, head, stream_of

MASKED = -1e30


class Answers(NamedTuple):
    """The next-token predictions that make the answers, A per row at most.

    Attributes:
      places: of the token that predicts, in its row.
      labels: the predicted token.
      valid: False: padding.
    """

    places: Int[Array, "B A"]
    labels: Int[Array, "B A"]
    valid: Bool[Array, "B A"]


class Observed(NamedTuple):
    """What one pass has shown.

    Attributes:
      log_probs: of the answers' predictions, over the vocabulary.
      attention_share: of visual tokens, mean over heads and over the answer's predictions.
      cka_before: of V after a layer with V before it.
      cka_first: of V after a layer with V(0).
    """

    log_probs: Float[Array, "B A vocab"]
    attention_share: Float[Array, "L B"]
    cka_before: Float[Array, "L B"]
    cka_first: Float[Array, "L B"]


class Effect(NamedTuple):
    """How answers differ from those of the unchanged model.

    Attributes:
      right: the greedy answer is the reference.
      log_likelihood: of the reference, mean over its tokens.
      divergence: KL(unchanged || changed) in nats, mean over the answer's predictions.
    """

    right: Bool[Array, " B"]
    log_likelihood: Float[Array, " B"]
    divergence: Float[Array, " B"]


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


@lru_cache(maxsize=4)
def programs(arch: Architecture) -> tuple[Callable[..., Observed], Callable[..., Effect]]:
    """Returns the compiled `observe` and `ablate` of a dense architecture."""
    return jax.jit(partial(observe, arch=arch)), jax.jit(partial(ablate, arch=arch))


def observe(
    params: Params,
    visual: Float[Array, "B Nv D"],
    batch: Mapping[str, Array],
    answers: Answers,
    *,
    arch: Architecture,
) -> Observed:
    """Runs all layers of a dense plan and observes each."""
    stream, text, first = with_order(stream_of(batch)), embed(params, batch["text_tokens"]), visual
    kept = stream.visual_segments > 0
    shares, before, since = [], [], []
    for place in arch.layers:
        layer = layer_params(params, place)
        shares.append(attention_share(layer, visual, text, stream, answers, arch))
        changed, text, _ = joint_layer(layer, visual, text, stream, arch)
        before.append(linear_cka(visual, changed, kept))
        since.append(linear_cka(first, changed, kept))
        visual = changed
    log_probs = answer_log_probs(params, text, answers, arch)
    return Observed(log_probs, jnp.stack(shares), jnp.stack(before), jnp.stack(since))


def ablate(
    params: Params,
    visual: Float[Array, "B Nv D"],
    batch: Mapping[str, Array],
    answers: Answers,
    unchanged: Float[Array, "B A vocab"],
    dropped: Bool[Array, " L"],
    frozen: Bool[Array, " L"],
    *,
    arch: Architecture,
) -> Effect:
    """Runs all layers of a dense plan, some of them without vision, and compares the answers.

    Args:
      unchanged: `Observed.log_probs`.
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
    divergences = jnp.sum(jnp.exp(unchanged) * (unchanged - log_probs), axis=2)
    return Effect(right, mean_where(reference, answers.valid), mean_where(divergences, answers.valid))


def answer_log_probs(
    params: Params, text: Float[Array, "B Nt D"], answers: Answers, arch: Architecture
) -> Float[Array, "B A vocab"]:
    """Returns log-probabilities of the answers' predictions, for T after the last layer."""
    hidden = jnp.take_along_axis(text, answers.places[..., None], axis=1)
    logits = rms_norm(params["norm"], hidden, arch.text.rms_norm_eps) @ head(params)
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def attention_share(
    layer: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: TokenStream,
    answers: Answers,
    arch: Architecture,
) -> Float[Array, " B"]:
    """Returns the share of the answer's attention in one dense layer that falls on visual tokens."""
    count, both = visual.shape[1], jnp.concatenate([visual, text], axis=1)
    mask = joint_mask(stream, arch, None)
    query, key, _ = project_qkv(layer, both, rotary(mask.kv_positions, arch.text), arch.text, count)
    query = jnp.take_along_axis(query, answers.places[:, :, None, None], axis=1)  # [B, A, H, E]
    of_answers = mask.map_queries(lambda x: jnp.take_along_axis(x[:, count:], answers.places, axis=1))
    query = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])  # [B, A, K, G, E]
    logits = jnp.einsum("BAKGE,BSKE->BAKGS", query.astype(jnp.float32), key.astype(jnp.float32))
    logits *= query.shape[-1] ** -0.5
    seen = of_answers.as_array()[:, :, None, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, MASKED), axis=-1), 0)
    return mean_where(jnp.mean(jnp.sum(weights[..., :count], axis=-1), axis=(2, 3)), answers.valid)


def linear_cka(
    first: Float[Array, "B N D"], second: Float[Array, "B N D"], kept: Bool[Array, "B N"]
) -> Float[Array, " B"]:
    """Returns linear CKA of two representations of the same tokens, for each sample over its own tokens `kept`.

    1 if one is the other turned, moved and scaled; NaN if either is constant or no token is kept.
    """

    def of_sample(arguments: tuple[Array, Array, Array]) -> Array:
        one, other, mine = arguments
        x, y = (centered(z.astype(jnp.float32), mine) for z in (one, other))
        if x.shape[0] <= x.shape[1]:  # products of tokens are smaller than those of channels
            of_x, of_y = x @ x.T, y @ y.T
            cross = jnp.sum(of_x * of_y)
        else:
            of_x, of_y = x.T @ x, y.T @ y
            cross = jnp.sum(jnp.square(x.T @ y))
        return cross / (jnp.linalg.norm(of_x) * jnp.linalg.norm(of_y))

    return jax.lax.map(of_sample, (first, second, kept))  # one at a time: the products are large


def centered(x: Float[Array, "N D"], kept: Bool[Array, " N"]) -> Float[Array, "N D"]:
    """Returns `x` minus its mean over the tokens kept; 0 for the others."""
    chosen = kept[:, None]
    mean = jnp.sum(jnp.where(chosen, x, 0), axis=0, keepdims=True) / jnp.sum(kept)
    return jnp.where(chosen, x - mean, 0)


def mean_where(values: Float[Array, "B A"], valid: Bool[Array, "B A"]) -> Float[Array, " B"]:
    """Returns the mean over the valid entries of each row."""
    return jnp.sum(jnp.where(valid, values, 0), axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1)
