"""Scores one batch under many budgets; budgets that begin alike share the layers up to where they differ.

In: parameters, visual tokens, a batch, budgets. Out: of each budget, whether each answer is right, and its
log-likelihood. The budgets form a tree whose branches are super-blocks: V and T after a block depend only on the slots
up to it. All 2^n subsets of n slots in n blocks need 2^(n+1) - 2 blocks instead of n 2^n. The tree is walked depth
first, so that one state per block is kept. One compiled program serves all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits
from visor_jax.model.decoder import one_block, run_outside
from visor_jax.model.layers import Params, rms_norm
from visor_jax.model.likelihood import scored_tokens
from visor_jax.model.stream import with_order
from visor_jax.model.visor import Batch, shared_text, stream_of

Score = tuple[Bool[Array, " B"], Float[Array, " B"]]
State = tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]


class Programs(NamedTuple):
    """The compiled parts of a pass: layers before the first slot, blocks (the first one from its slot on), the end."""

    start: Callable[..., Array]
    first_block: Callable[..., State]
    block: Callable[..., State]
    end: Callable[..., Score]


@lru_cache(maxsize=8)
def programs(arch: Architecture) -> Programs:
    """Returns the compiled parts for a plan with slots, cached for later batches and passes."""
    first = arch.shared_layers.stop - arch.num_head_layers
    return Programs(
        jax.jit(partial(shared_text, arch=arch)),
        jax.jit(partial(_block, arch=arch, first=first)),
        jax.jit(partial(_block, arch=arch)),
        jax.jit(partial(_end, arch=arch)),
    )


def score_tree(
    params: Params,
    visual: Float[Array, "B Nv D"],
    batch: Batch,
    budgets: Sequence[Bits],
    arch: Architecture,
    *,
    shared: Float[Array, "B Nt D"] | None = None,
) -> list[Score]:
    """Returns (correct [B], log-likelihood [B]) of each row's answer under every budget, in their order.

    Args:
      shared: T at the entry of the first optional layer (`shared_text`), if it is known.
    """
    of, size = programs(arch), arch.slots_per_block
    text = of.start(params, visual, batch) if shared is None else shared
    states, path = [(visual, text)], []  # states[k]: after k blocks of `path`
    scores: dict[Bits, Score] = {}
    for bits in sorted(set(budgets)):
        blocks = [bits[start : start + size] for start in range(0, len(bits), size)]
        pairs = zip(path, blocks, strict=False)  # the first path is empty
        kept = next((index for index, (one, other) in enumerate(pairs) if one != other), len(path))
        del states[kept + 1 :]
        for index, on in enumerate(blocks[kept:], start=kept):
            run = of.first_block if index == 0 else of.block
            states.append(run(params, np.int32(index), *states[-1], batch, jnp.asarray(on, bool)))
        path = blocks
        scores[bits] = of.end(params, *states[-1], batch)
    return [scores[bits] for bits in budgets]


def _block(params: Params, index: Array, visual: Array, text: Array, batch: Batch, on: Array, *, arch, first: int = 0):
    return one_block(params, index, visual, text, stream_of(batch), on, arch, first=first)


def _end(params: Params, visual: Array, text: Array, batch: Batch, *, arch: Architecture) -> Score:
    stream = with_order(stream_of(batch))
    _, text = run_outside(params, "tail", arch.num_tail_layers, visual, text, stream, arch)
    return score_hidden(params, rms_norm(params["norm"], text, arch.text.rms_norm_eps), batch)


def score_hidden(params: Params, hidden: Float[Array, "B Nt D"], batch: Batch) -> Score:
    """Returns (correct [B], log-likelihood [B]) of each row's answer, from the final hidden states."""
    losses, correct, weights = scored_tokens(params, hidden, batch)
    return jnp.all(correct | (weights == 0), axis=1), -jnp.sum(losses, axis=1)
