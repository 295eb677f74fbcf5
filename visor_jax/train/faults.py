"""Handles optimizer steps whose loss or gradient is not finite.

Out: `BadSteps`, which counts them and ends the run after too many in a row, and `keep_if_finite` for the jitted step.
`visor_jax.workdir.supervision` handles signals and hangs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from visor_jax.errors import RunError

log = logging.getLogger(__name__)

TreeT = TypeVar("TreeT")


class BadSteps:
    """Counts steps whose loss or gradient was not finite, and raises RunError after too many in a row.

    Callers save and complete nothing while `in_row` is above 0: a restarted run then repeats the same steps with the
    same count, and stops again.

    Attributes:
      in_row: bad steps since the last good one.
      total: bad steps of the stage, over all its starts.
    """

    def __init__(self, max_in_row: int) -> None:
        """
        Args:
          max_in_row: the number of bad steps in a row that ends the run; at least 1.
        """
        self._max = max_in_row
        self.in_row = self.total = 0
        self._last: Sequence[str] = ()

    def observe(self, step: int, finite: bool, sample_ids: Sequence[str]) -> None:
        """Counts `step`.

        Raises:
          RunError: `max_in_row` steps in a row were bad; the message names the batch's samples.
        """
        if finite:
            self.in_row = 0
            return
        self.in_row, self.total, self._last = self.in_row + 1, self.total + 1, sample_ids
        log.warning("step %d: loss or gradient not finite, step not applied; samples: %s", step, ", ".join(sample_ids))
        if self.in_row >= self._max:
            raise RunError(
                f"step {step}: loss or gradient not finite in {self.in_row} steps in a row (train.max_bad_steps);"
                f" the last batch's samples: {', '.join(sample_ids)}"
            )

    def check_ended_well(self, stage: str, step: int) -> None:
        """Checks that the stage's last steps were finite.

        Raises:
          RunError: they were not, so that the stage is not complete.
        """
        if self.in_row:
            raise RunError(
                f"{stage}: loss or gradient not finite in the last {self.in_row} steps, up to step {step}; the stage is"
                f" not complete; the last batch's samples: {', '.join(self._last)}"
            )

    def state(self) -> dict[str, int]:
        """The counts that a checkpoint stores."""
        return {"in_row": self.in_row, "total": self.total}

    def restore(self, saved: Any) -> None:
        """Takes the counts from `state`'s dict; zeros if a checkpoint has none or damaged ones."""
        state = saved if isinstance(saved, Mapping) else {}
        counts = [state.get(name) for name in ("in_row", "total")]
        self.in_row, self.total = (n if isinstance(n, int) and n >= 0 else 0 for n in counts)


def keep_if_finite(finite: Bool[Array, ""], new: TreeT, old: TreeT) -> TreeT:
    """`new` where `finite` (boolean scalar), else `old`, bit for bit; for use inside the jitted step.

    Unlike `optax.apply_if_finite` it never applies a bad update, even after many bad ones.
    """
    return jax.tree.map(lambda fresh, kept: jnp.where(finite, fresh, kept), new, old)
