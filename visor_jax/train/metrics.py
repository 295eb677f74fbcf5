"""A stage's output while it trains: `metrics.jsonl`, TensorBoard scalars, a progress bar.

`metrics.jsonl` is the record: one JSON object per step, each step exactly once, also after a kill and a resume. Every
line reaches the operating system in one write as soon as the step is known, so that killing the process loses at most a
step that no checkpoint holds either; `flush` puts the lines on the disk and is called before each checkpoint. In a
bucket, `flush` replaces the whole object and the whole events file.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from visor_jax.errors import RunError
from visor_jax.files.bucket import is_bucket
from visor_jax.files.growing import open_growing
from visor_jax.files.read_write import finite_or_null
from visor_jax.workdir.metrics_log import drop_rows

log = logging.getLogger(__name__)
messages: Any = event_pb2  # protobuf defines the messages at import, where a type checker does not see them


class EventFile:
    """Scalars of one run in one new `events.out.tfevents.*` file, in TensorBoard's own messages and records.

    TensorBoard's `EventFileWriter` is not used: it writes from a thread, so that a full disk is reported some steps
    late, and it imports TensorFlow wherever that is installed, which takes the accelerator's memory.
    """

    FLUSH_SECONDS = 30.0

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """
        Args:
          folder: where the file is created.
          first_step: TensorBoard discards the points of earlier files from this step on.
        """
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._in_bucket = is_bucket(folder)
        self._records = RecordWriter(open_growing(folder / name) if self._in_bucket else (folder / name).open("ab"))
        self._put(messages.Event(wall_time=now, file_version="brain.Event:2"))
        start = messages.SessionLog(status=messages.SessionLog.START)
        self._put(messages.Event(wall_time=now, step=first_step, session_log=start))
        self.flush()

    def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one point per tag; points reach the disk every half minute and on `flush`, a bucket on `flush`.

        Numbers beyond float32's range become infinite. Unpaired surrogates in a tag, which UTF-8 cannot encode, are
        written as escapes.
        """
        event = messages.Event(wall_time=time.time(), step=step)
        for tag, value in scalars.items():
            event.summary.value.add(tag=tag.encode("utf-8", "backslashreplace").decode(), simple_value=value)
        self._put(event)
        # An object of a bucket is replaced as a whole, so only before checkpoints.
        if not self._in_bucket and time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._records.close()

    def _put(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row by tag, without its step; those of a nested object as "name/key"."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= {f"{name}/{key}": x for key, x in value.items()} if isinstance(value, Mapping) else {name: value}
    return {
        tag: x for tag, x in flat.items() if isinstance(x, int | float) and not isinstance(x, bool) and tag != "step"
    }


class MetricsWriter:
    """Writes one stage's metrics; a context manager.

    Opening it drops the rows of `first_step` and later, whose steps were lost in a kill and are about to run again.

    Attributes:
      lost_seconds: how long the dropped steps took.
      written_at: when the last row was written, by `time.perf_counter`.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """
        Args:
          folder: the stage's folder; `metrics.jsonl` and the TensorBoard events go there.
          first_step: the number of the first step to be written.
        """
        self._path = folder / "metrics.jsonl"
        self.lost_seconds = drop_rows(self._path, first_step)
        self._file = open_growing(self._path)
        self._board = EventFile(folder, first_step=first_step)
        self.written_at = time.perf_counter()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row with at least "step". Numbers that are not finite are written as null.

        Raises:
          RunError: the row cannot be written, for example because the disk is full.
        """
        line = (json.dumps(finite_or_null(row), allow_nan=False) + "\n").encode()
        try:
            self._file.write(line)
            self._board.add_scalars(row["step"], numbers_of(row))
        except OSError as error:
            raise RunError(f"{self._path.parent}: metrics cannot be written: {error.strerror or error}") from error
        self.written_at = time.perf_counter()

    def flush(self) -> None:
        """Flushes everything written so far to the disk, or replaces the bucket's objects."""
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


class NoMetrics:
    """The `MetricsWriter` of processes that write nothing, because process 0 writes for all."""

    lost_seconds = written_at = 0.0

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback

    def write(self, row: Mapping[str, Any]) -> None:
        """Discards a row."""

    def flush(self) -> None:
        """Does nothing."""


class StageProgress:
    """One stage's progress on stderr: a bar on a terminal, elsewhere a line every ten seconds; a context manager."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(
        self, stage: str, total: int, start: int = 0, *, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        """
        Args:
          stage: the bar's name.
          total: number of the last step.
          start: number of the last step already done.
          enabled: whether anything is shown.
        """
        self._stage, self._total, self._done = stage, total, start
        self._stream = stream or sys.stderr
        self._last_line = self._began = time.monotonic()
        self._start = start
        self._bar: Progress | None = None
        self._enabled = enabled
        if enabled and self._stream.isatty():
            self._bar = Progress(
                TextColumn("{task.description:>10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(stage, total=total, completed=start, figures="")

    def __enter__(self) -> StageProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._done > self._start:
            self._line("")

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows that `step` is done, and its loss."""
        self._done = step
        loss = row.get("loss")
        figures = f"loss {loss:.3f}" if isinstance(loss, float) else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif time.monotonic() - self._last_line >= self.SECONDS_BETWEEN_LINES:
            self._line(figures)

    def _line(self, figures: str) -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._began
        if not self._enabled:
            return
        line = f"{self._stage}: step {self._done}/{self._total}, {seconds:.0f} s {figures}"
        print(line.rstrip(), file=self._stream, flush=True)
