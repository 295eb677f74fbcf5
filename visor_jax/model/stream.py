"""Positions and segments of the tokens of [V; T], and sorting [V; T] by position.

In: position and segment ids of visual and text tokens. Out: `TokenStream`, which every layer reads, with a
`TokenOrder` for the layers that run over both. Attention kernels skip blocks of keys by the bounds of their positions;
text before and after V widens the bounds of its blocks. Sorted by position every block is a range, and kernels visit
the fewest blocks. The sort index is computed once for all layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num

from visor_jax.kernels.attention.api import PLAIN_LOGITS


class TokenOrder(NamedTuple):
    """[V; T] sorted by segment, turn and position, padding last: the token at each place, each token's place."""

    tokens: Int[Array, "B N"]
    places: Int[Array, "B N"]


class TokenStream(NamedTuple):
    """Position ids in the dense sequence and segment ids (0 is padding) of visual and text tokens.

    `text_key_segments` are the segments of text tokens as keys; a routing token has 0 there. `order` is None if layers
    do not sort [V; T]. `text_turns` are the independent turns of text tokens: a token of turn 1, 2, ... sees its own
    turn and turn 0, what the turns of its segment share, visual tokens among it. None if every token sees its segment.
    `targets` are the text tokens of answers; None in prompts.
    """

    visual_positions: Int[Array, "B Nv"]
    visual_segments: Int[Array, "B Nv"]
    text_positions: Int[Array, "B Nt"]
    text_segments: Int[Array, "B Nt"]
    text_key_segments: Int[Array, "B Nt"]
    order: TokenOrder | None = None
    text_turns: Int[Array, "B Nt"] | None = None
    targets: Bool[Array, "B Nt"] | None = None


def visual_codes(stream: TokenStream, segments: Int[Array, "B Nv"]) -> Int[Array, "B Nv"]:
    """The segments that masks compare, of visual tokens in `segments`: those of turn 0."""
    return segments if stream.text_turns is None else _codes(stream, segments, 0)


class TextCodes(NamedTuple):
    """The segments that masks compare: of text tokens as queries and as keys, and of what their turns share, if any."""

    queries: Int[Array, "B Nt"]
    keys: Int[Array, "B Nt"]
    shared: Int[Array, "B Nt"] | None


def text_codes(stream: TokenStream) -> TextCodes:
    """One number per (segment, turn): with independent turns, masks treat each turn as a segment."""
    segments, turns = stream.text_segments, stream.text_turns
    if turns is None:
        return TextCodes(segments, stream.text_key_segments, None)
    keys = _codes(stream, stream.text_key_segments, turns)
    return TextCodes(_codes(stream, segments, turns), keys, _codes(stream, segments, 0))


def _codes(stream: TokenStream, segments: Int[Array, "B N"], turns: Int[Array, "B N"] | int) -> Int[Array, "B N"]:
    """segments * (Nt + 1) + turns, which orders by segment, then turn; 0 at padding. In int32 up to Nt = 46,339."""
    return jnp.where(segments == 0, 0, segments * (stream.text_segments.shape[1] + 1) + turns)


def with_order(stream: TokenStream) -> TokenStream:
    """The stream with its `order`; unchanged if it is so short that attention computes every logit anyway."""
    segments = jnp.concatenate([visual_codes(stream, stream.visual_segments), text_codes(stream).queries], axis=1)
    if segments.shape[1] ** 2 <= PLAIN_LOGITS:
        return stream
    positions = jnp.concatenate([stream.visual_positions, stream.text_positions], axis=1)
    padding_last = jnp.where(segments == 0, jnp.iinfo(segments.dtype).max, segments)
    tokens = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    tokens = jax.lax.sort((padding_last, positions, tokens), num_keys=2)[2]
    return stream._replace(order=TokenOrder(tokens, jnp.argsort(tokens, axis=1)))


def sort_by_position(x: Num[Array, "B N ..."], order: TokenOrder) -> Num[Array, "B N ..."]:
    """Rows [B, Nv+Nt, ...] of [V; T] sorted by position."""
    return rearranged(x, order.tokens, order.places)


def unsort(x: Num[Array, "B N ..."], order: TokenOrder) -> Num[Array, "B N ..."]:
    """The inverse of `sort_by_position`."""
    return rearranged(x, order.places, order.tokens)


@jax.custom_vjp
def rearranged(x: Num[Array, "B N ..."], index: Int[Array, "B N"], inverse: Int[Array, "B N"]) -> Num[Array, "B N ..."]:
    """Rows of `x` at `index`, whose gradient is a gather too: rows at `inverse`, not a scatter."""
    del inverse
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def _forward(x: Array, index: Array, inverse: Array):
    return rearranged(x, index, inverse), (index, inverse)


def _backward(indices: tuple[Array, Array], grad: Array):
    index, inverse = indices
    nothing = np.zeros(index.shape, jax.dtypes.float0)  # integers have no gradient
    return rearranged(grad, inverse, index), nothing, nothing


rearranged.defvjp(_forward, _backward)
