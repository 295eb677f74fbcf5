"""Chooses the implementation of cross-entropy: by name, or by the number of logits.

In: the arguments of `base.cross_entropy` and the name of an implementation, or None. Out: as `base.cross_entropy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from visor_jax.kernels.cross_entropy import base, xla_chunked

Implementation = Literal["xla", "xla_chunked"]

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "xla": base.cross_entropy,
    "xla_chunked": xla_chunked.cross_entropy,
}

# Up to this many logits are kept, which saves computing them twice; more are computed in chunks and discarded.
MAX_LOGITS = 2**24


def cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    labels: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    z_loss: float | int | np.floating | np.integer = 0.0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """Weighted loss of each row, and whether its label is the most likely token; see `base.cross_entropy`.

    Args:
      hidden: hidden states [N,D], floating point.
      head: the head's kernel [D,V], floating point.
      labels: target ids [N], integers in [0, V) wherever the weight is not 0.
      weights: weight of each row [N], floating point; 0 for a row that does not count.
      z_loss: weight of the squared log of the softmax's denominator, which keeps logits near 0; not negative.
      implementation: a name of `IMPLEMENTATIONS`; None takes "xla" up to `MAX_LOGITS` logits, then "xla_chunked".

    Raises:
      ValueError: an argument of the wrong shape or dtype, or an implementation that does not exist. A forced
        implementation is never replaced by another.
    """
    base.validate(hidden, head, labels, weights)
    name = implementation
    if name is None:
        name = "xla" if hidden.shape[0] * head.shape[1] <= MAX_LOGITS else "xla_chunked"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r} does not exist; known are {', '.join(IMPLEMENTATIONS)}")
    if not isinstance(z_loss, int | float | np.integer | np.floating):
        raise ValueError(f"z_loss must be a Python or NumPy number, fixed at trace time, got {type(z_loss).__name__}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be 0 or more, and finite, got {z_loss}")
    return IMPLEMENTATIONS[name](hidden, head, labels, weights, z_loss=float(z_loss))
