"""Which implementation of attention runs: the caller's choice, or one readable table.

In: the arguments of `base.attention` and the name of an implementation, or None. Out: what `base.attention` promises.
Under a mesh (`jax.set_mesh`) kernels and loops run on each device's samples and heads, and what they can serve is asked
of these; XLA splits the rest itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from visor_jax.kernels import mesh
from visor_jax.kernels.attention import base, xla_chunked, xla_decode
from visor_jax.kernels.attention import dot_product_attention as library
from visor_jax.kernels.attention import pallas_tpu as tpu
from visor_jax.kernels.attention import pallas_triton as gpu
from visor_jax.kernels.attention.base import AttentionMask

Implementation = Literal["xla", "xla_chunked", "xla_decode", "pallas_tpu", "pallas_gpu", "cudnn", "splash", "tokamax"]
Refusal = Callable[[Array, Array, AttentionMask], str | None]


class Entry(NamedTuple):
    """An implementation: the function, the platforms it runs on (None: all), and why it cannot serve (q, k, mask).

    One that is `partitioned` is split over a mesh by XLA; the others run on each device's part.
    """

    run: Callable[..., Array]
    platforms: tuple[str, ...] | None = None
    refusal: Refusal = lambda q, k, mask: None
    partitioned: bool = False

    def reason(self, q: Float[Array, "B Tq H D"], k: Float[Array, "B Tk K D"], mask: AttentionMask) -> str | None:
        if self.platforms is not None and platform() not in self.platforms:
            return f"it runs on {' or '.join(self.platforms)}, and this is computed on {platform()}"
        return self.refusal(q, k, mask) if self.partitioned else self.refusal(*on_one_device(q, k), mask)


IMPLEMENTATIONS: dict[str, Entry] = {
    "xla": Entry(base.attention, partitioned=True),
    "xla_chunked": Entry(xla_chunked.attention),
    "xla_decode": Entry(xla_decode.attention, None, xla_decode.refusal),
    "pallas_tpu": Entry(tpu.attention, ("tpu",), tpu.refusal),
    "pallas_gpu": Entry(gpu.attention, ("gpu",), lambda q, k, mask: gpu.refusal(q, k, mask) or gpu.device_refusal()),
    "cudnn": Entry(library.cudnn, ("gpu",), library.cudnn_refusal),
    "splash": Entry(library.splash, ("tpu",), library.splash_refusal),
    "tokamax": Entry(library.tokamax, None, library.tokamax_refusal),
}

ANY = ("cpu", "gpu", "tpu")


class Choice(NamedTuple):
    """A line of the table: on these platforms, for at most so many queries and at least so many logits, take `name`.

    Logits are counted of one head of one sample: queries times keys.
    """

    platforms: tuple[str, ...]
    most_queries: float
    least_logits: int
    name: Implementation


PLAIN_LOGITS = 512 * 512  # logits of one head: so many stay in cache, and one plain einsum beats a loop

# The first line that holds, and whose implementation can serve, is taken. Large logits need not be kept. A single query
# is a decoding step. (A GPU waits for the host at every turn of a loop of unknown length, so that it does not decode by
# `xla_decode`. On a CPU that one loses a third of a millisecond on a single full cache and gains wherever there is room
# left or lengths differ. cuDNN leads until `pallas_gpu` has been measured to be faster; till then that one is taken by
# name, also for float32, which cuDNN does not serve.)
CHOICE = (
    Choice(("cpu", "tpu"), 1, 2048, "xla_decode"),
    Choice(("tpu",), math.inf, PLAIN_LOGITS + 1, "pallas_tpu"),
    Choice(("gpu",), math.inf, PLAIN_LOGITS + 1, "cudnn"),
    Choice(ANY, math.inf, PLAIN_LOGITS + 1, "xla_chunked"),
    Choice(ANY, math.inf, 0, "xla"),
)


def attention(
    q: Float[Array, "B Tq H D"],
    k: Float[Array, "B Tk K D"],
    v: Float[Array, "B Tk K D"],
    *,
    mask: AttentionMask,
    implementation: Implementation | None = None,
) -> Float[Array, "B Tq H D"]:
    """Attention of `q` over `k` and `v` where `mask` lets it see; the contract is `base.attention`'s.

    Args:
      q: queries [B,Tq,H,D], floating point.
      k, v: keys and values [B,Tk,K,D] of the same dtype; H is a multiple of K.
      mask: who sees whom; see `AttentionMask`.
      implementation: a name of `IMPLEMENTATIONS`; None takes the one that `CHOICE` names for these arrays.

    Gradients are reverse-mode and of first order: what is chosen for small arrays has others too, the loops and kernels
    for large ones have not.

    Returns:
      [B,Tq,H,D] in the dtype of q; exactly 0, with zero gradients, for a query that may see nothing.

    Raises:
      ValueError: an argument of the wrong shape or dtype, an implementation that does not exist, or a forced one that
        cannot serve, with its reason. A forced implementation is never replaced by another.
    """
    base.validate(q, k, v, mask)
    q, k, v, mask = jax.tree.map(jnp.asarray, (q, k, v, mask))  # NumPy's arrays do not take a traced index
    name = choose(q, k, mask) if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r} does not exist; known are {', '.join(IMPLEMENTATIONS)}")
    entry = IMPLEMENTATIONS[name]
    if reason := entry.reason(q, k, mask):
        raise ValueError(f"implementation {name!r} cannot serve: {reason}; implementation=None chooses one that can")
    if entry.partitioned:
        return entry.run(q, k, v, mask=mask)
    return over_mesh(entry.run, q, k, v, mask)


def choose(q: Float[Array, "B Tq H D"], k: Float[Array, "B Tk K D"], mask: AttentionMask) -> Implementation:
    """The first line of `CHOICE` that holds for these arrays on this platform."""
    queries, logits, here = q.shape[1], q.shape[1] * k.shape[1], platform()
    for platforms, most, least, name in CHOICE:
        holds = here in platforms and queries <= most and logits >= least
        if holds and IMPLEMENTATIONS[name].reason(q, k, mask) is None:
            return name
    raise ValueError(f"no implementation of attention serves platform {here!r}; known are {', '.join(ANY)}")


def platform() -> str:
    """Where what is being traced will run: on the devices of the ambient mesh, else on JAX's default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform
    default = jax.default_device.value
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform


def on_one_device(q: Float[Array, "B Tq H D"], k: Float[Array, "B Tk K D"]) -> tuple[Any, Any]:
    """Shapes of what `over_mesh` gives one device of queries and keys."""
    sizes, heads = mesh.free_axes(), mesh.split_axis(k.shape[2])
    samples = math.prod(sizes[axis] for axis in mesh.sample_axes(q.shape[0]))

    def part(x: Array) -> Any:
        batch, length, num_heads, head_dim = x.shape
        shape = (batch // samples, length, num_heads // (sizes[heads] if heads else 1), head_dim)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return part(q), part(k)


def over_mesh(
    run: Callable[..., Array],
    q: Float[Array, "B Tq H D"],
    k: Float[Array, "B Tk K D"],
    v: Float[Array, "B Tk K D"],
    mask: AttentionMask,
) -> Array:
    """`run` on each device's samples and heads; what an axis of the mesh does not divide stays whole."""
    samples = mesh.sample_axes(q.shape[0])
    of_arrays = PartitionSpec(samples, None, mesh.split_axis(k.shape[2]))
    of_mask = jax.tree.map(lambda _: PartitionSpec(samples), mask)
    part = mesh.on_each_device(
        lambda q, k, v, mask: run(q, k, v, mask=mask), (of_arrays, of_arrays, of_arrays, of_mask), of_arrays
    )
    return part(q, k, v, mask)
