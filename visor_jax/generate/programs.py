"""Compiled programs, made ahead of their first run so that compiling is timed apart from running.

In: a function and its arguments. Out: the program for arguments of these shapes, kept for the next call, and the
seconds that were spent on making programs.
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
    """The programs of one model, by name and by the shapes of their arguments.

    Attributes:
      seconds_compiling: wall time spent so far on making programs, and never on running one.
    """

    def __init__(self, options: dict[str, bool | int | str] | None):
        self.seconds_compiling = 0.0
        self._options = options
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def run(self, name: Hashable, function: Callable[..., Any], *args: Any) -> Any:
        """What `function` gives for `args`; compiled for their shapes if it was not yet."""
        return self.ready(name, function, *args)(*args)

    def ready(self, name: Hashable, function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
        """The program of `function` for arguments of these shapes.

        Args:
          name: of the function; whatever else decides what it computes is part of the name.
          function: a pure function of arrays.
          *args: arguments; only their shapes and dtypes matter.
          **options: further arguments of `jax.jit`.
        """
        key = name, shapes_of(args)
        if key not in self._compiled:
            jax.block_until_ready(args)  # what still runs in the background is running time
            with self.preparing():
                jitted = jax.jit(function, compiler_options=self._options, **options)
                self._compiled[key] = jitted.lower(*args).compile()
        return self._compiled[key]

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Counts what happens here as compilation: what is done once, so that later answers need not."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_compiling += time.perf_counter() - began

    @contextlib.contextmanager
    def timed(self, spent: Seconds) -> Iterator[None]:
        """Adds the seconds that pass here to `spent`, compilation apart."""
        began, compiled = time.perf_counter(), self.seconds_compiling
        try:
            yield
        finally:
            compiling = self.seconds_compiling - compiled
            spent.compiling += compiling
            spent.running += time.perf_counter() - began - compiling


def shapes_of(args: Any) -> Hashable:
    """What a program is compiled for: the structure, shapes and dtypes of its arguments."""
    leaves, structure = jax.tree.flatten(args)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), jnp.result_type(int)  # with or without x64
