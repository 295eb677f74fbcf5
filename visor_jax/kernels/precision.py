"""The precision of sums: at least float32, for operands of any floating-point dtype.

In: arrays of any floating-point dtype. Out: the same values in float32 or wider.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x` in float32, or in float64 if it is float64 already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
