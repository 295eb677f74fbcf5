"""Cross-entropy in plain XLA without an array of rows by vocabulary: a scan over chunks of rows.

In and out: as `base.cross_entropy`. The backward pass recomputes each chunk's logits and their
softmax from the saved log-sum-exp. Under a mesh (`jax.set_mesh`) each device holds its rows and, over the axis that
splits the head's columns, its part of the vocabulary. Devices exchange only maxima, denominators, label logits and sums
of gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num

from visor_jax.kernels import mesh
from visor_jax.kernels.cross_entropy.base import in_vocabulary, validate

CHUNK = 256  # rows


def cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    labels: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    z_loss: float = 0.0,
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    """`base.cross_entropy` at the memory of one chunk of rows; reverse-mode gradients of `hidden` and `head`.

    Raises:
      ValueError: an argument of the wrong shape or dtype; the message names it.
    """
    validate(hidden, head, labels, weights)
    if hidden.shape[0] == 0:
        return jnp.zeros(0, jnp.float32), jnp.zeros(0, bool)
    # 0 * NaN is NaN: rows that do not count are replaced before they are multiplied, not after.
    counted = weights != 0
    hidden, labels = jnp.where(counted[:, None], hidden, 0), jnp.where(counted, labels, 0)
    losses, correct = cast(tuple[Array, Array], _unweighted(hidden, head, labels, z_loss))
    losses = in_vocabulary(losses, labels, head) * weights.astype(jnp.float32)
    return jnp.where(counted, losses, 0), correct & counted


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _unweighted(hidden: Array, head: Array, labels: Array, z_loss: float) -> tuple[Array, Array]:
    return _forward(hidden, head, labels, z_loss)[0]


def _forward(hidden: Array, head: Array, labels: Array, z_loss: float):
    row_axes, vocab_axis = axes_of(hidden, head)
    run = mesh.on_each_device(
        functools.partial(forward_part, vocab_axis=vocab_axis),
        (PartitionSpec(row_axes), PartitionSpec(None, vocab_axis), PartitionSpec(row_axes)),
        (PartitionSpec(row_axes),) * 3,
    )
    log_sum, label_logits, best = run(hidden, head, labels)
    return (log_sum - label_logits + z_loss * log_sum**2, best == labels), (hidden, head, labels, log_sum)


def _backward(z_loss: float, saved, grads: tuple[Array, Array]):
    hidden, head, labels, log_sum = saved
    row_axes, vocab_axis = axes_of(hidden, head)
    rows_spec, head_spec = PartitionSpec(row_axes), PartitionSpec(None, vocab_axis)
    run = mesh.on_each_device(
        functools.partial(backward_part, row_axes=row_axes, vocab_axis=vocab_axis),
        (rows_spec, head_spec, rows_spec, rows_spec, rows_spec, rows_spec),
        (rows_spec, head_spec),
    )
    grad = grads[0]
    # The gradient of a logit is its softmax times `slope`, less `grad` at the label.
    slope = grad * (1 + 2 * z_loss * log_sum)
    grad_hidden, grad_head = run(hidden, head, labels, log_sum, slope, grad)
    return grad_hidden, grad_head, np.zeros(labels.shape, jax.dtypes.float0)


_unweighted.defvjp(_forward, _backward)


# --- one device's rows and vocabulary ---------------------------------------------------------------------------------


def forward_part(
    hidden: Float[Array, "N D"], head: Float[Array, "D V"], labels: Int[Array, " N"], *, vocab_axis: str | None
) -> tuple[Float[Array, " N"], Float[Array, " N"], Int[Array, " N"]]:
    """Log-sum-exp, label logit and likeliest token id of each row; the mesh axis `vocab_axis` splits the vocabulary."""
    offset = vocab_offset(head, vocab_axis)

    def chunk(_, part):
        states, targets = part
        logits = product(states, head)
        local_max = jnp.max(logits, axis=1)
        max_logit = across(jax.lax.pmax, local_max, vocab_axis)
        denominator = across(jax.lax.psum, jnp.sum(jnp.exp(logits - max_logit[:, None]), axis=1), vocab_axis)
        label_logits = across(
            jax.lax.psum, jnp.sum(jnp.where(is_label(targets, logits, offset), logits, 0), 1), vocab_axis
        )
        # Of equal logits the first wins, over all devices.
        best = jnp.where(local_max == max_logit, offset + jnp.argmax(logits, axis=1), np.iinfo(np.int32).max)
        return None, (max_logit + jnp.log(denominator), label_logits, across(jax.lax.pmin, best, vocab_axis))

    _, per_chunk = jax.lax.scan(chunk, None, (in_chunks(hidden), in_chunks(labels)))
    log_sum, label_logits, best = (x.reshape(-1)[: labels.shape[0]] for x in per_chunk)
    return log_sum, label_logits, best


def backward_part(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    labels: Int[Array, " N"],
    log_sum: Float[Array, " N"],
    slope: Float[Array, " N"],
    grad: Float[Array, " N"],
    *,
    row_axes: tuple[str, ...],
    vocab_axis: str | None,
) -> tuple[Float[Array, "N D"], Float[Array, "D V"]]:
    """Gradients of this device's rows and vocabulary."""
    offset = vocab_offset(head, vocab_axis)

    def chunk(grad_head, part):
        states, targets, logs, slopes, grads = part
        logits = product(states, head)
        grad_logits = slopes[:, None] * jnp.exp(logits - logs[:, None])
        grad_logits -= jnp.where(is_label(targets, logits, offset), grads[:, None], 0)
        grad_logits = grad_logits.astype(head.dtype)
        return grad_head + product(states.T, grad_logits), product(grad_logits, head.T)

    parts = tuple(in_chunks(x) for x in (hidden, labels, log_sum, slope, grad))
    grad_head, grad_hidden = jax.lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), parts)
    grad_hidden = across(jax.lax.psum, grad_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], vocab_axis)
    return grad_hidden.astype(hidden.dtype), across(jax.lax.psum, grad_head, row_axes).astype(head.dtype)


def in_chunks(x: Num[Array, "N ..."]) -> Num[Array, "n C ..."]:
    """Rows in chunks; the last chunk is padded with zeros."""
    size = min(CHUNK, max(x.shape[0], 1))
    x = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])


def product(x: Float[Array, "M K"], y: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """The matrix product, summed in float32."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def is_label(labels: Int[Array, " C"], logits: Float[Array, "C V"], offset: Int[Array, ""] | int) -> Bool[Array, "C V"]:
    """Whether each column, a token id from `offset` on, is the label of each row."""
    return (offset + jnp.arange(logits.shape[1]))[None] == labels[:, None]


# --- the mesh ---------------------------------------------------------------------------------------------------------


def axes_of(hidden: Float[Array, "N D"], head: Float[Array, "D V"]) -> tuple[tuple[str, ...], str | None]:
    """The axes of the ambient mesh that split rows, and the axis that splits the vocabulary."""
    return mesh.sample_axes(hidden.shape[0]), mesh.split_axis(head.shape[1])


def vocab_offset(head: Float[Array, "D V"], vocab_axis: str | None) -> Int[Array, ""] | int:
    """The first token id of this device's part of the vocabulary."""
    return 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * head.shape[1]


def across(
    collective: Callable[..., Array], x: Num[Array, "..."], axes: tuple[str, ...] | str | None
) -> Num[Array, "..."]:
    """`collective` over mesh axes; `x` itself without axes."""
    return collective(x, axes) if axes else x
