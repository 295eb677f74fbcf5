"""The decoder: text-only layers first, super-blocks of `Architecture.pattern`, remaining layers (docs/method.md).

Visual tokens V [B, Nv, D] and text tokens T [B, Nt, D] are two arrays; position ids give their places in the dense
sequence, so that they are never interleaved. Two ways of running the same layers:

* `forward`: one `lax.scan` over the stacked super-blocks; the budget is a run-time array of booleans, one for the whole
  batch ([slots]) or one per sample ([B, slots]). One compiled program serves every budget, and a slot that is off does
  no visual work (`lax.cond`).
* `run_layers`: the layers one after the other with a budget known while tracing; layers that are off are not compiled.
  `specialize(budget)` is `forward` built this way, and generation's caches (`visor_jax.model.incremental`) use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture, LayerPlace
from visor_jax.budget import LayerKind, Plan
from visor_jax.model.decoders.qwen2 import Qwen2Layer
from visor_jax.model.layers import Params, inside, scan_layers, stacked
from visor_jax.model.mixed import optional_self_attention
from visor_jax.model.remat import Remat, layer_input, recomputed
from visor_jax.model.stream import TokenStream, with_order
from visor_jax.model.super_block import CrossAttention, KeysValues, cross_layer, joint_layer, text_layer

Budget = Sequence[bool] | Bool[Array | np.ndarray, " slots"] | Bool[Array | np.ndarray, "B slots"]


# --- declarations -----------------------------------------------------------------------------------------------------


class Blocks(nnx.Module):
    """All super-blocks, every parameter stacked over them, under the names of `Architecture.block`."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        for place in arch.block:
            self._put(place.path, stacked(lambda r: Qwen2Layer(arch.text, rngs=r), arch.num_blocks, rngs))
        for place in arch.block if arch.plan == "visor" else ():
            if place.cross:
                self._put(place.cross, stacked(lambda r: CrossAttention(arch, rngs=r), arch.num_blocks, rngs))

    def _put(self, path: str, layers: nnx.Module) -> None:
        _, kind, *rest = path.split("/")
        if not rest:
            setattr(self, kind, layers)
            return
        if not hasattr(self, kind):
            setattr(self, kind, Siblings())
        setattr(getattr(self, kind), rest[0], layers)


class Siblings(nnx.Module):
    """The layers of one kind in a super-block that has several: `layer_0`, `layer_1` and so on."""


# --- one program for all budgets --------------------------------------------------------------------------------------


def super_block(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    on: Bool[Array, "block_slots *B"],
    stream: TokenStream,
    arch: Architecture,
    *,
    remat: Remat = "none",
    first: int = 0,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """One super-block of the plan, the unit of the scan, with its `params` and its slots `on` [slots] or [slots, B].

    `first`: the layer of the block to start with; there is no slot before it.
    """
    slots = iter(range(arch.slots_per_block))
    for place in arch.block[first:]:
        layer = inside(params, place.path)
        if arch.plan == "dense":
            visual, text, _ = joint_layer(layer, visual, text, stream, arch)
        elif place.kind is LayerKind.SELF:
            visual, text = optional_self_attention(layer, visual, text, on[next(slots)], stream, arch, remat=remat)
        elif place.kind is LayerKind.CROSS:
            text, _, _ = cross_layer(inside(params, place.cross), layer, visual, text, stream, arch.text)
        else:
            text, _ = text_layer(layer, text, stream, arch.text)
    return visual, text


def by_block(budget: Budget, arch: Architecture) -> Bool[Array, "blocks block_slots *B"]:
    """A budget [slots] or [B, slots] split by super-block, samples last."""
    on = jnp.asarray(budget, bool)
    on = on.reshape(*on.shape[:-1], arch.num_blocks, arch.slots_per_block)
    return jnp.moveaxis(on, (-2, -1), (0, 1))


def forward(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: TokenStream,
    budget: Budget,
    arch: Architecture,
    *,
    remat: Remat = "none",
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """V and T after the last layer (before the final norm), for a budget given at run time.

    Args:
      params: the whole model's parameters, or at least its `head`, `blocks` and `tail`.
      budget: booleans [slots] or [B, slots]; ignored by a dense plan.
      remat: what the backward pass recomputes of each super-block (`visor_jax.model.remat`).

    Raises:
      ValueError: a budget of another shape.
    """
    slots = arch.num_blocks * arch.slots_per_block
    on = jnp.asarray(budget, bool) if arch.plan == "visor" else jnp.zeros((slots,), bool)
    if on.shape not in ((slots,), (visual.shape[0], slots)):
        raise ValueError(
            f"budget must have shape [slots] {(slots,)} or [samples, slots] {(visual.shape[0], slots)}, got {on.shape}"
        )
    stream = with_order(stream)
    visual, text = run_outside(params, "head", arch.num_head_layers, visual, text, stream, arch)

    def body(state, block):
        (block_params, block_on), (visual, text) = block, layer_input(state)
        return super_block(block_params, visual, text, block_on, stream, arch, remat=remat), None

    if arch.num_blocks:  # a dense plan may be shallower than a super-block
        (visual, text), _ = scan_layers(recomputed(body, remat), (visual, text), (params["blocks"], by_block(on, arch)))
    return run_outside(params, "tail", arch.num_tail_layers, visual, text, stream, arch)


def one_block(
    params: Params,
    index: Int[Array, ""] | int,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: TokenStream,
    on: Bool[Array, " block_slots"],
    arch: Architecture,
    *,
    first: int = 0,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """V and T after super-block `index`, a run-time number: one compiled program serves all blocks.

    `first`: the layer of the block to start with, as in `super_block`. Head and tail layers are not run.
    """
    block = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), params["blocks"])
    return super_block(block, visual, text, on, with_order(stream), arch, first=first)


def run_outside(
    params: Params,
    stack: str,
    count: int,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: TokenStream,
    arch: Architecture,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """The layers before ("head") or after ("tail") the super-blocks: text-only, except in a dense plan."""
    for i in range(count):
        layer = select_layer(params[stack], i)
        if arch.plan == "dense":
            visual, text, _ = joint_layer(layer, visual, text, stream, arch)
        else:
            text, _ = text_layer(layer, text, stream, arch.text)
    return visual, text


# --- one program for one budget ---------------------------------------------------------------------------------------

Record = Callable[[str, KeysValues], None]
"""Receives "text", "cross" or "self" and a layer's keys and values, layer by layer, to build a cache."""


STACKS = ("head", "blocks", "tail")


def unstack_layers(params: Params) -> Params:
    """The model's parameters with stacked layers split into tuples of per-layer arrays.

    For `run_layers` and the caches: a program that runs stacked layers one after the other first copies each one.
    """

    def split(stack: Params) -> tuple[Params, ...]:
        leaves, tree = jax.tree.flatten(stack)
        return tuple(jax.tree.unflatten(tree, layer) for layer in zip(*map(jnp.unstack, leaves), strict=True))

    return {name: split(x) if name in STACKS and isinstance(x, dict) else x for name, x in params.items()}


def stack_layers(params: Params) -> Params:
    """The inverse of `unstack_layers`."""

    def stack(layers: tuple[Params, ...]) -> Params:
        return jax.tree.map(lambda *x: jnp.stack(x), *layers)

    return {name: stack(x) if isinstance(x, tuple) else x for name, x in params.items()}


def layer_params(params: Params, place: LayerPlace) -> Params:
    """The parameters of one decoder layer."""
    return _params_at(params, place.path, place.index)


def cross_params(params: Params, place: LayerPlace) -> Params:
    """The parameters of the cross-attention of a decoder layer that has one."""
    return _params_at(params, place.cross, place.index)


def _params_at(params: Params, path: str, index: int) -> Params:
    return inside(select_layer(params[path.split("/")[0]], index), path)


def select_layer(layers: Params | tuple[Params, ...], index: int) -> Params:
    """The parameters of one of several layers, stacked or in a tuple."""
    return layers[index] if isinstance(layers, tuple) else jax.tree.map(lambda x: x[index], layers)


def run_layers(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: TokenStream,
    bits: Sequence[bool],
    arch: Architecture,
    *,
    layers: range | None = None,
    record: Record = lambda kind, keys_values: None,
    keep_visual: bool = True,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """Decoder layers `layers` (default: all) one after the other, with a budget known while tracing.

    `record` gets the text half of a self-attention layer's keys and values as "text" and the visual half as "self".
    Without `keep_visual`, the last layer that reads V does not update it; the returned V is the one before that layer.
    """
    count, kinds, stream = visual.shape[1], Plan.of(arch).under(bits), with_order(stream)
    last_reader = max((index for index, kind in enumerate(kinds) if kind is not LayerKind.TEXT), default=None)
    for index in range(len(kinds)) if layers is None else layers:
        place = arch.layers[index]
        layer = layer_params(params, place)
        if kinds[index] is LayerKind.SELF:
            keep = keep_visual or index != last_reader
            visual, text, both = joint_layer(layer, visual, text, stream, arch, keep_visual=keep)
            visual_kv, text_kv = (jax.tree.map(lambda x, part=part: x[:, part], both) for part in np.s_[:count, count:])
            record("self", visual_kv)
        elif kinds[index] is LayerKind.CROSS:
            text, text_kv, visual_kv = cross_layer(cross_params(params, place), layer, visual, text, stream, arch.text)
            record("cross", visual_kv)
        else:
            text, text_kv = text_layer(layer, text, stream, arch.text)
        record("text", text_kv)
    return visual, text


def specialize(bits: Sequence[bool], arch: Architecture) -> Callable[..., tuple[Array, Array]]:
    """`forward` for one budget only: (params, visual, text, stream) -> (V, T); layers that are off are not compiled."""
    return partial(run_layers, bits=tuple(bool(b) for b in bits), arch=arch)
