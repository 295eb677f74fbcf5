"""Timing harness of all benchmarks: warm-up, interleaved rounds, quartiles, JSON reports.

All contenders run once per round, in random order, so that a change of the machine's load affects them equally; ratios
are taken within a round. Importing this file does not import JAX.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visor_jax.files.read_write import write_json

RESULTS = Path(__file__).resolve().parent / "results"
Run = Callable[[], Any]
Measure = Callable[[], float]  # runs something and returns its seconds


def seconds(run: Run) -> float:
    """Returns the seconds of one call, until the arrays that it returns are computed."""
    began = time.perf_counter()
    wait(run())
    return time.perf_counter() - began


def wait(result: Any) -> None:
    """Waits until JAX has computed the arrays of `result`, if JAX is imported."""
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(result)


def timed(run: Run, *, settle: bool = False) -> Measure:
    """Returns a measure of one run. With `settle` it runs twice and the second run counts.

    The second run does not include the cost of memory that the previous contender freed.
    """

    def measure() -> float:
        if settle:
            wait(run())
        return seconds(run)

    return measure


def interleaved(
    measures: Mapping[str, Measure], rounds: int, *, progress: Callable[[int], None] | None = None
) -> dict[str, np.ndarray]:
    """Returns the seconds of every contender in every round, float64 [rounds], after a warm-up that does not count.

    Args:
      measures: name -> measure, in the order of the warm-up.
      rounds: number of rounds that count.
      progress: called with the number of each finished round, from 1.
    """
    for measure in measures.values():
        measure()
    times = {name: np.zeros(rounds) for name in measures}
    order = random.Random(0)
    for index in range(rounds):
        for name in order.sample(list(measures), len(measures)):
            times[name][index] = measures[name]()
        if progress is not None:
            progress(index + 1)
    return times


def quartiles(values: np.ndarray | Sequence[float], percents: Sequence[float] = (25, 50, 75)) -> list[float]:
    """Returns [lower quartile, median, upper quartile], or other percentiles."""
    return np.percentile(np.asarray(values), percents).tolist()


def device_facts() -> dict[str, str]:
    """Returns the device and the version of JAX of the results."""
    import jax

    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def arguments_of(args: Any) -> dict[str, Any]:
    """Returns the command line's arguments for a report, without the output file."""
    return {name: value for name, value in vars(args).items() if name != "out"}


def save(report: Mapping[str, Any], path: Path) -> None:
    """Writes a report as JSON."""
    write_json(path, report)
