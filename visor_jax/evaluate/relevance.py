"""Shows on which patches of a picture an answer depends: gradient times input at the visual tokens.

In: a model and a batch of one question with its answer. Out: a map over the patches of the picture's first tile. It is
an approximation to first order: how much the answer's log-likelihood would change if a visual token were zero, through
all layers that run under the budget (Shrikumar et al., 2016).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits
from visor_jax.data.collate import Batch
from visor_jax.model.layers import Params
from visor_jax.model.likelihood import answer_tokens
from visor_jax.model.visor import encode

MAX_VISUAL = 1024  # visual positions of a row; the backward pass of more needs much memory


def patch_relevance(params: Params, batch: Batch, bits: Bits, arch: Architecture) -> Float[np.ndarray, "S S"] | None:
    """Returns the relevance of each patch of the first tile to the answer, the largest 1; None if it is not computed.

    Args:
      batch: one row with one question; a picture whose parts are tiles (not one of several in a tile).

    Returns:
      None if there is no picture, if it has more than `MAX_VISUAL` positions, if a reduction chooses tokens, or if
      nothing depends on it.
    """
    arrays = batch.arrays
    if arch.reduction.selects or "tile_positions" in arrays or not 0 < arrays["visual_segments"].shape[1] <= MAX_VISUAL:
        return None
    side = arch.vision.patches_per_side
    of_tokens = np.asarray(_program(arch)(params, arrays, jnp.asarray(bits, bool)))[0]
    gather, weights = arrays["visual_gather"][0], arrays["visual_weights"][0]
    shares = np.where((gather < side**2) & (arrays["visual_segments"][0] > 0)[:, None], weights, 0) * of_tokens[:, None]
    patches = np.zeros(side**2, np.float32)
    np.add.at(patches, np.where(shares > 0, gather, 0), shares)
    largest = patches.max()
    return (patches / largest).reshape(side, side) if largest > 0 and np.isfinite(largest) else None


@lru_cache(maxsize=8)
def _program(arch: Architecture) -> Callable[[Params, dict, Array], Float[Array, "B V"]]:
    return jax.jit(partial(_token_relevance, arch=arch))


def _token_relevance(params: Params, batch: dict[str, Array], budget: Array, *, arch: Architecture):
    visual = encode(params, batch, arch)

    def loss(visual):
        losses, _, _ = answer_tokens(params, visual, batch, budget, arch)
        return jnp.sum(losses)

    return jnp.abs(jnp.sum(jax.grad(loss)(visual) * visual, axis=-1))
