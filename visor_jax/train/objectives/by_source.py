"""The loss of each source of a mixture, summed on the devices.

In: the names of the sources, and the source of every text token as an array of the batch. Out: `loss/source=NAME`
fields, each the mean over the target tokens of that source in the step. Sums are global, so that one process can write
them for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from visor_jax.config import Config
from visor_jax.config.mixture import is_mixture
from visor_jax.data.collate import Content
from visor_jax.data.mixture import mixture_of
from visor_jax.train.stage import Step

TEXT_SOURCES = "text_sources"  # array of the batch: int32 [B, Nt], -1 at padding
ROW_SOURCES = "row_sources"  # of batches with one question in each row: int32 [B]


def num_sources(config: Config) -> int:
    """Returns the number of sources that a stage trains on."""
    return len(mixture_of(config)[0].entries) if is_mixture(dataclasses.asdict(config.data)) else 1


def with_sources(steps: Iterable[Step], names: Iterable[str]) -> Iterator[Step]:
    """Yields the steps with `text_sources`, indices into `names`; unchanged if there is only one name."""
    index = {name: place for place, name in enumerate(dict.fromkeys(names))}
    for step in steps:
        if len(index) > 1:
            segments = step.arrays["text_segments"]
            rows = [_of_segments(row, [index[x.source] for x in held]) for row, held in _pairs(segments, step)]
            step = dataclasses.replace(step, arrays={**step.arrays, TEXT_SOURCES: np.stack(rows)})
        yield step


def sources_of_rows(contents: Sequence[Sequence[Content]], names: Iterable[str]) -> dict[str, Int[np.ndarray, " B"]]:
    """Returns `row_sources`: for the one sample of each row an index into `names`; nothing if there is only one."""
    index = {name: place for place, name in enumerate(dict.fromkeys(names))}
    if len(index) <= 1:
        return {}
    return {ROW_SOURCES: np.array([index[row[0].source] for row in contents], np.int32)}


def _pairs(segments: Int[np.ndarray, "B Nt"], step: Step) -> Iterable[tuple[Any, Any]]:
    return zip(segments, step.contents, strict=True)


def _of_segments(segments: Int[np.ndarray, " Nt"], sources: list[int]) -> Int[np.ndarray, " Nt"]:
    return np.array([-1, *sources], np.int32)[segments]


def sums_by_source(
    losses: Float[Array, "B T"], weights: Float[Array, "B T"], sources: Int[Array, "B T"], size: int
) -> Float[Array, "size 2"]:
    """Returns sums of the weighted losses and of the weights of the targets of each source."""
    of_source = sources[..., None] == jnp.arange(size)[None, None]
    both = jnp.stack([losses, weights], axis=-1)
    return jnp.sum(jnp.where(of_source[..., None], both[:, :, None], 0.0), axis=(0, 1))


def fields_by_source(names: Iterable[str], metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns `loss/source=NAME` of the sources in the step, from the metrics of a step on the host."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) == 1:
        return {f"loss/source={distinct[0]}": float(metrics["loss"])}
    sums = np.asarray(metrics["source_sums"], np.float64)
    return {f"loss/source={name}": float(loss / n) for name, (loss, n) in zip(distinct, sums, strict=False) if n > 0}
