"""The training loop: one stage from its first (or last saved) step to its end, read from top to bottom.

In: a validated config, a stage name, a workdir. Out: `WORKDIR/<stage>/` with checkpoints, `metrics.jsonl`, TensorBoard
events and, once every step is done, `complete.json`. Stages differ only in configuration and in their `Objective`
(`visor_jax.train.stage`). The loop runs under a mesh whatever the number of devices.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from visor_jax.checkpoint.manager import Checkpoints
from visor_jax.checkpoint.restoring import EMA, WEIGHTS
from visor_jax.config import Config, ConfigLike, TrainConfig, architecture, as_config, stage_config
from visor_jax.config.shipped import checkpoint_folder
from visor_jax.errors import STOPPED, RunError
from visor_jax.hf.origin import origin_of
from visor_jax.scale.distributed import is_main, once
from visor_jax.scale.gather import merged
from visor_jax.scale.mesh import check_rows, configured_mesh
from visor_jax.scale.sharding import place_batch, place_whole
from visor_jax.train.faults import BadSteps
from visor_jax.train.guards import check_aliased, check_donated, check_sharded, dispatching
from visor_jax.train.metrics import MetricsWriter, NoMetrics, StageProgress
from visor_jax.train.objectives import make_objective
from visor_jax.train.objectives.base import Metrics, Objective
from visor_jax.train.observer import Observer
from visor_jax.train.optimizer import (
    build_optimizer,
    learning_rates,
)
from visor_jax.train.profile import StepProfiler
from visor_jax.train.stage import Step, of_all_processes
from visor_jax.train.state import abstract_state, initial_state, restore, state_places
from visor_jax.train.step_cost import StepCost
from visor_jax.train.update import State, Update, jitted_update
from visor_jax.train.validation import Validation, make_validation
from visor_jax.train.wandb_run import require_wandb, wandb_run
from visor_jax.tree import unflatten
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.goodput import Goodput
from visor_jax.workdir.metrics_log import read_rows
from visor_jax.workdir.supervision import Stop, beat, supervised, watched

log = logging.getLogger(__name__)


Pending = tuple[Step, Metrics, float]  # a dispatched step, its metrics on the device, when it began


def train(config: ConfigLike, stage: str, workdir: Workdir) -> None:
    """Runs `stage` to its end; returns at once if it is complete.

    Raises:
      SystemExit: with status 143 after SIGTERM, the state saved or the stage complete.
      RunError: the run cannot continue (bad steps in a row, too many skipped samples, saves that fail).
    """
    config = as_config(config)
    if once(lambda: workdir.stage(stage).is_complete()):
        return
    with (
        supervised() as stop,
        stop.until_complete(stage),
        watched(stage_config(config, stage).hang_seconds),
        jax.numpy_rank_promotion("raise"),
    ):
        train_stage(config, stage, workdir, stop)


def train_stage(config: Config, stage: str, workdir: Workdir, stop: Stop) -> None:
    """Trains a stage; `train` has installed the signal handlers and the watchdog."""
    # --- mesh, objective ----------------------------------------------------------------------------------------------
    require_wandb(config, stage)
    settings, arch, folder = stage_config(config, stage), architecture(config, stage), workdir.stage(stage)
    goodput = Goodput(workdir.path / "goodput.json", written=is_main())
    mesh = configured_mesh(config)
    packed = config.data.pack_window > 0 and settings.objective == "answer"
    pool_rows = config.data.pool_rows if packed else 1
    check_rows(f"batch_size of stage {stage!r}", settings.batch_size, mesh, pool_rows, settings.accumulate)
    objective = make_objective(config, stage, workdir)

    # --- parameters and optimizer, in their shardings -----------------------------------------------------------------
    with goodput.time("init"):
        tx = build_optimizer(settings)
        shapes = abstract_state(arch, settings, tx)
        check_sharded(shapes, state_places(shapes, mesh), mesh, config.mesh.max_unsharded)
        state, shardings = initial_state(config, stage, arch, tx, mesh, workdir)
    validation = make_validation(config, stage, workdir, mesh, shardings)
    update = jitted_update(config.model.dtype, settings, objective.loss, tx, shardings, mesh)
    beat()

    # --- restore ------------------------------------------------------------------------------------------------------
    identity = workdir.identity(config, stage)
    bad_steps = BadSteps(settings.max_bad_steps)
    saving = Checkpoints(folder.path / "checkpoints", identity=identity, keep=settings.keep)
    with saving as checkpoints, wandb_run(config, stage, workdir.path) as log_row:
        start, position = 0, None
        if (latest := checkpoints.latest()) is not None:
            with goodput.time("restore"):
                state, start = restore(checkpoints, latest, state, shardings)
            meta = checkpoints.meta(latest)
            restore_counts(meta, objective, bad_steps)
            position = meta.get("data")
            log.info("%s: resumed after step %d", stage, start)
        if objective.prepare is not None:
            with goodput.time("prepare"):
                objective.prepare(state.frozen, mesh)
        observer = Observer(StepCost.of(arch, state, settings.objective), mesh, goodput)
        run = Run(
            stage, update, objective, settings, checkpoints, folder.path, goodput, mesh, bad_steps, stop,
            observer, validation, log_row,
        )  # fmt: skip
        last = run_steps(run, state, start, position)

    # --- done ---------------------------------------------------------------------------------------------------------
    goodput.write()
    fault_point("complete", last)
    checkpoint = checkpoint_folder(settings.init_from)
    once(lambda: folder.mark_complete({"step": last, **({"origin": origin_of(checkpoint)} if checkpoint else {})}))


@dataclass(frozen=True)
class Run:
    """Everything that does not change over a stage's steps."""

    stage: str
    update: Update
    objective: Objective
    settings: TrainConfig
    checkpoints: Checkpoints
    folder: Path
    goodput: Goodput
    mesh: Mesh
    bad_steps: BadSteps
    stop: Stop
    observer: Observer
    validation: Validation | None
    log_row: Callable[[Mapping[str, Any]], None]  # to other places than the workdir


def run_steps(run: Run, state: State, start: int, position: Any = None) -> int:
    """Runs the steps after `start`, saves the last one and returns its number.

    `position` is the `Step.position` that step `start` was saved with.

    The metrics of a step are read after the next one has been dispatched, so that the host does not wait for them.
    Nothing is saved while steps are not finite, so that a restarted run repeats them.

    Raises:
      SystemExit: 143 after SIGTERM, the state saved.
      RunError: too many bad steps, or the last ones were bad.
    """
    settings, goodput, rates = run.settings, run.goodput, learning_rates(run.settings)
    writer = MetricsWriter(run.folder, first_step=start + 1) if is_main() else NoMetrics()
    goodput.add("lost", writer.lost_seconds)
    if is_main():
        run.observer.resume(read_rows(run.folder / "metrics.jsonl"))
    pending: Pending | None = None
    compiled = False
    profiler = StepProfiler(settings.profile, run.folder)
    with writer, profiler, StageProgress(run.stage, settings.steps, start, enabled=is_main()) as progress:
        steps = of_all_processes(run.objective.steps(start, settings.steps, position), run.objective.skips)
        for step in goodput.waits("data_wait", steps):
            fault_point("step", step.number)
            began = time.perf_counter()
            with goodput.time("step" if compiled else "compile"), profiler.step(step.number):
                state, metrics = dispatch(run, step, state, rates[step.number - 1], first=not compiled)
                run.stop.hold()
                if pending is not None:
                    record(pending, run, writer, progress)
                pending, compiled = (step, metrics, began), True
            profiler.dispatched(step.number, metrics)
            beat()
            if run.validation is not None and run.validation.is_due(step.number, settings.steps):
                with goodput.time("step"):
                    record(pending, run, writer, progress, state)
                pending = None
            fault_point("dispatched", step.number)
            stopping = run.stop.should_stop()
            last = stopping or step.number == settings.steps
            if last or step.number % settings.checkpoint_every == 0 or run.checkpoints.poll():
                if pending is not None:
                    record(pending, run, writer, progress)
                pending = None
                if not run.bad_steps.in_row:
                    with goodput.time("save"):
                        save(run, step, state, writer, wait=last)
                    keep_seconds(goodput)
            if stopping and step.number < settings.steps:
                leave(run, step.number)
    run.bad_steps.check_ended_well(run.stage, settings.steps)
    return settings.steps


def dispatch(run: Run, step: Step, state: State, rate: np.floating[Any], *, first: bool) -> tuple[State, Metrics]:
    """Starts a step on the devices; the first one also shows that the state is not copied, before and after it runs."""
    batch = place_batch(step.arrays, run.mesh)
    budget, learning_rate = place_whole((np.asarray(step.budget, bool), rate), run.mesh)
    with dispatching(run.mesh):
        if first:
            check_aliased(run.update.lower(state, batch, budget, learning_rate).compile(), state)
        after, metrics = run.update(state, batch, budget, learning_rate)
    if first:
        check_donated(state)
    return after, metrics


def leave(run: Run, step: int) -> NoReturn:
    """Writes the goodput and ends the process after SIGTERM.

    Raises:
      SystemExit: with status 143.
    """
    run.goodput.write()
    saved = "not saved, because it was not finite; the last checkpoint counts" if run.bad_steps.in_row else "saved"
    log.warning("%s: stopped by SIGTERM after step %d; %s", run.stage, step, saved)
    sys.exit(STOPPED)


def save(run: Run, step: Step, state: State, writer: MetricsWriter | NoMetrics, *, wait: bool) -> None:
    """Saves the parameters as one nested dict, the optimizer state, and the moving average if there is one.

    The data position is `step.position`, or the step number if that is None. The metadata also holds the counts of bad
    steps and of skipped samples, so that a resumed run continues them.
    """
    writer.flush()
    arrays = {"params": unflatten({**state.trainable, **state.frozen}), "opt_state": state.opt_state}
    if state.ema:
        arrays[EMA] = unflatten(state.ema)
    meta: dict[str, Any] = {"step": step.number, "bad_steps": run.bad_steps.state()}
    if run.settings.use_ema:
        meta[WEIGHTS] = EMA
    if step.position is not None:
        meta["data"] = merged(step.position)
    if run.objective.skips is not None:
        run.objective.skips.flush()
        meta["skips"] = run.objective.skips.state()
    run.checkpoints.save(step.number, arrays, meta=meta, wait=wait)
    beat()


def keep_seconds(goodput: Goodput) -> None:
    """Writes the goodput so far, so that a kill loses only the seconds since the last save.

    Where that fails, training goes on: the save itself reports a full disk, and is repeated.
    """
    try:
        goodput.write()
    except (OSError, RunError) as error:
        log.warning("goodput.json cannot be written now: %s", error)


def restore_counts(meta: Mapping[str, Any], objective: Objective, bad_steps: BadSteps) -> None:
    """Restores the counts that were saved with a step; checkpoints of earlier versions have none."""
    bad_steps.restore(meta.get("bad_steps"))
    if objective.skips is not None:
        objective.skips.restore(meta.get("skips"))


def record(
    pending: Pending,
    run: Run,
    writer: MetricsWriter | NoMetrics,
    progress: StageProgress,
    state: State | None = None,
) -> None:
    """Writes a step's metrics. Called once the next step has been dispatched, so that the device stays busy.

    `state`: the state after the step if it is validated.
    """
    step, metrics, began = pending
    values = jax.device_get(metrics)
    summary = run.objective.summarize(step, values) if is_main() else {}
    seconds = time.perf_counter() - max(began, writer.written_at)  # the step may have waited for the one before
    loss, finite = float(values["loss"]), bool(values["finite"])
    validated: dict[str, Any] = {}
    if state is not None and run.validation is not None:
        with run.goodput.time("validate"):
            validated = run.validation.fields(state)
    if not is_main():
        run.bad_steps.observe(step.number, finite, step.ids)
        return
    row = {"step": step.number, "loss": loss, "budget": step.budget_name, **summary}
    row |= {name: float(values[name]) for name in ("gradient_norm", "learning_rate")}
    row["sample_ids_sha256"] = ids_digest(step.ids)
    row["bad_steps"] = run.bad_steps.total + (not finite)
    row |= {"seconds": seconds, **run.observer.fields(step, loss, seconds), **validated}
    writer.write(row)
    run.log_row(row)
    progress.update(step.number, row)
    run.bad_steps.observe(step.number, finite, step.ids)


def ids_digest(ids: Sequence[str]) -> str:
    """The first 16 hex digits of a sha256 of a step's sample ids in their order, to compare the data of two runs."""
    return hashlib.sha256("\0".join(ids).encode("utf-8", "backslashreplace")).hexdigest()[:16]
