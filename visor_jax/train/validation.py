"""Loss and accuracy on the validation split while a stage trains.

In: a configuration, and the parameters after a step. Out: `validation/...` fields of that step's metrics row, under the
budgets of interest. The first `train.validate_samples` records of the split are read again each time, one per row, so
that no memory is held in between and the figures of two steps are comparable. Training is not affected.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, budget_name
from visor_jax.config import Config, architecture, stage_config
from visor_jax.data.collate import Example, make_batch
from visor_jax.data.from_config import agreed_taps, make_source, make_tokenizer, sample_encoder, training_row_shape
from visor_jax.data.sample import SkipSample
from visor_jax.model.decoder import Budget
from visor_jax.model.layers import in_dtype
from visor_jax.model.likelihood import answer_tokens
from visor_jax.model.visor import Batch, encode
from visor_jax.scale.sharding import batch_sharding, place_batch, replicated
from visor_jax.train.objectives.answers import turn_correct
from visor_jax.train.stage import Step, made_ahead, process_rows
from visor_jax.train.update import State
from visor_jax.tree import unflatten
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import read_viable
from visor_jax.workdir.supervision import beat

log = logging.getLogger(__name__)

Flat = dict[str, Any]
Sums = Callable[[Flat, Flat, Batch, Budget], Float[Array, "5"]]


@dataclass(frozen=True)
class Validation:
    """The validation of one stage.

    Attributes:
      every: steps between two validations; the last step is always validated.
      budgets: names and bits.
      batches: makes a fresh iterator over this process's rows of every batch.
      sums: (trainable, frozen, batch, budget) -> sums of loss, target tokens, right turns, turns and samples.
    """

    every: int
    budgets: tuple[tuple[str, Bits], ...]
    batches: Callable[[], Iterator[Step]]
    sums: Sums
    mesh: Mesh

    def is_due(self, step: int, last: int) -> bool:
        """Whether the parameters after `step` are validated."""
        return step % self.every == 0 or step == last

    def fields(self, state: State) -> dict[str, Any]:
        """Returns the fields of the metrics row. Waits for the devices."""
        totals = {name: np.zeros(5) for name, _ in self.budgets}
        for step in self.batches():
            batch = place_batch(step.arrays, self.mesh)
            with jax.set_mesh(self.mesh):
                parts = {
                    name: self.sums(state.trainable, state.frozen, batch, jnp.asarray(bits, bool))
                    for name, bits in self.budgets
                }
            for name, part in jax.device_get(parts).items():
                totals[name] += part
            beat()
        row: dict[str, Any] = {"validation/samples": int(next(iter(totals.values()))[4])}
        for name, sums in totals.items():
            loss, tokens, right, turns, _ = sums.tolist()
            if tokens and turns:
                row[f"validation/loss/budget={name}"] = loss / tokens
                row[f"validation/accuracy/budget={name}"] = right / turns
        return row


def make_validation(config: Config, stage: str, workdir: Workdir, mesh: Mesh, shardings: State) -> Validation | None:
    """The validation that `train.validate_every` asks for; None if it is 0 or the stage does not train on answers.

    Raises:
      RequestError: the validation split does not exist or is empty.
    """
    settings = stage_config(config, stage)
    if not settings.validate_every:
        return None
    if settings.objective != "answer":
        log.warning("%s: train.validate_every has no effect: only stages that train on answers are validated", stage)
        return None
    arch = architecture(config, stage)
    sums = jax.jit(
        partial(validation_sums, arch=arch, num_turns=config.data.turns_per_picture, dtype=config.model.dtype),
        in_shardings=(shardings.trainable, shardings.frozen, batch_sharding(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )
    batches = validation_batches(config, stage, arch)
    return Validation(settings.validate_every, budgets_of(config, stage, arch, workdir), batches, sums, mesh)


def budgets_of(config: Config, stage: str, arch: Architecture, workdir: Workdir) -> tuple[tuple[str, Bits], ...]:
    """The viable budgets if the stage draws from them, else the empty and the full one."""
    choices: list[Bits] = [(False,) * arch.num_slots, (True,) * arch.num_slots]
    if stage_config(config, stage).budgets == "viable":
        choices = [tuple(bool(bit) for bit in bits) for bits in read_viable(workdir, arch.num_slots)]
    return tuple({budget_name(bits): bits for bits in choices}.items())


def validation_batches(config: Config, stage: str, arch: Architecture) -> Callable[[], Iterator[Step]]:
    """Opens the split. A record that cannot be used leaves its row empty."""
    settings, shape = stage_config(config, stage), training_row_shape(config)
    source, encoder = make_source(config, "validation"), sample_encoder(config, make_tokenizer(config), shape)
    count, size = min(len(source), settings.validate_samples), settings.batch_size
    min_taps = agreed_taps(config, jax.process_count())

    def row(index: int) -> list[Example]:
        try:
            return [encoder(source[index])] if index < count else []
        except SkipSample:
            return []

    def batch(number: int) -> Step:
        rows = [row((number - 1) * size + place) for place in process_rows(size)]
        made = make_batch(rows, shape, arch, min_taps=min_taps)
        return Step(number, made.arrays, (), "", made.ids, made.tasks, contents=made.contents)

    return lambda: made_ahead(batch, 0, -(-count // size))


def validation_sums(
    trainable: Flat, frozen: Flat, batch: Batch, budget: Budget, *, arch: Architecture, num_turns: int, dtype: str
) -> Float[Array, "5"]:
    """Sums over a batch: loss and number of target tokens, right and all turns, samples."""
    params = in_dtype(unflatten({**frozen, **trainable}), dtype)
    losses, correct, weights = answer_tokens(params, encode(params, batch, arch), batch, budget, arch)
    turns = batch["turn_index"]
    exists = jnp.any(turns[:, 1:, None] == jnp.arange(num_turns)[None, None], axis=1)
    right = turn_correct(correct, turns, num_turns) & exists
    samples = jnp.max(batch["text_segments"], axis=1)
    return jnp.stack([jnp.sum(x).astype(jnp.float32) for x in (losses, weights, right, exists, samples)])
