"""What the backward pass keeps of a layer's activations, and what it recomputes: the policies of `train.remat`.

"none" keeps everything. "full" keeps the inputs of each super-block and of each layer of the tower. "attention" keeps
what attention computed as well, so that no attention kernel runs twice (the kernels name it,
`visor_jax.kernels.attention.base.named`; of cuDNN's only the output has a name, and it runs twice). "mlp" also
keeps what goes into each MLP's norm and what its first products computed: most of what "attention" recomputes.
"products" keeps the results of all matrix products, so that only norms and activations run twice: much memory, little
time.
"offload" keeps what "full" does, in the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from visor_jax.kernels.attention.base import ATTENTION
from visor_jax.kernels.mesh import by_rows

Remat = Literal["none", "full", "attention", "mlp", "products", "offload"]
T = TypeVar("T")
Layer = Callable[..., Any]

INPUT = "layer_input"  # name of what a checkpointed layer reads
MLP = "mlp"  # name of what goes into an MLP's norm, and of what its first products compute


def recomputed(layer: Layer, remat: Remat) -> Layer:
    """`layer`, whose activations the backward pass recomputes as `remat` says; its result does not change."""
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    if remat == "full":
        return jax.checkpoint(layer)
    if remat == "attention":
        return jax.checkpoint(layer, policy=policies.save_only_these_names(ATTENTION))
    if remat == "mlp":
        return jax.checkpoint(layer, policy=policies.save_only_these_names(ATTENTION, MLP))
    if remat == "products":
        kept = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
        )
        return jax.checkpoint(layer, policy=kept)
    if remat == "offload":
        offloaded = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(layer, policy=offloaded)
    raise ValueError(f"remat={remat!r}: expected 'none', 'full', 'attention', 'mlp', 'products' or 'offload'")


def mlp_values(x: T) -> T:
    """What goes into an MLP's norm or what its first products computed, under the name that "mlp" keeps."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, MLP), x)


def layer_input(x: T) -> T:
    """The activations `x` that a layer reads: each device's rows, under the name that "offload" moves to the host."""
    return jax.tree.map(lambda leaf: checkpoint_name(by_rows(leaf), INPUT), x)
