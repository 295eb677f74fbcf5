"""Caches compiled programs, and measures compile time separately from run time.

In: a function and its arguments. Out: the compiled program for arguments of these shapes, cached for the next call, and
the seconds spent compiling.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from visor_jax.generate.answer import Seconds


class Programs:
    """The compiled programs of one model, by name and argument shapes.

    Attributes:
      seconds_compiling: wall time spent compiling so far, without run time.
    """

    def __init__(self, options: dict[str, bool | int | str] | None):
        self.seconds_compiling = 0.0
        self._options = options
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def run(self, name: Hashable, function: Callable[..., Any], *args: Any) -> Any:
        """Runs `function` on `args`; compiles it first if needed."""
        return self.ready(name, function, *args)(*args)

    def ready(self, name: Hashable, function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
        """Returns the compiled program of `function` for arguments of these shapes.

        Args:
          name: identifies the function, including everything else that affects its result.
          function: a pure function of arrays.
          *args: arguments; only their shapes and dtypes matter.
          **options: further arguments of `jax.jit`.
        """
        key = name, shapes_of(args)
        if key not in self._compiled:
            jax.block_until_ready(args)  # count asynchronous work as run time
            with self.preparing():
                jitted = jax.jit(function, compiler_options=self._options, **options)
                self._compiled[key] = jitted.lower(*args).compile()
        return self._compiled[key]

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Counts the time of the block as compile time, for work that is done once."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_compiling += time.perf_counter() - start

    @contextlib.contextmanager
    def timed(self, spent: Seconds) -> Iterator[None]:
        """Adds the time of the block to `spent`, with compile time separate."""
        start, compiled = time.perf_counter(), self.seconds_compiling
        try:
            yield
        finally:
            compiling = self.seconds_compiling - compiled
            spent.compiling += compiling
            spent.running += time.perf_counter() - start - compiling


def shapes_of(args: Any) -> Hashable:
    """Returns the structure, shapes and dtypes of arguments as a cache key."""
    leaves, structure = jax.tree.flatten(args)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), jnp.result_type(int)  # with or without x64
