"""Selects the next token: greedily, or sampled with temperature and top-p from a seed.

In: logits [B, V] and settings. Out: tokens [B]. The sample at step n depends only on the seed, n and the row's logits,
so a question has the same answer alone and in a batch.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from visor_jax.errors import RequestError
from visor_jax.model.keys import root_key

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Sampling:
    """Settings of token selection.

    Attributes:
      temperature: divides the logits; 0 always selects the best token.
      top_p: samples from the smallest set of best tokens with this total probability, after applying the temperature.
      seed: of the samples.

    Raises:
      RequestError: a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("temperature", numbers.Real), ("top_p", numbers.Real), ("seed", numbers.Integral)):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                expected = "a whole number" if kind is numbers.Integral else "a number"
                raise RequestError(f"{name}={value!r}: expected {expected}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature={self.temperature}: expected 0 (the best token) or a positive number")
        if not 0 < self.top_p <= 1:  # also rejects NaN
            raise RequestError(f"top_p={self.top_p}: expected more than 0 and at most 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(f"seed={self.seed}: expected 0 to {MAX_SEED}")

    def draw(self) -> Draw | None:
        """Returns the argument of `select`; None for greedy selection."""
        if self.temperature == 0:
            return None
        # XLA flushes smaller values, and reciprocals of larger ones, to 0; beyond the limits all samples are the same.
        temperature = min(max(self.temperature, float(np.finfo(np.float32).tiny)), 1e30)
        return Draw(np.float32(temperature), np.float32(self.top_p), np.uint32(self.seed))


class Draw(NamedTuple):
    """`Sampling` as arguments of a compiled program, so that other values do not recompile it."""

    temperature: np.float32
    top_p: np.float32
    seed: np.uint32


def select(
    logits: Float[Array, "B V"], draw: Draw | None, step: Int[Array, ""] | int, forbidden: int
) -> Int[Array, " B"]:
    """Selects the next token of every row; never `forbidden`, the picture's placeholder.

    Top-p keeps a token if all better tokens together have a probability below `top_p`.
    """
    logits = logits.at[:, forbidden].set(-jnp.inf)
    if draw is None:
        return jnp.argmax(logits, axis=-1)
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / draw.temperature
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    probabilities = jax.nn.softmax(ranked)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where((before < draw.top_p) | (draw.top_p >= 1), ranked, -jnp.inf)
    key = jax.random.fold_in(root_key(draw.seed, "sampling"), step)
    rank = jax.vmap(lambda row: jax.random.categorical(key, row))(ranked)  # independent of the batch
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
