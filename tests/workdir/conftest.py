"""A race for the lock of a workdir, in a folder and in a bucket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from visor_jax.errors import RequestError
from visor_jax.workdir.lock import WorkdirLock

Race = Callable[[Callable[[], WorkdirLock], int], tuple[list[WorkdirLock], list[WorkdirLock]]]


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> Race:
    """Runs (make a lock, how many) -> (those that got it, those that were refused), all at once."""
    read = WorkdirLock._read

    def slow_read(lock: WorkdirLock):
        holder = read(lock)
        time.sleep(0.05)  # between reading and writing
        return holder

    monkeypatch.setattr(WorkdirLock, "_read", slow_read)

    def run(make: Callable[[], WorkdirLock], count: int) -> tuple[list[WorkdirLock], list[WorkdirLock]]:
        got, refused = [], []
        barrier = threading.Barrier(count)

        def contend() -> None:
            lock = make()
            barrier.wait()
            try:
                lock.__enter__()
                got.append(lock)
            except RequestError:
                refused.append(lock)

        threads = [threading.Thread(target=contend) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return got, refused

    return run
