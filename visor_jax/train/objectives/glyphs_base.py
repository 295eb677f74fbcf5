"""What a stage minimises: pure functions (params, batch, budget) -> (loss, metrics), all of one signature.

* `answer_loss`: next-token cross-entropy on the answers of a batch of conversations (stages dense, warmup, full,
  universal).
* `base_loss`: the stand-in for pretraining of models made here from scratch: visual tokens named through the token
  embedding table, and self-attention layers that relate them (method.md section 5.0).
* `policy_loss`: cross-entropy of the policy against each sample's pseudo-label.

`metrics` is a dict of arrays that the loop writes down: scalars as they are, "turn_correct" [B, turns] by task.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from visor_jax.architecture import Architecture
from visor_jax.kernels.cross_entropy import cross_entropy
from visor_jax.model.cross_init import asked_rotation
from visor_jax.model.decoder import KINDS, Budget
from visor_jax.model.keys import frozen_key
from visor_jax.model.layers import Params, in_dtype, rms_norm, scan_layers
from visor_jax.model.stream import Stream
from visor_jax.model.super_block import joint_layer, text_layer
from visor_jax.model.visor import Batch, embed, encode, head, hidden_states, route, stream_of

Metrics = dict[str, Array]
Loss = Callable[[Params, Batch, Budget], tuple[Float[Array, ""], Metrics]]


def computed_in(dtype: str, loss: Loss) -> Loss:
    """`loss` with activations of `dtype`: parameters are cast on their way in, and nowhere else."""
    return lambda params, batch, budget: loss(in_dtype(params, dtype), batch, budget)


def answer_tokens(
    params: Params, visual: Array, batch: Batch, budget: Budget, arch: Architecture, *, remat: bool = False
) -> tuple[Float[Array, "B T"], Array, Array]:
    """Loss, correctness (greedy) and weight of every next-token prediction [B, Nt - 1]; weight 0 off the targets."""
    hidden = hidden_states(params, visual, batch, budget, arch, remat=remat)[:, :-1]
    labels, segments = batch["text_tokens"][:, 1:], batch["text_segments"]
    weights = (batch["loss_mask"][:, 1:] & (segments[:, 1:] == segments[:, :-1])).astype(jnp.float32)
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses, correct = cross_entropy(flat, head(params), labels.reshape(-1), weights.reshape(-1))
    return losses.reshape(labels.shape), correct.reshape(labels.shape), weights


def turn_correct(correct: Array, turn_index: Array, num_turns: int) -> Array:
    """[B, turns]: whether every target token of a turn was predicted; True for turns a row does not have."""
    turn = turn_index[:, 1:, None] == jnp.arange(num_turns)
    return jnp.all(correct[..., None] | ~turn, axis=1)


def answer_loss(
    params: Params, batch: Batch, budget: Budget, arch: Architecture, *, num_turns: int, remat: bool
) -> tuple[Array, Metrics]:
    """Mean cross-entropy over the target tokens of the batch."""
    visual = encode(params, batch, arch)
    losses, correct, weights = answer_tokens(params, visual, batch, budget, arch, remat=remat)
    tokens = jnp.sum(weights)
    metrics = {"turn_correct": turn_correct(correct, batch["turn_index"], num_turns), "target_tokens": tokens}
    return jnp.sum(losses) / jnp.maximum(tokens, 1.0), metrics


def policy_loss(
    params: Params, batch: Batch, budget: Budget, arch: Architecture, *, num_viable: int
) -> tuple[Array, Metrics]:
    """Cross-entropy of the policy's scores against `batch["label"]` [B], weighted by `batch["label_weight"]` [B]."""
    visual = jax.lax.stop_gradient(encode(params, batch, arch))
    scores = route(params, visual, batch, num_viable, arch)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"])
    agree = jnp.mean((jnp.argmax(scores, axis=-1) == batch["label"]).astype(jnp.float32))
    weights = batch["label_weight"]
    return jnp.sum(losses * weights) / jnp.sum(weights), {"agreement": agree}


# --- the pretrained stand-in ------------------------------------------------------------------------------------------


def refine(
    params: Params, visual: Float[Array, "B Nv D"], batch: Batch, budget: Budget, arch: Architecture
) -> tuple[Array, Array]:
    """Visual and text tokens after the self-attention slots of `budget`, in order."""
    stream, text = stream_of(batch), embed(params, batch["text_tokens"])

    def slot(state, block):
        layer, on = block
        return jax.lax.cond(
            on, lambda v, t: joint_layer(layer, v, t, stream, arch)[:2], lambda v, t: (v, t), *state
        ), None

    (visual, text), _ = scan_layers(slot, (visual, text), (params["blocks"]["self"], jnp.asarray(budget, bool)))
    return visual, text


def naming_loss(features: Array, table: Array, tokens: Array, labels: Array) -> tuple[Array, Array]:
    """Cross-entropy [B, P] of naming `labels` through rows of the embedding table, and correctness [B, P].

    `tokens` [forms, classes] are the token ids of each class's name in each of its written forms (with and without a
    leading space): a feature must name its class in all of them.
    """
    scores = jnp.einsum("BPD,FCD->BPFC", features, table[tokens]) / NAMING_TEMPERATURE
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels[..., None])
    return jnp.mean(losses, axis=-1), jnp.all(jnp.argmax(scores, axis=-1) == labels[..., None], axis=-1)


def words_loss(text: Float[Array, "B T D"], table: Array, tokens: Array) -> tuple[Array, Array]:
    """Mean cross-entropy of every text token naming itself through the embedding table, and accuracy."""
    scores = unit_rms(text) @ table.T / NAMING_TEMPERATURE
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, tokens)
    return jnp.mean(losses), jnp.mean(jnp.argmax(scores, axis=-1) == tokens)


NAMING_TEMPERATURE = 4.0
CODEBOOK_SEED = 98
# What a patch is to tell of others, and in whose names: int32 [B, P] of a batch, 0 for "nothing", else 1 + index.
RELATIONS = {"above": "digit", "two_above": "digit", "colour_above": "colour", "reached": "digit"}
# Share of the name in what tells a relation. A patch that has a name of that kind itself says less or nothing: it would
# be taken for what it tells of.
SAID = {"digit": 0.8, "colour": 0.4}


def relation_scores(features: Array, relation: str, names: Array, table: Array, speaks: Array) -> Float[Array, "B P C"]:
    """Scores of a relation's classes along each name's own direction plus a frozen random one of this relation.

    The name makes what is told ready to be said, in patches that `speaks` [B, P] marks; the random part tells one
    relation from another. Class 0, "nothing", has a random part only.
    """
    key = jax.random.fold_in(frozen_key(CODEBOOK_SEED), list(RELATIONS).index(relation))
    said = SAID[RELATIONS[relation]] * jnp.mean(table[names], axis=0) / NAMING_TEMPERATURE
    own = jax.random.normal(key, (1 + said.shape[0], said.shape[1]), jnp.float32) / said.shape[1] ** 0.5
    in_words = jnp.pad(features @ said.T, ((0, 0), (0, 0), (1, 0)))
    return features @ own.T + speaks[..., None] * in_words


def relation_loss(scores: Array, labels: Array, counts: Array) -> tuple[Array, Array]:
    """Mean cross-entropy of a relation's labels where `counts` [B, P] is not 0, and accuracy where there is a relation.

    Patches with something to tell and patches with nothing weigh half each, however rare the former are.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    tells = (labels > 0) * counts
    loss = 0.5 * (masked_mean(losses, tells) + masked_mean(losses, (labels == 0) * counts))
    return loss, masked_mean(jnp.argmax(scores, axis=-1) == labels, tells)


def masked_mean(x: Array, mask: Array) -> Array:
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def reading_loss(params: Params, batch: Batch, arch: Architecture, names: Array) -> tuple[Array, Metrics]:
    """Reading and answering in words: the decoder on conversations without their pictures.

    It answers blindly, which teaches what an answer looks like. And where the answer begins it holds the name asked
    about (`batch["asked"]` [B, T], 1 + index into `names` [2, classes], 0 elsewhere) when it comes to cross-attention,
    so that text finds the patches that say that name; but for the first super-block, where the routing token reads.
    """
    tokens, positions, segments = (batch[f"reading_{name}"] for name in ("tokens", "positions", "segments"))
    stream = Stream(positions, segments, positions, segments, segments)  # of the text; no visual token is looked at

    def block(text, layers):
        asked = text_layer(layers["text"], text, stream, arch.text)[0]
        text = text_layer(layers["cross"], asked, stream, arch.text)[0]
        return text_layer(layers["self"], text, stream, arch.text)[0], asked

    text, asked = scan_layers(block, embed(params, tokens), {kind: params["blocks"][kind] for kind in KINDS})
    asked = asked[min(1, arch.num_blocks - 1) :]
    table, mask = params["embed_tokens"]["embedding"], (batch["asked"] > 0).astype(jnp.float32)
    told = unit_rms(asked) @ asked_rotation(arch.text.hidden_size)
    held, right = jax.vmap(lambda x: naming_loss(x, table, names, jnp.maximum(batch["asked"] - 1, 0)))(told)
    text = rms_norm(params["norm"], text, arch.text.rms_norm_eps)[:, :-1]
    weights = batch["reading_targets"][:, 1:].astype(jnp.float32)
    flat = text.reshape(-1, text.shape[-1])
    blind, _ = cross_entropy(flat, head(params), tokens[:, 1:].reshape(-1), weights.reshape(-1))
    metrics = {"asked": masked_mean(jnp.mean(right, axis=0), mask), "blind": jnp.sum(blind) / jnp.sum(weights)}
    return masked_mean(jnp.mean(held, axis=0), mask) + metrics["blind"], metrics


def base_loss(
    params: Params, batch: Batch, budget: Budget, arch: Architecture, *, names: Batch
) -> tuple[Array, Metrics]:
    """Name every patch's glyph, colour and background; after the slots that are on, also tell its relations.

    Naming goes through the token embedding table, which aligns tower and words; it is asked again after the slots, so
    that neither a patch nor a word of the text loses itself there. Beside the pictures the decoder learns to read
    questions (`reading_loss`). `names` holds the token ids [2, classes] of the glyphs', digits', colours' and
    backgrounds' names, and of those that questions ask about.
    """
    visual, patches = encode(params, batch, arch), batch["glyph"].shape[1]
    table = params["embed_tokens"]["embedding"]
    there = (batch["glyph"] > 0).astype(jnp.float32)

    def name_all(features):
        glyph, right = naming_loss(features, table, names["glyph"], batch["glyph"])
        colour, colour_right = naming_loss(features, table, names["colour"], batch["colour"])
        background, _ = naming_loss(features, table, names["background"], batch["background"])
        found = {"named": jnp.mean(right.astype(jnp.float32)), "colour_named": masked_mean(colour_right, there)}
        return jnp.mean(glyph) + masked_mean(colour, there) + 0.5 * jnp.mean(background), found

    first, metrics = name_all(unit_rms(visual[:, :patches]))
    last, text = refine(params, visual, batch, budget, arch)
    last = unit_rms(last[:, :patches])
    still, found = name_all(last)
    metrics |= {f"still_{name}": value for name, value in found.items()}
    words, metrics["words_kept"] = words_loss(text, table, batch["text_tokens"])
    reading, found = reading_loss(params, batch, arch, names["asked"])
    metrics |= found
    loss = first + 2.0 * still + words + reading
    arrow = batch["arrow"].astype(jnp.float32)
    speaks = {"digit": 1.0 - batch["is_digit"], "colour": jnp.ones_like(arrow)}
    for relation, kind in RELATIONS.items():
        counts = arrow if relation == "reached" else jnp.ones_like(arrow)
        scores = relation_scores(last, relation, names[kind], table, speaks[kind])
        one, metrics[relation] = relation_loss(scores, batch[relation], counts)
        loss = loss + 2.0 * one
    return loss, metrics


def unit_rms(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def prompt_end(batch: Batch) -> Array:
    """Position id right after each row's prompt [B]: that of the first target of a single-turn row."""
    never = jnp.iinfo(jnp.int32).max
    return jnp.min(jnp.where(batch["loss_mask"], batch["text_positions"], never), axis=1)
