"""Records a run's time by kind (compile, step, data_wait, save, label, eval, ...) in `goodput.json`.

In: blocks of code timed by name. Out: a JSON object {name: seconds}, accumulated over restarts and stages of a workdir.
Time counts once: the time of a nested block is subtracted from the outer one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from visor_jax.errors import RequestError
from visor_jax.files.json_shape import AMOUNT, check_shape, each
from visor_jax.files.read_write import read_json, write_json

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")


class Goodput:
    """Accumulates seconds on top of those in `path`; `write` saves the sums. Not thread-safe."""

    def __init__(self, path: Path, *, written: bool = True) -> None:
        """
        Args:
          path: the file.
          written: whether `write` writes it; of several processes only one does.
        """
        self._path, self._written = path, written
        self._seconds: defaultdict[str, float] = defaultdict(float, _read(path))
        self._inner: list[float] = []  # per open block: seconds of blocks inside it

    @property
    def seconds(self) -> dict[str, float]:
        """Returns the seconds by name."""
        return dict(self._seconds)

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the block's seconds, without those of nested timed blocks, to `name`."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[name] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def waits(self, name: str, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """Yields the same items; adds the time spent waiting for each to `name`."""
        iterator = iter(items)
        while True:
            try:
                with self.time(name):
                    item = next(iterator)
            except StopIteration:
                return
            yield item

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds that were measured elsewhere (for example of steps lost by a kill)."""
        self._seconds[name] += seconds

    def share(self, name: str) -> float:
        """Returns the seconds of `name` as a share of all seconds; 0 if there are none."""
        total = sum(self._seconds.values())
        return self._seconds.get(name, 0.0) / total if total > 0 else 0.0

    def write(self) -> None:
        """Saves the sums, rounded to milliseconds."""
        if not self._written:
            return
        write_json(self._path, {name: round(seconds, 3) for name, seconds in sorted(self._seconds.items())})


def _read(path: Path) -> dict[str, float]:
    """Reads the sums of earlier runs; a damaged file is replaced with a warning, because training can continue."""
    if not path.exists():
        return {}
    try:
        seconds = read_json(path)
        check_shape(seconds, each(AMOUNT), path)
    except RequestError as error:
        log.warning("%s (counting starts again)", error)
        return {}
    return {name: float(value) for name, value in seconds.items()}
