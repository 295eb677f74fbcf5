"""Where a run's time goes: seconds by kind (compile, step, data_wait, save, label, eval, ...) in `goodput.json`.

In: blocks of code timed by name. Out: a JSON object {name: seconds} that grows over restarts and stages of one workdir.
A name's time counts once: what is timed inside another block is taken off the outer one.
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
    """Adds to the seconds already in `path`; `write` puts the sums there. Not for use from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: defaultdict[str, float] = defaultdict(float, _read(path))
        self._inner: list[float] = []  # per open block: seconds of blocks inside it

    @property
    def seconds(self) -> dict[str, float]:
        return dict(self._seconds)

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count the block's seconds, less those of blocks timed inside it, as `name`'s."""
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self._seconds[name] += took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took

    def waits(self, name: str, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """The same items; the time spent waiting for each is `name`'s."""
        iterator = iter(items)
        while True:
            try:
                with self.time(name):
                    item = next(iterator)
            except StopIteration:
                return
            yield item

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere (for example those of steps that a kill threw away)."""
        self._seconds[name] += seconds

    def write(self) -> None:
        write_json(self._path, {name: round(seconds, 3) for name, seconds in sorted(self._seconds.items())})


def _read(path: Path) -> dict[str, float]:
    """What earlier runs counted; a damaged file is no reason not to train: it is made anew, with a warning."""
    if not path.exists():
        return {}
    try:
        found = read_json(path)
        check_shape(found, each(AMOUNT), path)
    except RequestError as error:
        log.warning("%s (counting begins anew)", error)
        return {}
    return {name: float(value) for name, value in found.items()}
