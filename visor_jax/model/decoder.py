"""The decoder: super-blocks of a text-only, a cross-attention and an optional self-attention layer (docs/method.md).

Visual tokens V [B, Nv, D] and text tokens T [B, Nt, D] travel as two arrays; where they stand in the dense sequence is
told by their position ids, so nothing is ever interleaved. Two ways of running the same layers:

* `decode`: one `lax.scan` over the stacked super-blocks; the budget is a run-time array of booleans, one for the whole
  batch ([slots]) or one per sample ([B, slots]). One compiled program serves every budget, and a slot that is off does
  no visual work (`lax.cond`).
* `run_layers`: the layers one after the other with a budget known while tracing; what is off is not in the program.
  `specialize(budget)` is `decode` built this way, and generation's caches (`visor_jax.model.incremental`) rest on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from visor_jax.architecture import Architecture, TextArchitecture
from visor_jax.budget import LayerKind, Plan
from visor_jax.kernels.mesh import free_axes, sample_axes
from visor_jax.model.encoders.siglip import stacked
from visor_jax.model.layers import Params, Qwen2Attention, Qwen2Layer, recency_bias, scan_layers
from visor_jax.model.stream import Stream, ordered
from visor_jax.model.super_block import CrossAttention, KeysValues, cross_layer, joint_layer, text_layer

KINDS = ("text", "cross", "self")  # the three layers of a super-block, in order
PARTS = 4  # of a mixed batch: as many as are needed for the samples whose slot is on are computed

Budget = Sequence[bool] | Bool[Array, " slots"] | Bool[Array, "B slots"]


# --- declarations -----------------------------------------------------------------------------------------------------


class Blocks(nnx.Module):
    """All super-blocks, every parameter stacked over them."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        for kind in KINDS:
            layers = stacked(lambda r: Qwen2Layer(arch.text, rngs=r), arch.num_blocks, rngs)
            if kind != "self":  # near in the stream is not near in a picture
                start_with_recency(layers.self_attn, arch.text)
            setattr(self, kind, layers)
        if arch.plan == "visor":
            self.cross_attention = stacked(lambda r: CrossAttention(arch, rngs=r), arch.num_blocks, rngs)


def start_with_recency(attention: Qwen2Attention, arch: TextArchitecture) -> None:
    """Stacked text-only attention prefers near tokens, but in the first super-block, where the routing token reads."""
    for projection in (attention.q_proj, attention.k_proj):
        blocks, width = projection.bias.shape
        near = np.tile(recency_bias(arch), width // arch.head_dim)
        projection.bias[...] = jnp.asarray((np.arange(blocks) > 0)[:, None] * near, jnp.float32)


# --- one program for all budgets --------------------------------------------------------------------------------------


def optional_self_attention(
    params: Params, visual: Array, text: Array, on: Array, stream: Stream, arch: Architecture, *, remat: bool = False
) -> tuple[Array, Array]:
    """The slot of a super-block at run time: `on` is one boolean, or one per sample [B]."""
    if on.ndim:
        return mixed_self_attention(params, visual, text, on, stream, arch, remat=remat)
    return joint_or_alone(params, visual, text, on, None, stream, arch, remat)


def joint_or_alone(
    params: Params,
    visual: Array,
    text: Array,
    on: Bool[Array, ""],
    active: Bool[Array, " B"] | None,
    stream: Stream,
    arch: Architecture,
    remat: bool,
) -> tuple[Array, Array]:
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
    visual: Array,
    text: Array,
    active: Bool[Array, " B"],
    stream: Stream,
    arch: Architecture,
    *,
    remat: bool = False,
) -> tuple[Array, Array]:
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


def parted(x: Array, order: Int[Array, "devices own"], size: int) -> Array:
    """[B, ...] in the order of each device, as parts [own / size, devices * size, ...]."""
    devices, own = order.shape
    sorted_ = jax.vmap(lambda x, order: x[order])(x.reshape(devices, own, *x.shape[1:]), order)
    parts = sorted_.reshape(devices, own // size, size, *x.shape[1:]).swapaxes(0, 1)
    return parts.reshape(own // size, devices * size, *x.shape[1:])


def unparted(parts: Array, order: Int[Array, "devices own"]) -> Array:
    """The inverse of `parted`."""
    devices, own = order.shape
    count, rows, *rest = parts.shape
    sorted_ = parts.reshape(count, devices, rows // devices, *rest).swapaxes(0, 1).reshape(devices, own, *rest)
    back = jnp.argsort(order, axis=1)
    return jax.vmap(lambda x, back: x[back])(sorted_, back).reshape(devices * own, *rest)


def super_block(
    params: Params, visual: Array, text: Array, on: Array, stream: Stream, arch: Architecture, *, remat: bool = False
) -> tuple[Array, Array]:
    """One super-block of the plan; the unit that is scanned."""
    if arch.plan == "dense":
        for kind in KINDS:
            visual, text, _ = joint_layer(params[kind], visual, text, stream, arch)
        return visual, text
    text, _ = text_layer(params["text"], text, stream, arch.text)
    text, _, _ = cross_layer(params["cross_attention"], params["cross"], visual, text, stream, arch.text)
    return optional_self_attention(params["self"], visual, text, on, stream, arch, remat=remat)


def decode(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: Stream,
    budget: Budget,
    arch: Architecture,
    *,
    remat: bool = False,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """V and T after the last layer (before the final norm), for a budget given at run time.

    Args:
      params: the whole model's parameters, or at least `blocks` and `tail`.
      budget: booleans [slots] or [B, slots]; ignored by a dense plan.
      remat: recompute each super-block in the backward pass instead of keeping its activations.

    Raises:
      ValueError: a budget of another shape.
    """
    on = jnp.asarray(budget, bool) if arch.plan == "visor" else jnp.zeros((arch.num_blocks,), bool)
    if on.shape not in ((arch.num_blocks,), (visual.shape[0], arch.num_blocks)):
        raise ValueError(
            f"budget must have shape [slots] {(arch.num_blocks,)} or [samples, slots]"
            f" {(visual.shape[0], arch.num_blocks)}, got {on.shape}"
        )
    stream = ordered(stream)

    def body(state, block):
        (block_params, block_on), (visual, text) = block, state
        return super_block(block_params, visual, text, block_on, stream, arch, remat=remat), None

    if arch.num_blocks:  # a dense plan may be shallower than a super-block
        body = jax.checkpoint(body) if remat else body
        (visual, text), _ = scan_layers(body, (visual, text), (params["blocks"], jnp.moveaxis(on, -1, 0)))
    return run_tail(params, visual, text, stream, arch)


def run_tail(params: Params, visual: Array, text: Array, stream: Stream, arch: Architecture) -> tuple[Array, Array]:
    """The one or two layers left over when the depth is not divisible by three."""
    for i in range(arch.num_tail_layers):
        layer = at(params["tail"], i)
        if arch.plan == "dense":
            visual, text, _ = joint_layer(layer, visual, text, stream, arch)
        else:
            text, _ = text_layer(layer, text, stream, arch.text)
    return visual, text


# --- one program for one budget ---------------------------------------------------------------------------------------

Record = Callable[[str, KeysValues], None]
"""Called with "text", "cross" or "self" and a layer's keys and values, layer by layer, where a cache is being built."""


STACKS = ("blocks", "tail")


def apart(params: Params) -> Params:
    """The model's parameters with those of each super-block and tail layer in arrays of their own, held in tuples.

    For `run_layers` and the caches: a program that runs stacked layers one after the other first copies each out.
    """

    def split(stack: Params) -> tuple[Params, ...]:
        leaves, tree = jax.tree.flatten(stack)
        return tuple(jax.tree.unflatten(tree, layer) for layer in zip(*map(jnp.unstack, leaves), strict=True))

    return {name: split(x) if name in STACKS and isinstance(x, dict) else x for name, x in params.items()}


def together(params: Params) -> Params:
    """The inverse of `apart`."""

    def stack(layers: tuple[Params, ...]) -> Params:
        return jax.tree.map(lambda *x: jnp.stack(x), *layers)

    return {name: stack(x) if isinstance(x, tuple) else x for name, x in params.items()}


def layer_at(params: Params, index: int, arch: Architecture) -> Params:
    """The parameters of decoder layer `index`."""
    block, place = divmod(index, 3)
    tail = index - 3 * arch.num_blocks
    return at(params["tail"], tail) if tail >= 0 else at(params["blocks"], block)[KINDS[place]]


def at(layers: Params | tuple[Params, ...], index: int) -> Params:
    """The parameters of one of several layers, which are stacked or apart."""
    return layers[index] if isinstance(layers, tuple) else jax.tree.map(lambda x: x[index], layers)


def run_layers(
    params: Params,
    visual: Array,
    text: Array,
    stream: Stream,
    bits: Sequence[bool],
    arch: Architecture,
    *,
    layers: range | None = None,
    record: Record = lambda kind, keys_values: None,
    keep_visual: bool = True,
) -> tuple[Array, Array]:
    """Decoder layers `layers` (default: all) one after the other, with a budget known while tracing.

    Of a self-attention layer's keys and values, `record` gets the text half as "text" and the visual half as "self".
    Without `keep_visual`, V after the last layer that reads it is not computed: what is returned of it is older.
    """
    count, kinds, stream = visual.shape[1], Plan.of(arch).under(bits), ordered(stream)
    last_reader = max((index for index, kind in enumerate(kinds) if kind is not LayerKind.TEXT), default=None)
    for index in range(len(kinds)) if layers is None else layers:
        layer = layer_at(params, index, arch)
        if kinds[index] is LayerKind.SELF:
            keep = keep_visual or index != last_reader
            visual, text, both = joint_layer(layer, visual, text, stream, arch, keep_visual=keep)
            seen, own = (jax.tree.map(lambda x, part=part: x[:, part], both) for part in np.s_[:count, count:])
            record("self", seen)
        elif kinds[index] is LayerKind.CROSS:
            cross = at(params["blocks"], index // 3)["cross_attention"]
            text, own, seen = cross_layer(cross, layer, visual, text, stream, arch.text)
            record("cross", seen)
        else:
            text, own = text_layer(layer, text, stream, arch.text)
        record("text", own)
    return visual, text


def specialize(bits: Sequence[bool], arch: Architecture) -> Callable[..., tuple[Array, Array]]:
    """`decode` for one budget only: (params, visual, text, stream) -> (V, T); what is off is not in the program."""
    return partial(run_layers, bits=tuple(bool(b) for b in bits), arch=arch)
