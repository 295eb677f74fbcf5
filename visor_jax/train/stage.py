"""The steps of a trained stage: rows, budget and random numbers of each, all pure functions of (seed, stage, step).

A resumed stage therefore sees the same steps as an uninterrupted one. In: a configuration and a stage. Out: `Step`s,
prepared ahead of the device. The losses are in `visor_jax.train.objectives`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Shaped

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, Budget, budget_name
from visor_jax.config import Config, TrainConfig, architecture, stage_config
from visor_jax.config.rules import DRAWN_BUDGETS
from visor_jax.config.schema import STAGE_NUMBERS
from visor_jax.data.collate import Batch, Content
from visor_jax.data.draws import seed_sequence
from visor_jax.data.pipeline import BatchIterator
from visor_jax.data.skips import SkipLog, Tally
from visor_jax.scale.distributed import Reports, several
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import read_viable

_STAGES_PER_BLOCK = 8  # the first eight stages share a block of seeds, and each further eight have one above it


@dataclass(frozen=True)
class Step:
    """One optimizer step's input. `number` counts from 1; `arrays` are this process's rows."""

    number: int
    arrays: dict[str, Shaped[np.ndarray, "..."]]
    budget: Bits
    budget_name: str
    ids: list[str]
    tasks: list[list[str]]
    skipped: Mapping[str, int] = field(default_factory=dict)  # counts by source and reason, including this step
    tally: Tally | None = None  # what was tried for this process's rows
    position: Any = None  # where the data continues after this step; None if the step number says it
    contents: Sequence[Sequence[Content]] = ()  # the samples of this process's rows


# --- budgets ----------------------------------------------------------------------------------------------------------


def budget_drawer(config: Config, stage: str, workdir: Workdir) -> Callable[[int], Bits]:
    """The budget of each step: a pure function of (seed, stage, step)."""
    arch, kind = architecture(config, stage), stage_config(config, stage).budgets
    if (fixed := fixed_budget(stage_config(config, stage), arch)) is not None:
        return lambda step: fixed
    if kind == "viable":
        choices = read_viable(workdir, arch.num_slots)
    else:  # "subsets": every non-empty subset of the slots
        choices = [bits for bits in np.ndindex(*(2,) * arch.num_slots) if any(bits)]
    return partial(draw, [tuple(bool(b) for b in bits) for bits in choices], config.seed, stage)


def fixed_budget(settings: TrainConfig, arch: Architecture) -> Bits | None:
    """Returns the budget of every step; None if each step draws its own.

    Raises:
      RequestError: it has another number of bits than the model has slots.
    """
    if settings.budgets in DRAWN_BUDGETS:
        return None
    return Budget.parse(settings.budgets).resolve(arch.num_slots)


def draw(choices: Sequence[Bits], seed: int, stage: str, step: int) -> Bits:
    """One of `choices`, all equally likely."""
    entropy = seed_sequence("budget", stage_seed(seed, stage), step).generate_state(1, np.uint64)
    return choices[int(entropy[0]) % len(choices)]


def stage_seed(seed: int, stage: str) -> int:
    """A number unique to (seed, stage), so that stages draw independently of each other."""
    block, number = divmod(STAGE_NUMBERS[stage], _STAGES_PER_BLOCK)
    return block * 2**40 + seed * _STAGES_PER_BLOCK + number


def numbered(
    pipeline: BatchIterator[Batch], done: int, total: int, budget_of: Callable[[int], Bits], skips: SkipLog
) -> Iterator[Step]:
    """Steps done + 1 .. total from a pipeline that starts at step done + 1; closes it at the end."""
    with pipeline:
        for number in range(done + 1, total + 1):
            batch = next(pipeline)
            bits = budget_of(number)
            skipped, position = skips.by_reason(), pipeline.position()
            names = budget_name(bits), batch.ids, batch.tasks
            yield Step(number, batch.arrays, bits, *names, skipped, pipeline.tally, position, batch.contents)


def of_all_processes(steps: Iterator[Step], skips: SkipLog | None) -> Iterator[Step]:
    """The same steps; in process 0 with what the rows of all processes contain, in their order."""
    reports = Reports("steps")
    for step in steps:
        if several():
            mine = {"ids": step.ids, "tasks": step.tasks, "contents": step.contents}
            step = _joined(step, reports.exchange(step.number, {**mine, "tally": _report(step.tally)}), skips)
        yield step


def _report(tally: Tally | None) -> dict[str, Any] | None:
    return None if tally is None else tally.report()


def _joined(step: Step, reports: Sequence[Mapping[str, Any]], skips: SkipLog | None) -> Step:
    """The step with what all `reports` say, the first of which is its own."""
    for process, other in enumerate(reports[1:], start=1):
        if skips is not None and other["tally"]:
            skips.use(Tally.of_report(other["tally"]), f" in process {process}")
    ids, tasks, contents = ([x for part in reports for x in part[name]] for name in ("ids", "tasks", "contents"))
    rows = [[Content(*sample) for sample in row] for row in contents]
    skipped = step.skipped if skips is None else skips.by_reason()
    return dataclasses.replace(step, ids=ids, tasks=tasks, contents=rows, skipped=skipped)


def made_ahead(
    make: Callable[[int], Step], done: int, total: int, position: None = None, /, *, threads: int = 1
) -> Iterator[Step]:
    """Steps done + 1 .. total in order. Prepares the next two, or `threads`, while the device runs one."""
    numbers = grain.MapDataset.range(done + 1, total + 1).map(make)
    ahead = iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2))))
    try:
        yield from ahead
    finally:
        ahead.close()


def process_rows(rows: int) -> range:
    """The rows of every batch that this process prepares."""
    local = rows // jax.process_count()
    return range(jax.process_index() * local, (jax.process_index() + 1) * local)
