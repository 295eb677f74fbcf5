"""A profile of a few steps for XProf (`train.profile`): which, where, and with step numbers in the trace.

In: the window "START:STEPS" and a stage's folder. Out: `profile/plugins/profile/<time>/<host>.xplane.pb` there, which
XProf and TensorBoard's profile plugin open. Every process writes a trace of its own host.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from visor_jax.config.rules import parse_window
from visor_jax.errors import RequestError
from visor_jax.files.bucket import is_bucket

log = logging.getLogger(__name__)

STEP_NAME = "train"  # of the steps in the trace


class StepProfiler:
    """Traces the steps of a window; a context manager. Traces nothing for an empty window."""

    def __init__(self, window: str, folder: Path) -> None:
        """
        Args:
          window: "START:STEPS", or "" for none. A run that resumes after START writes no trace.
          folder: the stage's folder.

        Raises:
          RequestError: the folder is in a bucket, where the profiler cannot write.
        """
        self._first, count = parse_window(window) if window else (0, 0)
        self._last = self._first + count - 1
        self._folder = folder / "profile"
        self._window, self._on, self._done = window, False, 0
        if window and is_bucket(folder):
            raise RequestError(
                f"train.profile={window!r}: a bucket cannot hold the trace; expected '', or a local workdir"
            )

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
        if self._window and not self._done and kind is None:
            log.warning(
                "train.profile=%s wrote no profile: step %d was not among those that this run trained",
                self._window,
                self._first,
            )

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Annotates the dispatch of a step; the first one of the window starts the trace."""
        if number == self._first:
            jax.profiler.start_trace(self._folder)
            self._on = True
        if not self._on:
            yield
            return
        with jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=number):
            yield

    def dispatched(self, number: int, results: Any) -> None:
        """Ends the trace after the window's last step, as soon as its `results` are computed."""
        if self._on:
            self._done = number
        if self._on and number >= self._last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            log.info("the profile of steps %d to %d is in %s", self._first, max(self._done, self._first), self._folder)
