"""PyramidDrop (Xing et al., CVPR 2025): after each stage of layers fewer visual tokens remain, in training as well.

As Cooperx521/PyramidDrop: the first layer of the next stage is asked what the last token of each instruction attends
to, the mean over instructions if a conversation has several. Later layers count positions without the dropped tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from visor_jax.architecture import DroppingArchitecture
from visor_jax.model.dropping.base import Raters, last_instruction_tokens
from visor_jax.model.stream import TokenStream

AFTER, RENUMBERS = False, True


def raters(
    visual: Float[Array, "B Nv D"], text: Float[Array, "B Nt D"], stream: TokenStream, dropping: DroppingArchitecture
) -> Raters:
    """The last token of each instruction."""
    del visual, text, dropping
    return Raters(last_instruction_tokens(stream).astype(jnp.float32))
