"""The interface of objectives: a loss, the steps that feed it, and a summary of each step's metrics.

A loss is a pure function (params, batch, budget) -> (loss, metrics). `metrics` is a dict of arrays, from which
`summarize` makes the row that the loop writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from visor_jax.architecture import Architecture
from visor_jax.data.anyres import taps
from visor_jax.data.row_shape import RowShape, batch_shapes
from visor_jax.data.scales import shapes_at_scales
from visor_jax.data.skips import SkipLog
from visor_jax.model.decoder import Budget
from visor_jax.model.layers import Params, in_dtype
from visor_jax.model.visor import Batch
from visor_jax.train.stage import Step

Metrics = dict[str, Shaped[Array, "..."]]
Loss = Callable[[Params, Batch, Budget], tuple[Float[Array, ""], Metrics]]


@runtime_checkable
class Steps(Protocol):
    """The remaining steps, from the steps done, the total and the position in the data."""

    def __call__(self, done: int, total: int, position: Any = None, /) -> Iterator[Step]: ...


@dataclass(frozen=True)
class Parts:
    """How the loss and the metrics of a batch follow from those of parts of its rows (`train.accumulate`).

    Attributes:
      weight: the metric that weighs a part's loss: what the loss is a mean over, such as the number of target tokens.
      rows: metrics with an entry for each row.
      means: metrics that are means over rows. All others are sums.
    """

    weight: str
    rows: tuple[str, ...] = ()
    means: tuple[str, ...] = ()


@dataclass(frozen=True)
class Objective:
    """The loss that a stage minimizes, and its data.

    Attributes:
      loss: (params, batch, budget) -> (loss, metrics).
      steps: (steps done, total, position) -> the remaining steps. `position` is the `Step.position` of the last step
        done; None if the number of steps suffices.
      summarize: (step, metrics on the host) -> the metrics row, without step, loss and budget.
      skips: counts of skipped samples, saved in checkpoints; None if the objective skips none.
      prepare: (frozen parameters by path, mesh) -> None, called once before the first step.
    """

    loss: Loss
    steps: Steps
    summarize: Callable[[Step, Mapping[str, Any]], dict[str, Any]]
    skips: SkipLog | None = None
    prepare: Callable[[Mapping[str, Any], Mesh], None] | None = None


def abstract_batch(
    num_rows: int,
    num_pools: int,
    row_shape: RowShape,
    arch: Architecture,
    *,
    independent_turns: bool = False,
    all_scales: bool = False,
) -> dict[str, Any]:
    """The shapes of a batch of pictures over all processes, for compilation without data."""
    scales = shapes_at_scales(row_shape.visual, arch) if all_scales else []
    shapes = batch_shapes(
        num_rows, num_pools, row_shape, taps(arch), arch, independent_turns=independent_turns, scales=scales
    )
    return {name: jax.ShapeDtypeStruct(*x) for name, x in shapes.items()}


def computed_in(dtype: str, loss: Loss) -> Loss:
    """`loss` with activations in `dtype`: casts the parameters before it calls `loss`."""
    return lambda params, batch, budget: loss(in_dtype(params, dtype), batch, budget)
