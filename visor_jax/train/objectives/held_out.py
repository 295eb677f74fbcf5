"""The held-out data on which each objective is validated, and what is measured there.

In: a configuration and a stage. Out: `HeldOut`, whose sums over batches become `validation/...` fields of a metrics
row. Nothing here draws random numbers or changes what a stage trains on.

- "answer": conversations of the validation split, one per row, under the budgets of interest; of a mixture with
  generated parts, those of each part that the stage trains on.
- "policy": questions of the validation split. Their labels follow from the likelihood of their answers under every
  viable budget, as those of the stage label do; the parameters that give them are frozen.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, budget_name
from visor_jax.config import Config, architecture, stage_config
from visor_jax.data.collate import Example, make_batch
from visor_jax.data.from_config import (
    agreed_taps,
    held_out_parts,
    make_tokenizer,
    sample_encoder,
    training_row_shape,
)
from visor_jax.data.questions import single_questions
from visor_jax.data.sample import SkipSample, Source
from visor_jax.errors import RequestError
from visor_jax.evaluate.scoring import cheapest_good_enough, score_batch
from visor_jax.model.decoder import Budget
from visor_jax.model.layers import Params, in_dtype
from visor_jax.model.likelihood import answer_tokens, prompt_end
from visor_jax.model.visor import Batch, abstract_params, encode, route
from visor_jax.scale.sharding import place_batch, replicated
from visor_jax.train.objectives.answers import turn_correct, turns_per_row
from visor_jax.train.objectives.policy import budget_weights
from visor_jax.train.stage import Step, fixed_budget, made_ahead, process_rows
from visor_jax.tree import flatten
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import Labels, read_viable

Arrays = dict[str, Shaped[np.ndarray, "B ..."]]
Sums = dict[str, Float[Array, ""]]
Totals = Mapping[str, Mapping[str, float]]  # by budget, then by name of a sum


class Measured(NamedTuple):
    """A batch: this process's rows, and the (name, bits) of each budget that it is measured under."""

    arrays: Arrays
    budgets: tuple[tuple[str, Bits], ...]


@dataclass(frozen=True)
class HeldOut:
    """What a stage is validated on.

    Attributes:
      batches: parameters -> an iterator over the batches, from the first one.
      sums: (parameters, batch, budget) -> sums over the batch, by name.
      fields: totals of all batches -> fields of the metrics row, without the prefix "validation/".
    """

    batches: Callable[[Params], Iterator[Measured]]
    sums: Callable[[Params, Batch, Budget], Sums]
    fields: Callable[[Totals], dict[str, Any]]


def held_out(config: Config, stage: str, workdir: Workdir, mesh: Mesh) -> HeldOut:
    """The held-out data of a stage's objective.

    Raises:
      RequestError: the validation split does not exist or is empty, or the stage cannot be validated.
    """
    kinds = {"answer": held_out_answers, "policy": held_out_questions}
    return kinds[stage_config(config, stage).objective](config, stage, workdir, mesh)


# --- answer -----------------------------------------------------------------------------------------------------------


def held_out_answers(config: Config, stage: str, workdir: Workdir, mesh: Mesh) -> HeldOut:
    """Conversations of the validation split, as many of each part. A record that cannot be used leaves a row empty."""
    settings, shape = stage_config(config, stage), training_row_shape(config)
    arch = architecture(config, stage).in_training
    parts, encoder = held_out_parts(config, stage), sample_encoder(config, make_tokenizer(config), shape)
    size, per_part = settings.batch_size, -(-settings.validate_samples // len(parts))
    num_turns = turns_per_row(config, packed=False)
    min_taps, budgets = agreed_taps(config, jax.process_count()), budgets_of(config, stage, arch, workdir)

    # (part's name, its source, index of the first sample) of each batch: no batch mixes parts.
    starts = [(name, source, start) for name, source in parts for start in range(0, min(len(source), per_part), size)]

    def row(source: Source, index: int) -> list[Example]:
        try:
            return [encoder(source[index])] if index < min(len(source), per_part) else []
        except SkipSample:
            return []

    def batch(number: int) -> Step:
        _, source, start = starts[number - 1]
        rows = [row(source, start + place) for place in process_rows(size)]
        made = make_batch(rows, shape, arch, min_taps=min_taps, independent_turns=config.data.independent_turns)
        return Step(number, made.arrays, (), "", made.ids, made.tasks, contents=made.contents)

    def batches(params: Params) -> Iterator[Measured]:
        for (part, _, _), step in zip(starts, made_ahead(batch, 0, len(starts)), strict=True):
            suffix = f"{PART}{part}" if part else ""
            yield Measured(step.arrays, tuple((f"{name}{suffix}", bits) for name, bits in budgets))

    return HeldOut(batches, partial(answer_sums, arch=arch, num_turns=num_turns), answer_fields)


def budgets_of(config: Config, stage: str, arch: Architecture, workdir: Workdir) -> tuple[tuple[str, Bits], ...]:
    """The viable budgets if the stage draws from them, one if it trains that one only, else the empty and the full."""
    choices: list[Bits] = [(False,) * arch.num_slots, (True,) * arch.num_slots]
    settings = stage_config(config, stage)
    if (fixed := fixed_budget(settings, arch)) is not None and not all(fixed):
        choices = [fixed]
    if settings.budgets == "viable":
        choices = [tuple(bool(bit) for bit in bits) for bits in read_viable(workdir, arch.num_slots)]
    return tuple({budget_name(bits): bits for bits in choices}.items())


def answer_sums(params: Params, batch: Batch, budget: Budget, *, arch: Architecture, num_turns: int) -> Sums:
    """Sums over a batch: loss and number of target tokens, right and all turns, samples."""
    losses, correct, weights = answer_tokens(params, encode(params, batch, arch), batch, budget, arch)
    turns = batch["turn_index"]
    exists = jnp.any(turns[:, 1:, None] == jnp.arange(num_turns)[None, None], axis=1)
    right = turn_correct(correct, turns, num_turns) & exists
    samples = jnp.max(batch["text_segments"], axis=1)
    return summed(loss=losses, tokens=weights, right=right, turns=exists, samples=samples)


PART = "/part="  # between the name of a budget and that of a part of the data


def answer_fields(totals: Totals) -> dict[str, Any]:
    """Loss per target token and accuracy per turn under each budget: over all parts of the data, and of each part."""
    over_parts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, sums in totals.items():
        over_parts[name.partition(PART)[0]].update(sums)
    row: dict[str, Any] = {"samples": int(next(iter(over_parts.values()))["samples"])}
    for name, sums in {**over_parts, **totals}.items():
        if sums["tokens"] and sums["turns"]:
            row[f"loss/budget={name}"] = sums["loss"] / sums["tokens"]
            row[f"accuracy/budget={name}"] = sums["right"] / sums["turns"]
    return row


def summed(**arrays: Array) -> Sums:
    """The sum of each array, in float32."""
    return {name: jnp.sum(x).astype(jnp.float32) for name, x in arrays.items()}


# --- policy -----------------------------------------------------------------------------------------------------------


def held_out_questions(config: Config, stage: str, workdir: Workdir, mesh: Mesh) -> HeldOut:
    """Questions of the validation split, with the labels that the stage label would give them.

    Labels are computed in the first validation and kept. A question whose label is unknown (`label.only_right`) does
    not count.

    Raises:
      RequestError: parameters train that the labels depend on.
    """
    settings, arch = stage_config(config, stage), architecture(config, stage)
    check_frozen(arch, settings.trainable)
    viable, size = read_viable(workdir, arch.num_slots), settings.batch_size
    trained_on = Labels.read(workdir).label
    weights = budget_weights(trained_on, len(viable), settings.label_balance)
    weights = weights / weights[trained_on].mean()
    questions = single_questions(config, "validation", settings.validate_samples)
    full, whole, dtype = (True,) * arch.num_slots, replicated(mesh), config.model.dtype
    encoder = jax.jit(lambda params, batch: encode(in_dtype(params, dtype), batch, arch))
    scorer = jax.jit(
        lambda params, *rest: score_batch(in_dtype(params, dtype), *rest, arch=arch), out_shardings=(whole, whole)
    )
    labels: list[tuple[np.ndarray, np.ndarray]] = []  # of each batch: labels and weights of its rows

    def labeled(params: Params, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        batch = place_batch(mine(arrays), mesh)
        visual = encoder(params, batch)
        scores = [jax.device_get(scorer(params, visual, batch, jnp.asarray(bits, bool))) for bits in viable]
        correct, log_likelihood = (np.stack(part, axis=1) for part in zip(*scores, strict=True))
        column = viable.index(full)
        label = cheapest_good_enough(log_likelihood, column, config.label.tolerance)
        known = arrays["loss_mask"].any(axis=1) & (correct[:, column] | (not config.label.only_right))
        return label.astype(np.int32), np.where(known, weights[label], 0).astype(np.float32)

    def mine(arrays: Mapping[str, np.ndarray]) -> Arrays:
        rows = process_rows(size)
        return {name: x[rows.start : rows.stop] for name, x in arrays.items()}

    def batches(params: Params) -> Iterator[Measured]:
        for number, made in enumerate(questions.batches(size)):
            if number == len(labels):
                labels.append(labeled(params, made.arrays))
            label, weight = labels[number]
            extra = {"routing_position": np.asarray(prompt_end(made.arrays)), "label": label, "label_weight": weight}
            yield Measured(mine({**made.arrays, **extra}), (("full", full),))

    return HeldOut(batches, partial(policy_sums, arch=arch, num_viable=len(viable)), policy_fields)


def check_frozen(arch: Architecture, trainable: Sequence[str]) -> None:
    """Raises:
    RequestError: a parameter trains that does not belong to the policy, so that labels would change with each step.
    """
    paths = (path for path in flatten(abstract_params(arch)) if any(re.match(pattern, path) for pattern in trainable))
    if path := next((path for path in paths if not path.startswith("routing/")), None):
        raise RequestError(
            f"train.validate_every: stage policy trains {path}, on which the labels of held-out questions depend;"
            " expected stage_overrides.policy.trainable=('routing/',), or stage_overrides.policy.validate_every=0"
        )


def policy_sums(params: Params, batch: Batch, budget: Budget, *, arch: Architecture, num_viable: int) -> Sums:
    """Sums over the questions of a batch whose label is known: weighted loss, weights, agreements with the labels."""
    scores = route(params, encode(params, batch, arch), batch, num_viable, arch)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"])
    weights, known = batch["label_weight"], batch["label_weight"] > 0
    agree = (jnp.argmax(scores, axis=-1) == batch["label"]) & known
    return summed(loss=jnp.where(known, losses, 0) * weights, weight=weights, agree=agree, samples=known)


def policy_fields(totals: Totals) -> dict[str, Any]:
    """Loss per question, by weight, and the share of questions for which the policy prefers the label."""
    (sums,) = totals.values()
    row: dict[str, Any] = {"samples": int(sums["samples"])}
    if sums["samples"]:
        row |= {"loss": sums["loss"] / sums["weight"], "accuracy": sums["agree"] / sums["samples"]}
    return row
