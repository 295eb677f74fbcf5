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
from visor_jax.model.remat import Remat, recomputed
from visor_jax.model.stream import TokenStream
from visor_jax.model.super_block import joint_layer, text_layer

NUM_CHUNKS = 4  # of a mixed batch; only chunks that hold a sample whose slot is on do visual work


def optional_self_attention(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    on: Bool[Array, "*B"],
    stream: TokenStream,
    arch: Architecture,
    *,
    remat: Remat = "none",
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """A slot whose budget is known at run time: `on` is one boolean, or one per sample [B]."""
    if on.ndim:
        return mixed_self_attention(params, visual, text, on, stream, arch, remat=remat)
    return joint_or_alone(params, visual, text, on, None, stream, arch, remat)


def joint_or_alone(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    on: Bool[Array, ""],
    active: Bool[Array, " B"] | None,
    stream: TokenStream,
    arch: Architecture,
    remat: Remat,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """Runs active samples' [V; T] through the layer if `on`, else T alone."""

    def joint(visual: Array, text: Array) -> tuple[Array, Array]:
        return joint_layer(params, visual, text, stream, arch, active)[:2]

    # cond stores residuals of both branches; remat avoids that.
    alone = text_alone(params, stream, arch)
    return jax.lax.cond(on, recomputed(joint, remat), recomputed(alone, remat), visual, text)


def text_alone(
    params: Params, stream: TokenStream, arch: Architecture
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """(V, T) -> V unchanged, and T after the layer."""
    return lambda visual, text: (visual, text_layer(params, text, stream, arch.text)[0])


def mixed_self_attention(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    active: Bool[Array, " B"],
    stream: TokenStream,
    arch: Architecture,
    *,
    remat: Remat = "none",
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """A slot that is on for some samples of a batch only; the V of the others does not change.

    If no sample is on, T alone goes through the layer. Otherwise the samples that are on are sorted first and the batch
    is scanned in equal chunks (`chunk_size`): a chunk runs the joint layer if one of its samples is on, so that
    projections and MLP skip the rest as the attention kernels do. If a mesh splits the batch, each device sorts its own
    samples, and a chunk holds some of every device's.
    """
    if active.shape[0] == 0:
        return visual, text
    devices = math.prod(free_axes()[axis] for axis in sample_axes(visual.shape[0]))
    local_active = active.reshape(devices, -1)
    order = jnp.argsort(~local_active, axis=1, stable=True)
    in_chunks = partial(split_chunks, order=order, size=chunk_size(local_active.shape[1]))

    def run_chunk(_, chunk: tuple[Array, Array, Array, TokenStream]):
        visual, text, active, stream = chunk
        return None, joint_or_alone(params, visual, text, jnp.any(active), active, stream, arch, remat)

    def some(visual: Array, text: Array) -> tuple[Array, Array]:
        chunks = jax.tree.map(in_chunks, (visual, text, active, stream))
        _, results = jax.lax.scan(run_chunk, None, chunks)
        return jax.tree.map(partial(merge_chunks, order=order), results)

    none = text_alone(params, stream, arch)
    # `joint_or_alone` applies remat to each chunk itself.
    return jax.lax.cond(jnp.any(active), some, recomputed(none, remat), visual, text)


def chunk_size(samples: int) -> int:
    """Samples per chunk of a mixed batch: the largest divisor of `samples` that gives at least `NUM_CHUNKS` chunks."""
    return next(size for size in range(-(-samples // NUM_CHUNKS), 0, -1) if samples % size == 0)


def split_chunks(
    x: Shaped[Array, "B ..."], order: Int[Array, "devices samples"], size: int
) -> Shaped[Array, "chunks rows ..."]:
    """[B, ...] sorted by each device's `order`, as chunks [local / size, devices * size, ...]."""
    devices, num_local = order.shape
    sorted_ = jax.vmap(lambda x, order: x[order])(x.reshape(devices, num_local, *x.shape[1:]), order)
    chunks = sorted_.reshape(devices, num_local // size, size, *x.shape[1:]).swapaxes(0, 1)
    return chunks.reshape(num_local // size, devices * size, *x.shape[1:])


def merge_chunks(
    chunks: Shaped[Array, "chunks rows ..."], order: Int[Array, "devices samples"]
) -> Shaped[Array, "B ..."]:
    """The inverse of `split_chunks`."""
    devices, num_local = order.shape
    count, rows, *rest = chunks.shape
    by_device = chunks.reshape(count, devices, rows // devices, *rest).swapaxes(0, 1)
    sorted_ = by_device.reshape(devices, num_local, *rest)
    back = jnp.argsort(order, axis=1)
    return jax.vmap(lambda x, back: x[back])(sorted_, back).reshape(devices * num_local, *rest)
