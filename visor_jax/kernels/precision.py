"""The precision that sums are taken in: at least float32, whatever the dtype of the operands.

In: arrays of any floating-point dtype. Out: the same values in float32 or wider.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """In float32, or in float64 where `x` is: the precision in which sums and softmax are computed."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
