"""An optional self-attention layer whose budget is known only at run time: one for the batch, or one per sample.

In: a layer's parameters, visual tokens V [B, Nv, D], text tokens T [B, Nt, D], and which samples have the slot on. Out:
V and T after the layer. A slot that is off does no visual work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from visor_jax.architecture import Architecture
from visor_jax.kernels.mesh import free_axes, sample_axes
from visor_jax.model.layers import Params
from visor_jax.model.stream import Stream
from visor_jax.model.super_block import joint_layer, text_layer

PARTS = 4  # of a mixed batch: as many as are needed for the samples whose slot is on are computed


def optional_self_attention(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    on: Bool[Array, "*B"],
    stream: Stream,
    arch: Architecture,
    *,
    remat: bool = False,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """A slot at run time: `on` is one boolean, or one per sample [B]."""
    if on.ndim:
        return mixed_self_attention(params, visual, text, on, stream, arch, remat=remat)
    return joint_or_alone(params, visual, text, on, None, stream, arch, remat)


def joint_or_alone(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    on: Bool[Array, ""],
    active: Bool[Array, " B"] | None,
    stream: Stream,
    arch: Architecture,
    remat: bool,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """[V; T] through the layer, of the samples that are active, where `on`; else T alone."""

    def joint(visual: Array, text: Array) -> tuple[Array, Array]:
        return joint_layer(params, visual, text, stream, arch, active)[:2]

    # What a branch keeps for the backward pass is room that the other one fills with zeros: recomputed, there is none.
    kept = jax.checkpoint if remat else lambda branch: branch
    return jax.lax.cond(on, kept(joint), kept(text_alone(params, stream, arch)), visual, text)


def text_alone(params: Params, stream: Stream, arch: Architecture) -> Callable[[Array, Array], tuple[Array, Array]]:
    """(V, T) -> V as it is, and T through the layer."""
    return lambda visual, text: (visual, text_layer(params, text, stream, arch.text)[0])


def mixed_self_attention(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    active: Bool[Array, " B"],
    stream: Stream,
    arch: Architecture,
    *,
    remat: bool = False,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """The slot in a batch of which some samples have it on: these are brought together, the others' V is left alone.

    Where none is on, T alone goes through the layer at once. Else the samples that are on come first, and the batch is
    gone through in equal parts (`part_size`): a part goes through the joint layer as soon as one of its samples is on,
    so that projections and MLP skip the rest as the attention kernels do. Where a mesh splits the batch, each device
    sorts its own samples, and a part is some of every device's.
    """
    if active.shape[0] == 0:
        return visual, text
    devices = math.prod(free_axes()[axis] for axis in sample_axes(visual.shape[0]))
    own = active.reshape(devices, -1)
    order = jnp.argsort(~own, axis=1, stable=True)
    in_parts = partial(parted, order=order, size=part_size(own.shape[1]))

    def of_part(_, part: tuple[Array, Array, Array, Stream]):
        visual, text, active, stream = part
        return None, joint_or_alone(params, visual, text, jnp.any(active), active, stream, arch, remat)

    def some(visual: Array, text: Array) -> tuple[Array, Array]:
        parts = jax.tree.map(in_parts, (visual, text, active, stream))
        _, found = jax.lax.scan(of_part, None, parts)
        return jax.tree.map(partial(unparted, order=order), found)

    none = text_alone(params, stream, arch)
    # Each part is recomputed already where that is asked for.
    return jax.lax.cond(jnp.any(active), some, jax.checkpoint(none) if remat else none, visual, text)


def part_size(samples: int) -> int:
    """Samples of a part of a mixed batch: the most that make `PARTS` equal parts, or more where they do not divide."""
    return next(size for size in range(-(-samples // PARTS), 0, -1) if samples % size == 0)


def parted(x: Shaped[Array, "B ..."], order: Int[Array, "devices own"], size: int) -> Array:
    """[B, ...] in the order of each device, as parts [own / size, devices * size, ...]."""
    devices, own = order.shape
    sorted_ = jax.vmap(lambda x, order: x[order])(x.reshape(devices, own, *x.shape[1:]), order)
    parts = sorted_.reshape(devices, own // size, size, *x.shape[1:]).swapaxes(0, 1)
    return parts.reshape(own // size, devices * size, *x.shape[1:])


def unparted(parts: Shaped[Array, "parts rows ..."], order: Int[Array, "devices own"]) -> Array:
    """The inverse of `parted`."""
    devices, own = order.shape
    count, rows, *rest = parts.shape
    sorted_ = parts.reshape(count, devices, rows // devices, *rest).swapaxes(0, 1).reshape(devices, own, *rest)
    back = jnp.argsort(order, axis=1)
    return jax.vmap(lambda x, back: x[back])(sorted_, back).reshape(devices * own, *rest)
