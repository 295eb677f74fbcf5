"""Which implementation of cross-entropy runs: the caller's choice, or the only one there is so far.

In: the arguments of `base.cross_entropy` and the name of an implementation, or None. Out: what it promises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Array, Bool, Float, Int

from visor_jax.kernels.cross_entropy import base

Implementation = Literal["xla"]

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {"xla": base.cross_entropy}


def cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    labels: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """Weighted losses by row, and which labels were the most likely; see `base.cross_entropy`.

    Args:
      hidden: hidden states [N,D], floating point.
      head: the head's kernel [D,V], floating point.
      labels: target ids [N], integers in [0, V) wherever the weight is not 0.
      weights: weight of each row [N], floating point; 0 for a row that does not count.
      implementation: a name of `IMPLEMENTATIONS`; None takes "xla".

    Raises:
      ValueError: an argument of the wrong shape or dtype, or an implementation that does not exist. A forced
        implementation is never replaced by another.
    """
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r} does not exist; known are {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](hidden, head, labels, weights)
