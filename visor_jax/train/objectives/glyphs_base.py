"""Objective "base": the stand-in for pretraining of models that are made here from scratch (method.md section 5.0).

Visual tokens learn to name their patch through the token embedding table, self-attention layers to relate patches, and
the decoder to read questions. The labels come from the generated data set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from visor_jax.architecture import Architecture, LayerKind
from visor_jax.budget import Bits, budget_name
from visor_jax.config import Config, architecture, stage_config
from visor_jax.data.anyres import visual_layout
from visor_jax.data.chat import encode_prompt
from visor_jax.data.collate import Content, Example
from visor_jax.data.draws import generator, index_range
from visor_jax.data.from_config import make_tokenizer, sample_encoder, stage_source, training_row_shape
from visor_jax.data.glyphs import render as glyphs_render
from visor_jax.data.glyphs import source as glyphs
from visor_jax.data.glyphs.words import PHRASINGS
from visor_jax.data.sample import Sample, samples_of
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.errors import RequestError
from visor_jax.kernels.cross_entropy import cross_entropy
from visor_jax.model.decoder import Budget, by_block, select_layer
from visor_jax.model.initializers import asked_rotation
from visor_jax.model.keys import frozen_key
from visor_jax.model.layers import Params, inside, rms_norm, scan_layers
from visor_jax.model.stream import TokenStream
from visor_jax.model.super_block import joint_layer, text_layer
from visor_jax.model.visor import Batch, embed, encode, head, stream_of
from visor_jax.train.objectives.base import Loss, Metrics, Objective
from visor_jax.train.objectives.glyphs_totals import (
    ACCURACIES,
    RELATIONS,
    ROWS,
    TOTAL,
    Total,
    masked_mean,
    related_patches,
    relation_counts,
)
from visor_jax.train.stage import Step, budget_drawer, made_ahead, process_rows
from visor_jax.workdir.folder import Workdir

# --- the steps of the stage -------------------------------------------------------------------------------------------


def base_objective(config: Config, stage: str, workdir: Workdir) -> Objective:
    """Labeled grids of the generated data set (method.md section 5.0)."""
    if config.data.source != "glyphs":
        raise RequestError(
            f"stage=base: needs data.source=glyphs, its labels are generated; got {config.data.source!r}"
        )
    grids, settings = LabeledGrids(config, stage), stage_config(config, stage)
    conversations, budget_of = stage_source(config, stage), budget_drawer(config, stage, workdir)
    indices = index_range(stage)[1]

    def step(number: int) -> Step:
        bits = budget_of(number)
        rows = [(number - 1) * settings.batch_size + row for row in process_rows(settings.batch_size)]
        read = [sample for row in rows for sample in samples_of(conversations[row])]
        arrays = grids.arrays(bits, [indices[row] for row in rows], read)
        ids = [f"grid/{config.seed}/{indices[row]}" for row in rows]
        return Step(number, arrays, bits, budget_name(bits), ids, [], contents=_contents(arrays))

    def summarize(step: Step, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {"blind": float(metrics["blind"]), **{f"accuracy/{name}": float(metrics[name]) for name in ACCURACIES}}

    return Objective(grids.loss, partial(made_ahead, step), summarize)


class LabeledGrids:
    """Makes batches of labeled grids, each with the questions of a conversation to be read, and their loss."""

    def __init__(self, config: Config, stage: str) -> None:
        """
        Raises:
          RequestError: the model's patches do not have the size of those that pictures are drawn in.
        """
        self.arch, self._seed, self._hops = architecture(config, stage), config.seed, stage_config(config, stage).hops
        if self.arch.vision.patch_size != glyphs_render.PATCH:
            raise RequestError(
                f"model.vision.patch_size={self.arch.vision.patch_size}: stage base needs {glyphs_render.PATCH},"
                " the size of the patches that the generated pictures are drawn in"
            )
        tokenizer, row_shape = make_tokenizer(config), training_row_shape(config)
        self._names, self._prefix = name_tables(tokenizer), picture_prefix(tokenizer, config)
        self._words = known_words(tokenizer, self._names)
        self._encode, self._reading_length = sample_encoder(config, tokenizer, row_shape), row_shape.text // 2
        self.loss: Loss = partial(base_loss, arch=self.arch, names=self._names)

    def arrays(
        self, bits: Bits, grids: Sequence[int], conversations: Sequence[Sample]
    ) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        """Returns a batch, one grid and one conversation per row; the longest chain depends on the budget `bits`."""
        hops = self._hops[min(sum(bits), len(self._hops)) - 1]
        labeled = [grid_arrays(self._seed, index, hops, self._prefix, self._words, self.arch) for index in grids]
        read = [
            reading_arrays(self._encode(sample), self._names["asked"], self._reading_length) for sample in conversations
        ]
        return {k: np.stack([row[k] for row in rows]) for rows in (labeled, read) for k in rows[0]}


def abstract_base(config: Config, stage: str) -> tuple[Loss, dict[str, Any]]:
    """The loss of a stage and the shapes of its batches; draws one batch of grids, with the package's own tokenizer."""
    objective = base_objective(config, stage, Workdir("unused"))
    (step,) = objective.steps(0, 1)
    num_rows = stage_config(config, stage).batch_size
    return objective.loss, {
        name: jax.ShapeDtypeStruct((num_rows, *x.shape[1:]), x.dtype) for name, x in step.arrays.items()
    }


def _contents(arrays: Mapping[str, Shaped[np.ndarray, "B ..."]]) -> list[list[Content]]:
    """The sizes of the grids of a batch, one per row."""
    num_rows, num_tiles = arrays["tiles"].shape[:2]
    sizes = arrays["visual_positions"].shape[1], arrays["text_tokens"].shape[1]
    return [[Content("grid", num_tiles, *sizes)]] * num_rows


def name_tables(tokenizer: ChatTokenizer) -> dict[str, Int[np.ndarray, "F _"]]:
    """Token ids [2, classes] of every name, with and without a leading space."""
    groups = {
        "glyph": glyphs.glyph_names(),
        "digit": glyphs_render.DIGITS,
        "colour": glyphs.color_names(),
        "background": glyphs.background_names(),
    }
    tables = {
        group: np.array([tokenizer.word_ids(name) for name in names], np.int32).T for group, names in groups.items()
    }
    first, count = glyphs_render.FIRST_LETTER, len(glyphs_render.LETTERS)
    tables["asked"] = np.concatenate([tables["glyph"][:, first : first + count], tables["colour"]], axis=1)
    return tables


def picture_prefix(tokenizer: ChatTokenizer, config: Config) -> Int[np.ndarray, " prefix"]:
    """The token ids before the picture in every conversation."""
    ids = encode_prompt(tokenizer, "", 1, config.tokenizer.system or None)
    return np.array(ids[: ids.index(tokenizer.image_token_id)], np.int32)


WORDS_AFTER = 16  # random words after every picture of the base stage


def known_words(tokenizer: ChatTokenizer, names: Mapping[str, Int[np.ndarray, "F _"]]) -> Int[np.ndarray, " W"]:
    """The token ids [W] of all names, of the words of questions and of the chat template."""
    wording = " ".join(text for phrasings in PHRASINGS.values() for phrasing in phrasings for text in phrasing)
    question_ids = {*encode_prompt(tokenizer, re.sub("{.*?}", "", wording))} - {tokenizer.image_token_id}
    return np.unique(np.concatenate([[*question_ids], *(ids.ravel() for ids in names.values())])).astype(np.int32)


def grid_arrays(
    seed: int,
    index: int,
    hops: int,
    prefix: Int[np.ndarray, " prefix"],
    words: Int[np.ndarray, " W"],
    arch: Architecture,
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """One labeled grid as arrays: `prefix`, the picture and random `words`, with the labels of every patch."""
    grid = glyphs.relation_grid(seed, index, arch.vision.patches_per_side)
    layout = visual_layout([grid.image.shape[:2]], arch)
    count = len(layout.gather)
    after = generator("words", seed, index).choice(words, WORDS_AFTER)
    text = np.concatenate([prefix, after])
    positions = np.arange(count + len(text), dtype=np.int32)
    return {
        "tiles": grid.image[None],
        "visual_gather": layout.gather,
        "visual_weights": layout.weights,
        "visual_positions": positions[len(prefix) : len(prefix) + count],
        "visual_segments": np.ones(count, np.int32),
        "text_tokens": text,
        "text_positions": np.concatenate([positions[: len(prefix)], positions[len(prefix) + count :]]),
        "text_segments": np.ones(len(text), np.int32),
        "glyph": grid.glyphs,
        "colour": grid.colors,
        "background": np.full(len(grid.glyphs), grid.background, np.int32),
        "arrow": grid.is_arrow,
        "is_digit": (digit_class(grid.glyphs) > 0).astype(np.float32),
        **relations(grid, hops),
    }


def reading_arrays(example: Example, names: Int[np.ndarray, "F C"], length: int) -> dict[str, Shaped[np.ndarray, " T"]]:
    """The first `length` text tokens of a conversation, and the name that each question asks about.

    At the token before an answer, `asked` is 1 + index into `names` [2, classes] of the last name in the question, or 0
    without a name. It is 0 at all other tokens.
    """
    tokens, turns = example.text_tokens, example.turn_index
    index_of = {int(token): index for form in names for index, token in enumerate(form)}
    asked, latest = np.zeros(len(tokens), np.int32), 0
    for place, (token, turn) in enumerate(zip(tokens.tolist(), turns.tolist(), strict=True)):
        if turn < 0:
            latest = index_of.get(token, latest - 1) + 1
        else:
            if turns[place - 1] < 0:
                asked[place - 1] = latest
            latest = 0
    arrays = {
        "reading_tokens": tokens,
        "reading_positions": example.text_positions,
        "reading_segments": np.ones(len(tokens), np.int32),
        "reading_targets": example.loss_mask,
        "asked": asked,
    }
    return {name: np.pad(array[:length], (0, max(length - len(tokens), 0))) for name, array in arrays.items()}


def digit_class(ids: Int[np.ndarray, "*P"]) -> Int[np.ndarray, "*P"]:
    """1 + index of the digit where a glyph is one, else 0."""
    first, count = glyphs_render.FIRST_DIGIT, len(glyphs_render.DIGITS)
    return np.where((ids >= first) & (ids < first + count), ids - first + 1, 0).astype(np.int32)


def relations(grid: glyphs.RelationGrid, hops: int) -> dict[str, Int[np.ndarray, " P"]]:
    """For every patch [P], 1 + index or 0: the digit above it and two above, the color above, the digit reached."""
    side = round(len(grid.glyphs) ** 0.5)

    def lifted(values: np.ndarray, rows: int) -> np.ndarray:
        return np.concatenate([np.zeros(rows * side, np.int32), values[: -rows * side]])

    colors = np.where(grid.glyphs > 0, grid.colors + 1, 0).astype(np.int32)
    return {
        "above": lifted(digit_class(grid.glyphs), 1),
        "two_above": lifted(digit_class(grid.glyphs), 2),
        "colour_above": lifted(colors, 1),
        "reached": digit_class(grid.reached[hops - 1]) * grid.is_arrow,
    }


# --- losses -----------------------------------------------------------------------------------------------------------


def refine(
    params: Params, visual: Float[Array, "B Nv D"], batch: Batch, budget: Budget, arch: Architecture
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """Visual and text tokens after the self-attention slots of `budget`, in order."""
    stream, text = stream_of(batch), embed(params, batch["text_tokens"])

    paths = [place.path for place in arch.block if place.kind is LayerKind.SELF]

    def slots(state, block):
        layers, on = block
        for number, path in enumerate(paths):
            layer = inside(layers, path)
            state = jax.lax.cond(
                on[number],
                lambda v, t, layer=layer: joint_layer(layer, v, t, stream, arch)[:2],
                lambda v, t: (v, t),
                *state,
            )
        return state, None

    slot_layers = {LayerKind.SELF.value: params["blocks"][LayerKind.SELF]}
    (visual, text), _ = scan_layers(slots, (visual, text), (slot_layers, by_block(budget, arch)))
    return visual, text


def naming_loss(
    features: Float[Array, "B P D"],
    table: Float[Array, "V D"],
    tokens: Int[Array | np.ndarray, "F C"],
    labels: Int[Array, "B P"],
) -> tuple[Float[Array, "B P"], Bool[Array, "B P"]]:
    """Cross-entropy [B, P] of naming `labels` through rows of the embedding table, and correctness [B, P].

    `tokens` [forms, classes] are the token ids of each class's name in each of its written forms (with and without a
    leading space): a feature must name its class in all of them.
    """
    scores = jnp.einsum("BPD,FCD->BPFC", features, table[tokens]) / NAMING_TEMPERATURE
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels[..., None])
    return jnp.mean(losses, axis=-1), jnp.all(jnp.argmax(scores, axis=-1) == labels[..., None], axis=-1)


def words_loss(
    text: Float[Array, "B T D"], table: Float[Array, "V D"], tokens: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy of every text token naming itself through the embedding table, and accuracy."""
    scores = unit_rms(text) @ table.T / NAMING_TEMPERATURE
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, tokens)
    return jnp.mean(losses), jnp.mean(jnp.argmax(scores, axis=-1) == tokens)


NAMING_TEMPERATURE = 4.0
CODEBOOK_SEED = 98
# Weight of the name in a relation's code. A patch with a name of that kind itself gets less of it or none: its own name
# and the related one would be confused.
NAME_WEIGHT = {"digit": 0.8, "colour": 0.4}


def relation_scores(
    features: Float[Array, "B P D"],
    relation: str,
    names: Int[Array | np.ndarray, "F C"],
    table: Float[Array, "V D"],
    use_name: Float[Array, "B P"],
) -> Float[Array, "B P K"]:
    """Scores of a relation's classes: along each name's embedding plus a frozen random direction of this relation.

    The name lets the decoder read the class as a word; `use_name` [B, P] weighs it per patch. The random part tells
    relations apart. Class 0, "nothing", has only a random part.
    """
    key = jax.random.fold_in(frozen_key(CODEBOOK_SEED), list(RELATIONS).index(relation))
    name_part = NAME_WEIGHT[RELATIONS[relation]] * jnp.mean(table[names], axis=0) / NAMING_TEMPERATURE
    classes, size = name_part.shape
    random_part = jax.random.normal(key, (1 + classes, size), jnp.float32) / size**0.5
    name_scores = jnp.pad(features @ name_part.T, ((0, 0), (0, 0), (1, 0)))
    return features @ random_part.T + use_name[..., None] * name_scores


def relation_loss(
    scores: Float[Array, "B P C"],
    labels: Int[Array, "B P"],
    counts: Float[Array, "B P"],
    totals: tuple[Total, Total] = (None, None),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy of a relation's labels where `counts` is not 0, and accuracy on patches with a relation.

    Patches with a relation and patches without one weigh half each, however rare the former are. `totals`: their
    numbers in the whole batch, if this is a part of one.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    related, others = related_patches(labels, counts)
    loss = 0.5 * (masked_mean(losses, related, totals[0]) + masked_mean(losses, others, totals[1]))
    return loss, masked_mean(jnp.argmax(scores, axis=-1) == labels, related, totals[0])


def reading_loss(
    params: Params, batch: Batch, arch: Architecture, names: Int[Array | np.ndarray, "F C"]
) -> tuple[Float[Array, ""], Metrics]:
    """Trains the decoder to read and answer conversations without their pictures.

    Answering without the picture teaches the form of answers. Text at the start of an answer also learns to hold the
    name that the question asks about, so that cross-attention finds the patches of that name: `batch["asked"]` [B, T]
    is 1 + index into `names` [2, classes], 0 elsewhere. Cross-attention before the first slot is left out, because the
    routing token reads there.
    """
    tokens, positions, segments = (batch[f"reading_{name}"] for name in ("tokens", "positions", "segments"))
    stream = TokenStream(positions, segments, positions, segments, segments)  # no layer here reads visual tokens

    def block(text, layers):
        asked = []  # text at the entry of each cross-attention
        for place in arch.block:
            if place.cross:
                asked.append(text)
            text = text_layer(inside(layers, place.path), text, stream, arch.text)[0]
        return text, asked

    text = embed(params, tokens)
    for index in range(arch.num_head_layers):
        text = text_layer(select_layer(params["head"], index), text, stream, arch.text)[0]
    blocks = {kind: params["blocks"][kind] for kind in sorted({*arch.pattern})}
    text, asked = scan_layers(block, text, blocks)
    asked = asked[0] if len(asked) == 1 else jnp.stack(asked, axis=1).reshape(-1, *asked[0].shape[1:])
    early = sum(bool(arch.layers[index].cross) for index in arch.shared_layers)
    asked = asked[min(early, len(asked) - 1) :]
    table, mask = params["embed_tokens"]["embedding"], (batch["asked"] > 0).astype(jnp.float32)
    rotated = unit_rms(asked) @ asked_rotation(arch.text.hidden_size)
    losses, correct = jax.vmap(lambda x: naming_loss(x, table, names, jnp.maximum(batch["asked"] - 1, 0)))(rotated)
    text = rms_norm(params["norm"], text, arch.text.rms_norm_eps)[:, :-1]
    weights = batch["reading_targets"][:, 1:].astype(jnp.float32)
    flat = text.reshape(-1, text.shape[-1])
    blind, _ = cross_entropy(flat, head(params), tokens[:, 1:].reshape(-1), weights.reshape(-1))
    total, targets = batch.get(f"{TOTAL}asked"), batch.get(f"{TOTAL}targets")
    metrics = {"asked": masked_mean(jnp.mean(correct, axis=0), mask, total)}
    metrics["blind"] = jnp.sum(blind) / (jnp.sum(weights) if targets is None else targets)
    return masked_mean(jnp.mean(losses, axis=0), mask, total) + metrics["blind"], metrics


def base_loss(
    params: Params, batch: Batch, budget: Budget, arch: Architecture, *, names: Batch
) -> tuple[Float[Array, ""], Metrics]:
    """Loss of naming every patch's glyph, color and background, and of its relations after the slots that are on.

    Naming goes through the token embedding table, which aligns tower and words. It is repeated after the slots, for
    patches and for words of the text, so that both keep their names there. `reading_loss` is added. `names` holds the
    token ids [2, classes] of the names of glyphs, digits, colors and backgrounds, and of the names in questions.
    """
    visual, patches = encode(params, batch, arch), batch["glyph"].shape[1]
    table = params["embed_tokens"]["embedding"]
    has_glyph, glyphs_total = (batch["glyph"] > 0).astype(jnp.float32), batch.get(f"{TOTAL}glyph")

    def name_all(features):
        glyph, correct = naming_loss(features, table, names["glyph"], batch["glyph"])
        color, color_correct = naming_loss(features, table, names["colour"], batch["colour"])
        background, _ = naming_loss(features, table, names["background"], batch["background"])
        accuracies = {
            "named": jnp.mean(correct.astype(jnp.float32)),
            "colour_named": masked_mean(color_correct, has_glyph, glyphs_total),
        }
        return jnp.mean(glyph) + masked_mean(color, has_glyph, glyphs_total) + 0.5 * jnp.mean(background), accuracies

    first, metrics = name_all(unit_rms(visual[:, :patches]))
    last, text = refine(params, visual, batch, budget, arch)
    last = unit_rms(last[:, :patches])
    still, accuracies = name_all(last)
    metrics |= {f"still_{name}": value for name, value in accuracies.items()}
    words, metrics["words_kept"] = words_loss(text, table, batch["text_tokens"])
    reading, accuracies = reading_loss(params, batch, arch, names["asked"])
    metrics |= accuracies
    loss = first + 2.0 * still + words + reading
    use_name = {"digit": 1.0 - batch["is_digit"], "colour": jnp.ones_like(batch["is_digit"])}
    for relation, kind in RELATIONS.items():
        scores = relation_scores(last, relation, names[kind], table, use_name[kind])
        totals = batch.get(f"{TOTAL}{relation}"), batch.get(f"{TOTAL}{relation}/others")
        counts = relation_counts(batch, relation)
        relation_part, metrics[relation] = relation_loss(scores, batch[relation], counts, totals)
        loss = loss + 2.0 * relation_part
    return loss, metrics | {ROWS: jnp.float32(len(visual))}


def unit_rms(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """`x` divided by its root mean square over D."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
