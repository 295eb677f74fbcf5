"""Objective "answer": next-token cross-entropy on the answers of conversations (every trained stage except policy)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture
from visor_jax.config import Config, architecture, stage_config
from visor_jax.data import collate
from visor_jax.data.collate import Example, RowShape, make_batch
from visor_jax.data.curriculum import phase_number
from visor_jax.data.from_config import (
    agreed_taps,
    make_tokenizer,
    sample_encoder,
    stage_parts,
    stage_phases,
    training_row_shape,
)
from visor_jax.data.packing import PoolShape
from visor_jax.data.pipeline import BatchIterator, ExampleStream, make_pipeline
from visor_jax.data.pools import PoolSettings, make_packed_pipeline
from visor_jax.data.sample import Part, Sample, Sheet
from visor_jax.data.skips import SkipLog
from visor_jax.errors import RunError
from visor_jax.model.decoder import Budget
from visor_jax.model.layers import Params
from visor_jax.model.likelihood import answer_tokens
from visor_jax.model.remat import Remat
from visor_jax.model.visor import Batch, encode
from visor_jax.scale.distributed import is_main
from visor_jax.train.objectives.base import Loss, Metrics, Objective, abstract_batch
from visor_jax.train.objectives.by_source import (
    TEXT_SOURCES,
    fields_by_source,
    num_sources,
    sums_by_source,
    with_sources,
)
from visor_jax.train.objectives.scales import fields_by_scale, tokens_at_scales
from visor_jax.train.stage import Step, budget_drawer, numbered, stage_seed
from visor_jax.workdir.folder import Workdir

TURNS_OF_SAMPLES = 16  # packed rows and sheets: the accuracy by task counts the turns of so many samples per row


def answer_objective(config: Config, stage: str, workdir: Workdir) -> Objective:
    """Next-token cross-entropy on the answers in the configured data source."""
    encode = sample_encoder(config, make_tokenizer(config), training_row_shape(config))
    budget_of = budget_drawer(config, stage, workdir)
    file = workdir.path / "data" / "skipped.jsonl"
    skips = SkipLog(file, config.data.max_skipped_fraction) if is_main() else SkipLog()  # process 0 counts for all

    settings, arch = stage_config(config, stage), architecture(config, stage)
    names: list[str] = []  # of the sources, known once they are open

    def steps(done: int, total: int, position: Any = None) -> Iterator[Step]:
        parts = stage_parts(config, stage)
        names[:] = [part.source.name for part in parts]
        batches = stage_batches(config, stage, encode, skips, done, position, parts)
        return with_sources(numbered(batches, done, total, budget_of, skips), names)

    def summarize(step: Step, metrics: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {f"accuracy/{k}": v for k, v in by_task(metrics["turn_correct"], step.tasks).items()}
        row |= fields_by_source(names, metrics) | fields_by_scale(arch, metrics)
        if phase := phase_number(settings, step.number):
            row["phase"] = phase
        row["target_tokens"] = int(metrics["target_tokens"])
        row["samples"] = int(metrics["samples"])
        row["skipped"] = dict(step.skipped)
        return row

    return Objective(answer_loss_of(config, stage, num_sources(config)), steps, summarize, skips)


def answer_loss_of(config: Config, stage: str, num_sources: int = 1) -> Loss:
    """The loss of a stage, from its configuration alone; `num_sources` only matters with `text_sources` in a batch."""
    num_turns = turns_per_row(config, packed=bool(config.data.pack_window))
    arch, settings = architecture(config, stage).in_training, stage_config(config, stage)
    remat, tower = cast(Remat, settings.remat), cast(Remat, settings.tower_remat or settings.remat)
    return partial(answer_loss, arch=arch, num_turns=num_turns, num_sources=num_sources, remat=remat, tower_remat=tower)


def turns_per_row(config: Config, *, packed: bool) -> int:
    """Returns how many turns of a row count in accuracies: those of one sample, or of several in a row."""
    several = packed or config.data.small_pictures
    return config.data.turns_per_picture * (TURNS_OF_SAMPLES if several else 1)


def abstract_answers(config: Config, stage: str) -> tuple[Loss, dict[str, Any]]:
    """The loss of a stage and the shapes of its batches of pictures."""
    data, num_rows, arch = config.data, stage_config(config, stage).batch_size, architecture(config, stage)
    row_shape = training_row_shape(config)
    if data.pack_window:
        row_shape = PoolShape(data.pool_rows, data.pool_tiles, data.visual_length, data.text_length).largest
    num_pools = num_rows // data.pool_rows if data.pack_window else num_rows
    arrays = abstract_batch(
        num_rows, num_pools, row_shape, arch, independent_turns=data.independent_turns, all_scales=True
    )
    return answer_loss_of(config, stage), arrays


def stage_batches(
    config: Config,
    stage: str,
    encode: Callable[[Sample | Sheet], Example],
    skips: SkipLog,
    done: int = 0,
    position: Any = None,
    parts: Sequence[Part] | None = None,
) -> BatchIterator[collate.Batch]:
    """The stage's batches after step `done`, which was saved with `position`; packed if `data.pack_window` says so.

    `parts` are those of the stage if they are open already.
    """
    arch, num_rows = architecture(config, stage), stage_config(config, stage).batch_size
    parts = parts or stage_parts(config, stage)
    seed, phases = stage_seed(config.seed, stage), stage_phases(config, stage, parts)
    stream = ExampleStream(parts, encode, seed, phases)
    if config.data.pack_window:
        return packed_batches(config, num_rows, stream, arch, skips, done, position)
    return make_pipeline(
        stream,
        partial(
            one_per_row,
            training_row_shape(config),
            arch,
            agreed_taps(config, jax.process_count()),
            independent_turns=config.data.independent_turns,
        ),
        batch_size=num_rows,
        start_step=done,
        skips=skips,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
    )


def one_per_row(
    row_shape: RowShape, arch: Architecture, min_taps: int, examples: Sequence[Example], *, independent_turns: bool
) -> collate.Batch:
    """A batch with one sample or sheet in each row."""
    rows = [[example] for example in examples]
    return make_batch(rows, row_shape, arch, min_taps=min_taps, independent_turns=independent_turns, all_scales=True)


def packed_batches(
    config: Config,
    num_rows: int,
    stream: ExampleStream[Example],
    arch: Architecture,
    skips: SkipLog,
    done: int,
    position: Any,
) -> BatchIterator[collate.Batch]:
    """Batches with several samples in each row, from the position that step `done` was saved with.

    Raises:
      RunError: steps were done and no position was saved with them.
    """
    if done and position is None:
        raise RunError(
            f"the checkpoint of step {done} was saved without data.pack_window, so it does not say where packed data"
            " continues; start another workdir, or set data.pack_window=0"
        )
    data = config.data
    min_taps = agreed_taps(config, jax.process_count())
    shape = PoolShape(rows=data.pool_rows, tiles=data.pool_tiles, visual=data.visual_length, text=data.text_length)
    return make_packed_pipeline(
        stream,
        arch,
        PoolSettings(
            shape, num_rows // data.pool_rows, data.pack_window, data.workers, min_taps, data.independent_turns
        ),
        position=position,
        skips=skips,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def answer_loss(
    params: Params,
    batch: Batch,
    budget: Budget,
    arch: Architecture,
    *,
    num_turns: int,
    num_sources: int = 1,
    remat: Remat,
    tower_remat: Remat,
) -> tuple[Float[Array, ""], Metrics]:
    """Mean cross-entropy over the target tokens of the batch, and over all scales of "m3"."""
    by_scale: list[Array] = []
    if arch.other_scales:
        by_scale, correct, weights = tokens_at_scales(params, batch, budget, arch, remat=remat, tower_remat=tower_remat)
        losses = jnp.mean(jnp.stack(by_scale), axis=0)
    else:
        visual = encode(params, batch, arch, remat=tower_remat)
        losses, correct, weights = answer_tokens(params, visual, batch, budget, arch, remat=remat)
    tokens = jnp.sum(weights)
    metrics = {"turn_correct": turn_correct(correct, batch["turn_index"], num_turns), "target_tokens": tokens}
    metrics["samples"] = jnp.sum(jnp.max(batch["text_segments"], axis=1))
    if by_scale:
        metrics["scale_sums"] = jnp.stack([jnp.sum(of_scale) for of_scale in by_scale])
    if TEXT_SOURCES in batch:
        metrics["source_sums"] = sums_by_source(losses, weights, batch[TEXT_SOURCES][:, 1:], num_sources)
    return jnp.sum(losses) / jnp.maximum(tokens, 1.0), metrics


def turn_correct(correct: Bool[Array, "B T"], turn_index: Int[Array, "B Nt"], num_turns: int) -> Bool[Array, "B turns"]:
    """Whether every target token of a turn was predicted; True for turns that a row does not have."""
    turn = turn_index[:, 1:, None] == jnp.arange(num_turns)[None, None]
    return jnp.all(correct[..., None] | ~turn, axis=1)


def by_task(turn_correct: Bool[np.ndarray, "B turns"], tasks: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy of each task in a batch, from [rows, turns] and the tasks of each row's turns.

    Turns past the last column do not count here; the loss includes them.
    """
    correct: dict[str, list[bool]] = {}
    for row, names in enumerate(tasks):
        for turn, name in enumerate(names[: turn_correct.shape[1]]):
            correct.setdefault(name or "all", []).append(bool(turn_correct[row, turn]))
    return {name: float(np.mean(values)) for name, values in sorted(correct.items())}
