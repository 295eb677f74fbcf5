"""The root keys of all random numbers drawn by JAX: one key per purpose.

A key is consumed once: by one `split`, by one draw, or by `fold_in`s of different numbers. What two consumers draw from
one key is not independent. Therefore no code uses `jax.random.key(seed)` directly: every purpose first folds in its own
number.
"""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt32

from visor_jax.config.schema import STAGE_NUMBERS

PURPOSES = {"start": 0, "sampling": 2}  # 1 belonged to a purpose that is gone


def root_key(seed: int | np.uint32 | UInt32[Array, ""], purpose: str) -> PRNGKeyArray:
    """The key of `seed` for one of `PURPOSES`."""
    return jax.random.fold_in(jax.random.key(seed), PURPOSES[purpose])


def start_key(seed: int, stage: str) -> PRNGKeyArray:
    """The key of the parameters that `stage` (one of `config.schema.STAGES`) starts at random, in a run of `seed`."""
    return jax.random.fold_in(root_key(seed, "start"), STAGE_NUMBERS[stage])
