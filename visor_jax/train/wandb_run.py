"""Weights & Biases as a second place for a stage's metrics (`train.wandb_project`; the extra `wandb`).

In: the configuration, then metrics rows. Out: one W&B run per workdir and stage, which a resumed stage continues. The
API key comes from the environment (`WANDB_API_KEY`, or the login that `wandb` has stored), never from a configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from visor_jax.config import Config, stage_config
from visor_jax.errors import RequestError, one_line
from visor_jax.files.bucket import is_bucket
from visor_jax.train.metrics import numbers_of
from visor_jax.workdir.provenance import plain

EXTRA = "pip install 'visor_jax[wandb]'"
Write = Callable[[Mapping[str, Any]], None]


def require_wandb(config: Config, stage: str) -> None:
    """Checks that the package is there if a stage needs it.

    Raises:
      RequestError: it is not installed.
    """
    project = stage_config(config, stage).wandb_project
    if project and importlib.util.find_spec("wandb") is None:
        raise RequestError(
            f"train.wandb_project={project!r}: the package wandb is not installed; expected '', or {EXTRA}"
        )


@contextlib.contextmanager
def wandb_run(config: Config, stage: str, workdir: Path) -> Iterator[Write]:
    """Yields a function that logs a metrics row; it does nothing without `train.wandb_project`, or not in process 0.

    Raises:
      RequestError: the package is not installed, or W&B cannot start the run.
    """
    require_wandb(config, stage)
    project = stage_config(config, stage).wandb_project
    if not project or jax.process_index() != 0:
        yield lambda row: None
        return
    wandb: Any = importlib.import_module("wandb")
    place = str(workdir if is_bucket(workdir) else workdir.absolute())
    run_id = f"{stage}-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
    folder = None if is_bucket(workdir) or "WANDB_DIR" in os.environ else str(workdir / stage)
    try:
        run = wandb.init(
            project=project,
            name=f"{config.name}/{stage}",
            group=config.name,
            id=run_id,
            resume="allow",
            config=plain(config),
            dir=folder,
        )
    except Exception as error:
        raise RequestError(
            f"train.wandb_project={project!r}: W&B does not start: {one_line(str(error))}; set WANDB_API_KEY, or"
            " WANDB_MODE=offline"
        ) from error
    status = 1
    try:
        yield lambda row: run.log(numbers_of(row), step=row["step"])
        status = 0
    finally:
        run.finish(exit_code=status)
