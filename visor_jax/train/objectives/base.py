"""What an objective is: a loss, the steps that feed it, and how a step's metrics are summed up.

A loss is a pure function (params, batch, budget) -> (loss, metrics). `metrics` is a dict of arrays that the loop writes
down: scalars as they are, "turn_correct" [B, turns] by task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Array, Float

from visor_jax.data.skips import SkipLog
from visor_jax.model.decoder import Budget
from visor_jax.model.layers import Params, in_dtype
from visor_jax.model.visor import Batch
from visor_jax.train.stage import Step

Metrics = dict[str, Array]
Loss = Callable[[Params, Batch, Budget], tuple[Float[Array, ""], Metrics]]


class Steps(Protocol):
    def __call__(self, done: int, total: int, position: Any = None, /) -> Iterator[Step]: ...


@dataclass(frozen=True)
class Objective:
    """What a stage minimizes and on what.

    Attributes:
      loss: (params, batch, budget) -> (loss, metrics).
      steps: (steps done, total, position in the data) -> the remaining steps; a position is what the last one of the
        steps done carried (`Step.position`), None where the number of steps is all.
      summarize: (step, metrics on the host) -> the row to write down beside step, loss and budget.
      skips: counts of skipped samples, which go on where a checkpoint left them; None where none are skipped.
    """

    loss: Loss
    steps: Steps
    summarize: Callable[[Step, Mapping[str, Any]], dict[str, Any]]
    skips: SkipLog | None = None


def computed_in(dtype: str, loss: Loss) -> Loss:
    """`loss` with activations of `dtype`: parameters are cast on their way in, and nowhere else."""
    return lambda params, batch, budget: loss(in_dtype(params, dtype), batch, budget)
