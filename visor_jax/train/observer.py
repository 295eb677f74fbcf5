"""The fields of a metrics row that describe the run and not the model: throughput, waiting, memory, running losses.

In: each step's contents, and the seconds it took. Out: fields by name; `docs/metrics.md` lists them with their units.
Nothing here waits for the devices.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from visor_jax.scale.peaks import peak_flops
from visor_jax.train.stage import Step
from visor_jax.train.step_cost import StepCost, Work
from visor_jax.workdir.goodput import Goodput

# Fields that differ between two runs of the same steps.
MEASURED = (
    "seconds",
    "samples_per_second",
    "tokens_per_second",
    "visual_tokens_per_second",
    "tiles_per_second",
    "mfu",
    "data_wait_share",
    "goodput",
    "peak_memory_bytes",
    "host_peak_memory_bytes",
)
WINDOW = 100  # steps over which the running losses are averaged


class RunningLosses:
    """Means of the losses of the last `WINDOW` steps, by budget."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        """
        Args:
          rows: the metrics rows of the steps so far, so that a resumed run writes the same means.
        """
        self._last: deque[tuple[str, float]] = deque(maxlen=WINDOW)
        for row in rows:
            self._last.append((row.get("budget") or "", _number(row.get("loss"))))

    def add(self, budget: str, loss: float) -> dict[str, float]:
        """Adds a step; returns the mean of its budget as a field. Losses that are not finite do not count."""
        self._last.append((budget, loss))
        losses = [value for name, value in self._last if name == budget and math.isfinite(value)]
        return {f"loss/budget={budget}": math.fsum(losses) / len(losses)} if losses else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


class Observer:
    """Describes the steps of one stage."""

    def __init__(self, cost: StepCost, mesh: Mesh, goodput: Goodput) -> None:
        self._cost, self._mesh, self._goodput = cost, mesh, goodput
        self._losses = RunningLosses()
        self._peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._written_at, self._waited = time.perf_counter(), goodput.seconds.get("data_wait", 0.0)

    def resume(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes the rows of the steps that an earlier run has written."""
        self._losses = RunningLosses(rows)

    def fields(self, step: Step, loss: float, seconds: float) -> dict[str, Any]:
        """Returns the fields of a step of all processes that took `seconds`."""
        row: dict[str, Any] = self._losses.add(step.budget_name, loss)
        total = self._cost.work(step.contents, step.budget)
        if total.samples:
            row |= self._rates(total, max(seconds, 1e-9))
        return {**row, **self._waiting(), **peak_memory()}

    def _rates(self, work: Work, seconds: float) -> dict[str, float]:
        rates = {
            "samples_per_second": work.samples / seconds,
            "tokens_per_second": (work.text_tokens + work.visual_tokens) / seconds,
            "visual_tokens_per_second": work.visual_tokens / seconds,
            "tiles_per_second": work.tiles / seconds,
        }
        if self._peak is not None and work.teraflops:
            rates["mfu"] = work.teraflops * 1e12 / (seconds * self._peak * self._mesh.size)
        return rates

    def _waiting(self) -> dict[str, float]:
        """Returns the share of the time since the last row that the loop waited for data, and the goodput."""
        now, seconds = time.perf_counter(), self._goodput.seconds
        passed, waited = now - self._written_at, seconds.get("data_wait", 0.0) - self._waited
        self._written_at, self._waited = now, seconds.get("data_wait", 0.0)
        share = min(waited / passed, 1.0) if passed > 0 else 0.0
        return {"data_wait_share": share, "goodput": self._goodput.share("step")}


def peak_memory() -> dict[str, int]:
    """Returns the peak bytes in use of the fullest local device, or the process's peak resident bytes on the host.

    The host's bytes are given where the devices do not count theirs, as CPUs.
    """
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(used):
        return {"peak_memory_bytes": max(used)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"host_peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
