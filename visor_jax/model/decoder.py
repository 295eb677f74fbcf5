"""The decoder: text-only layers first, super-blocks of `Architecture.pattern`, what is left over (docs/method.md).

Visual tokens V [B, Nv, D] and text tokens T [B, Nt, D] travel as two arrays; where they stand in the dense sequence is
told by their position ids, so nothing is ever interleaved. Two ways of running the same layers:

* `decode`: one `lax.scan` over the stacked super-blocks; the budget is a run-time array of booleans, one for the whole
  batch ([slots]) or one per sample ([B, slots]). One compiled program serves every budget, and a slot that is off does
  no visual work (`lax.cond`).
* `run_layers`: the layers one after the other with a budget known while tracing; what is off is not in the program.
  `specialize(budget)` is `decode` built this way, and generation's caches (`visor_jax.model.incremental`) rest on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from visor_jax.architecture import Architecture, LayerPlace, TextArchitecture
from visor_jax.budget import LayerKind, Plan
from visor_jax.model.encoders.siglip import stacked
from visor_jax.model.layers import Params, Qwen2Attention, Qwen2Layer, inside, recency_bias, scan_layers
from visor_jax.model.mixed import optional_self_attention
from visor_jax.model.stream import Stream, ordered
from visor_jax.model.super_block import CrossAttention, KeysValues, cross_layer, joint_layer, text_layer

Budget = Sequence[bool] | Bool[Array, " slots"] | Bool[Array, "B slots"]


# --- declarations -----------------------------------------------------------------------------------------------------


class Blocks(nnx.Module):
    """All super-blocks, every parameter stacked over them, under the names of `Architecture.block`."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        for place in arch.block:
            layers = stacked(lambda r: Qwen2Layer(arch.text, rngs=r), arch.num_blocks, rngs)
            if place.kind is not LayerKind.SELF:  # near in the stream is not near in a picture
                start_with_recency(layers.self_attn, arch.text)
            self._put(place.path, layers)
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


def start_with_recency(attention: Qwen2Attention, arch: TextArchitecture) -> None:
    """Stacked text-only attention prefers near tokens, but in the first super-block, where the routing token reads."""
    for projection in (attention.q_proj, attention.k_proj):
        blocks, width = projection.bias.shape
        near = np.tile(recency_bias(arch), width // arch.head_dim)
        projection.bias[...] = jnp.asarray((np.arange(blocks) > 0)[:, None] * near, jnp.float32)


# --- one program for all budgets --------------------------------------------------------------------------------------


def super_block(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    on: Bool[Array, "slots *B"],
    stream: Stream,
    arch: Architecture,
    *,
    remat: bool = False,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """One super-block of the plan, the unit that is scanned: `params` are its own, `on` [slots of it] or [.., B]."""
    slots = iter(range(arch.slots_per_block))
    for place in arch.block:
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


def by_block(budget: Budget, arch: Architecture) -> Bool[Array, "blocks slots *B"]:
    """A budget [slots] or [B, slots] as super-blocks see it: their own slots, samples last."""
    on = jnp.asarray(budget, bool)
    on = on.reshape(*on.shape[:-1], arch.num_blocks, arch.slots_per_block)
    return jnp.moveaxis(on, (-2, -1), (0, 1))


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
      params: the whole model's parameters, or at least `head`, `blocks` and `tail` where it has them.
      budget: booleans [slots] or [B, slots]; ignored by a dense plan.
      remat: recompute each super-block in the backward pass instead of keeping its activations.

    Raises:
      ValueError: a budget of another shape.
    """
    slots = arch.num_blocks * arch.slots_per_block
    on = jnp.asarray(budget, bool) if arch.plan == "visor" else jnp.zeros((slots,), bool)
    if on.shape not in ((slots,), (visual.shape[0], slots)):
        raise ValueError(
            f"budget must have shape [slots] {(slots,)} or [samples, slots] {(visual.shape[0], slots)}, got {on.shape}"
        )
    stream = ordered(stream)
    visual, text = run_outside(params, "head", arch.num_head_layers, visual, text, stream, arch)

    def body(state, block):
        (block_params, block_on), (visual, text) = block, state
        return super_block(block_params, visual, text, block_on, stream, arch, remat=remat), None

    if arch.num_blocks:  # a dense plan may be shallower than a super-block
        body = jax.checkpoint(body) if remat else body
        (visual, text), _ = scan_layers(body, (visual, text), (params["blocks"], by_block(on, arch)))
    return run_outside(params, "tail", arch.num_tail_layers, visual, text, stream, arch)


def run_outside(
    params: Params,
    stack: str,
    count: int,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: Stream,
    arch: Architecture,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """The layers before ("head") or after ("tail") the super-blocks: text-only, but in a dense plan."""
    for i in range(count):
        layer = at(params[stack], i)
        if arch.plan == "dense":
            visual, text, _ = joint_layer(layer, visual, text, stream, arch)
        else:
            text, _ = text_layer(layer, text, stream, arch.text)
    return visual, text


# --- one program for one budget ---------------------------------------------------------------------------------------

Record = Callable[[str, KeysValues], None]
"""Called with "text", "cross" or "self" and a layer's keys and values, layer by layer, where a cache is being built."""


STACKS = ("head", "blocks", "tail")


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


def layer_at(params: Params, place: LayerPlace) -> Params:
    """The parameters of one decoder layer."""
    return _at_path(params, place.path, place.index)


def cross_at(params: Params, place: LayerPlace) -> Params:
    """The parameters of the cross-attention of a decoder layer that has one."""
    return _at_path(params, place.cross, place.index)


def _at_path(params: Params, path: str, index: int) -> Params:
    return inside(at(params[path.split("/")[0]], index), path)


def at(layers: Params | tuple[Params, ...], index: int) -> Params:
    """The parameters of one of several layers, which are stacked or apart."""
    return layers[index] if isinstance(layers, tuple) else jax.tree.map(lambda x: x[index], layers)


def run_layers(
    params: Params,
    visual: Float[Array, "B Nv D"],
    text: Float[Array, "B Nt D"],
    stream: Stream,
    bits: Sequence[bool],
    arch: Architecture,
    *,
    layers: range | None = None,
    record: Record = lambda kind, keys_values: None,
    keep_visual: bool = True,
) -> tuple[Float[Array, "B Nv D"], Float[Array, "B Nt D"]]:
    """Decoder layers `layers` (default: all) one after the other, with a budget known while tracing.

    Of a self-attention layer's keys and values, `record` gets the text half as "text" and the visual half as "self".
    Without `keep_visual`, V after the last layer that reads it is not computed: what is returned of it is older.
    """
    count, kinds, stream = visual.shape[1], Plan.of(arch).under(bits), ordered(stream)
    last_reader = max((index for index, kind in enumerate(kinds) if kind is not LayerKind.TEXT), default=None)
    for index in range(len(kinds)) if layers is None else layers:
        place = arch.layers[index]
        layer = layer_at(params, place)
        if kinds[index] is LayerKind.SELF:
            keep = keep_visual or index != last_reader
            visual, text, both = joint_layer(layer, visual, text, stream, arch, keep_visual=keep)
            seen, own = (jax.tree.map(lambda x, part=part: x[:, part], both) for part in np.s_[:count, count:])
            record("self", seen)
        elif kinds[index] is LayerKind.CROSS:
            text, own, seen = cross_layer(cross_at(params, place), layer, visual, text, stream, arch.text)
            record("cross", seen)
        else:
            text, own = text_layer(layer, text, stream, arch.text)
        record("text", own)
    return visual, text


def specialize(bits: Sequence[bool], arch: Architecture) -> Callable[..., tuple[Array, Array]]:
    """`decode` for one budget only: (params, visual, text, stream) -> (V, T); what is off is not in the program."""
    return partial(run_layers, bits=tuple(bool(b) for b in bits), arch=arch)
