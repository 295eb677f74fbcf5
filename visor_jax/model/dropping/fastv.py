"""FastV (Chen et al., ECCV 2024): after the first layers, the visual tokens that the last token attends to most remain.

`code`, as pkunlp-icler/FastV: the attention of the prompt's last token in the last of these layers. `paper`: what its
section 4 defines, the average attention that a token receives from all tokens of the prompt in that layer.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from visor_jax.architecture import DroppingArchitecture
from visor_jax.model.dropping.base import Raters, last_instruction_tokens, prompt_tokens
from visor_jax.model.stream import TokenStream

AFTER, RENUMBERS = True, False


def raters(
    visual: Float[Array, "B Nv D"], text: Float[Array, "B Nt D"], stream: TokenStream, dropping: DroppingArchitecture
) -> Raters:
    """The last token of each prompt, or all tokens of the prompts."""
    del visual, text
    if dropping.score == "code":
        return Raters(last_instruction_tokens(stream).astype(jnp.float32))
    return Raters(prompt_tokens(stream).astype(jnp.float32), (stream.visual_segments > 0).astype(jnp.float32))
