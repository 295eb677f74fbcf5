"""Chooses the implementation of attention: by name, or by the first matching row of one table.

In: the arguments of `base.attention` and the name of an implementation, or None. Out: as `base.attention`.
Under a mesh (`jax.set_mesh`) kernels and loops run on each device's samples and heads, and `refusal` is called with the
shapes of one device; XLA partitions the reference itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from visor_jax.kernels import mesh
from visor_jax.kernels.attention import base, xla_chunked, xla_decode
from visor_jax.kernels.attention import dot_product_attention as library
from visor_jax.kernels.attention import pallas_tpu as tpu
from visor_jax.kernels.attention import pallas_triton as gpu
from visor_jax.kernels.attention.base import AnyArray, ArrayOrShape, AttentionMask

Implementation = Literal["xla", "xla_chunked", "xla_decode", "pallas_tpu", "pallas_gpu", "cudnn", "splash", "tokamax"]
Refusal = Callable[[ArrayOrShape, ArrayOrShape, AttentionMask], str | None]


class Entry(NamedTuple):
    """An implementation: the function, the platforms it runs on (None: all), and why it cannot serve (q, k, mask).

    XLA partitions an entry that is `partitioned` over a mesh; the others run on each device's part.
    """

    run: Callable[..., Array]
    platforms: tuple[str, ...] | None = None
    refusal: Refusal = lambda q, k, mask: None
    partitioned: bool = False

    def reason(
        self, q: Float[ArrayOrShape, "B Tq H D"], k: Float[ArrayOrShape, "B Tk K D"], mask: AttentionMask
    ) -> str | None:
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
    """A row of the table: on these platforms, for at most `max_queries` and at least `min_logits`, take `name`.

    Logits are those of one head of one sample: queries times keys.
    """

    platforms: tuple[str, ...]
    max_queries: float
    min_logits: int
    name: Implementation


PLAIN_LOGITS = 512 * 512  # logits of one head: up to this many stay in cache, and one plain einsum beats a loop

# `choose` takes the first row that matches and whose implementation can serve. Large logits need not be kept. A single
# query is a decoding step. GPUs do not use `xla_decode`: they wait for the host at every iteration of a loop of unknown
# length. On a CPU it loses a third of a millisecond on a single full cache and gains wherever the cache has free room
# or lengths differ. cuDNN comes first on GPUs until `pallas_gpu` is measured to be faster; until then `pallas_gpu` runs
# only by name, also for float32, which cuDNN does not serve.
CHOICE = (
    Choice(("cpu", "tpu"), 1, 2048, "xla_decode"),
    Choice(("tpu",), math.inf, PLAIN_LOGITS + 1, "pallas_tpu"),
    Choice(("gpu",), math.inf, PLAIN_LOGITS + 1, "cudnn"),
    Choice(ANY, math.inf, PLAIN_LOGITS + 1, "xla_chunked"),
    Choice(ANY, math.inf, 0, "xla"),
)


def attention(
    q: Float[AnyArray, "B Tq H D"],
    k: Float[AnyArray, "B Tk K D"],
    v: Float[AnyArray, "B Tk K D"],
    *,
    mask: AttentionMask,
    implementation: Implementation | None = None,
) -> Float[Array, "B Tq H D"]:
    """Attention of `q` over `k` and `v` where `mask` allows it; the contract is `base.attention`'s.

    Args:
      q: queries [B,Tq,H,D], floating point.
      k, v: keys and values [B,Tk,K,D] of the same dtype; H is a multiple of K.
      mask: which key each query may see; see `AttentionMask`.
      implementation: a name of `IMPLEMENTATIONS`; None takes the one that `CHOICE` names for these arrays.

    Gradients are reverse-mode and of first order; only "xla", the choice for small arrays, supports others too.

    Returns:
      [B,Tq,H,D] in the dtype of q; exactly 0, with zero gradients, for a query that may see nothing.

    Raises:
      ValueError: an argument of the wrong shape or dtype, an implementation that does not exist, or a forced one that
        cannot serve, with its reason. A forced implementation is never replaced by another.
    """
    q, k, v, mask = base.validated(q, k, v, mask)
    name = choose(q, k, mask) if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r} does not exist; known are {', '.join(IMPLEMENTATIONS)}")
    entry = IMPLEMENTATIONS[name]
    if reason := entry.reason(q, k, mask):
        raise ValueError(f"implementation {name!r} cannot serve: {reason}; implementation=None chooses one that can")
    if entry.partitioned:
        return entry.run(q, k, v, mask=mask)
    return over_mesh(entry.run, q, k, v, mask)


def choose(
    q: Float[ArrayOrShape, "B Tq H D"], k: Float[ArrayOrShape, "B Tk K D"], mask: AttentionMask
) -> Implementation:
    """The first row of `CHOICE` that matches these arrays on this platform and can serve them."""
    queries, logits, here = q.shape[1], q.shape[1] * k.shape[1], platform()
    for platforms, max_queries, min_logits, name in CHOICE:
        matches = here in platforms and queries <= max_queries and logits >= min_logits
        if matches and IMPLEMENTATIONS[name].reason(q, k, mask) is None:
            return name
    raise ValueError(f"no implementation of attention serves platform {here!r}; known are {', '.join(ANY)}")


def platform() -> str:
    """The platform that the traced program runs on: the ambient mesh's devices, else JAX's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform
    default = jax.default_device.value
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform


def on_one_device(q: Float[ArrayOrShape, "B Tq H D"], k: Float[ArrayOrShape, "B Tk K D"]) -> tuple[Any, Any]:
    """Shapes of the queries and keys that `over_mesh` gives one device."""
    sizes, heads = mesh.free_axes(), mesh.split_axis(k.shape[2])
    samples = math.prod(sizes[axis] for axis in mesh.sample_axes(q.shape[0]))

    def part(x: Float[ArrayOrShape, "B T H D"]) -> Any:
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
) -> Float[Array, "B Tq H D"]:
    """`run` on each device's samples and heads; a dimension that an axis does not divide is not split."""
    samples = mesh.sample_axes(q.shape[0])
    of_arrays = PartitionSpec(samples, None, mesh.split_axis(k.shape[2]))
    of_mask = jax.tree.map(lambda _: PartitionSpec(samples), mask)
    part = mesh.on_each_device(
        lambda q, k, v, mask: run(q, k, v, mask=mask), (of_arrays, of_arrays, of_arrays, of_mask), of_arrays
    )
    return part(q, k, v, mask)
