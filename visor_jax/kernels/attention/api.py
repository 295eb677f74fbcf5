"""Which implementation of attention runs: the caller's choice, or one readable table.

In: the arguments of `base.attention` and the name of an implementation, or None. Out: what `base.attention` promises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Array, Float

from visor_jax.kernels.attention import base, xla_chunked
from visor_jax.kernels.attention.base import AttentionMask

Implementation = Literal["xla", "xla_chunked"]

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "xla": base.attention,
    "xla_chunked": xla_chunked.attention,
}

# First line whose limit holds: (most logits of one head of one sample, implementation).
# Small logits stay in cache, and one plain einsum beats a loop; large ones do not fit and need not be kept.
CHOICE: tuple[tuple[float, Implementation], ...] = (
    (512 * 512, "xla"),
    (float("inf"), "xla_chunked"),
)


def attention(
    q: Float[Array, "B Tq H D"],
    k: Float[Array, "B Tk K D"],
    v: Float[Array, "B Tk K D"],
    *,
    mask: AttentionMask,
    implementation: Implementation | None = None,
) -> Float[Array, "B Tq H D"]:
    """Attention of `q` over `k` and `v` where `mask` lets it see; the contract is `base.attention`'s.

    Args:
      q: queries [B,Tq,H,D], floating point.
      k, v: keys and values [B,Tk,K,D] of the same dtype; H is a multiple of K.
      mask: who sees whom; see `AttentionMask`.
      implementation: a name of `IMPLEMENTATIONS`; None takes the one that `CHOICE` names for these shapes.

    Returns:
      [B,Tq,H,D] in the dtype of q; exactly 0, with zero gradients, for a query that may see nothing.

    Raises:
      ValueError: an argument of the wrong shape or dtype, or an implementation that does not exist. A forced
        implementation is never replaced by another.
    """
    base.validate(q, k, v, mask)
    if implementation is None:
        implementation = choose(q.shape[1], k.shape[1])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} does not exist; known are {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](q, k, v, mask=mask)


def choose(q_length: int, kv_length: int) -> Implementation:
    """The first line of `CHOICE` that admits these lengths."""
    return next(name for most, name in CHOICE if q_length * kv_length <= most)
