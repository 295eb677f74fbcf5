"""Run by `test_mesh.py` in a process of its own: kernels on eight simulated devices against the references on one.

Prints one JSON object: for each kernel and mesh ("replica x fsdp x tensor") the largest difference of output and
gradients, and how many samples and KV heads, or rows and words, a device got to see. And what bringing the stream into
order of position, and a batch of mixed budgets, send between devices.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from visor_jax import testing
from visor_jax.kernels.attention import AttentionMask, api, base, xla_decode
from visor_jax.kernels.attention import pallas_tpu as tpu
from visor_jax.kernels.attention import pallas_triton as gpu
from visor_jax.kernels.attention import xla_chunked as chunked_attention
from visor_jax.kernels.cross_entropy import base as plain_cross_entropy
from visor_jax.kernels.cross_entropy import xla_chunked
from visor_jax.model.decoder import select_layer
from visor_jax.model.mixed import mixed_self_attention
from visor_jax.model.stream import TokenStream, sort_by_position, unsort, with_order
from visor_jax.scale.compiler_options import QUICK

MESHES = [(1, 4, 2), (2, 2, 2), (1, 1, 8)]
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 4, 12, 4, 2, 8
ROWS, SIZE, WORDS = 20, 5, 18
KERNELS = {  # and their meshes: what splits the work does not know which kernel it is for
    "pallas_gpu": (functools.partial(gpu.attention, tiles=gpu.Tiles(8, 8, 8, 8), interpret=True), MESHES),
    "xla_chunked": (chunked_attention.attention, MESHES[1:2]),
    "xla_decode": (xla_decode.attention, MESHES[1:2]),
    "pallas_tpu": (functools.partial(tpu.attention, tiles=tpu.Tiles(8, 8), interpret=True), MESHES[1:2]),
}


def attention_report() -> dict[str, Any]:
    order = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))
    active = jnp.array([True, False, True, True])
    mask = AttentionMask(order, order, order // 5, order // 5, active, True, order // 10)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (BATCH, LENGTH, h, HEAD_DIM)) for key, h in zip(keys, heads, strict=True)]

    def gradients(run):
        def both(q, k, v, mask):
            out, pull = jax.vjp(lambda *x: run(*x, mask), q, k, v)
            return out, *pull(jnp.cos(out))

        return jax.jit(both, compiler_options=QUICK)(*arrays, mask)

    wanted = gradients(lambda q, k, v, mask: base.attention(q, k, v, mask=mask))
    report = {}
    for name, (kernel, meshes) in KERNELS.items():
        for sizes in meshes:
            parts: set[tuple[int, int]] = set()

            def seen(q, k, v, *, mask, kernel=kernel, parts=parts):
                parts.add((k.shape[0], k.shape[2]))
                return kernel(q, k, v, mask=mask)

            with a_mesh(sizes):
                found = gradients(functools.partial(api.over_mesh, seen))
            report[f"{name} {'x'.join(map(str, sizes))}"] = {"worst": worst(found, wanted), "parts": sorted(parts)}
    return report


def cross_entropy_report() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(1), 4)
    hidden, head = jax.random.normal(keys[0], (ROWS, SIZE)), jax.random.normal(keys[1], (SIZE, WORDS))
    labels = jax.random.randint(keys[2], (ROWS,), 0, WORDS)
    weights = jax.random.uniform(keys[3], (ROWS,)) * (jnp.arange(ROWS) % 3 > 0)

    def gradients(run):
        def losses(hidden, head):
            return run(hidden, head, labels, weights, z_loss=0.01)

        def both(hidden, head):
            losses_, pull, correct = jax.vjp(losses, hidden, head, has_aux=True)
            return losses_, correct, *pull(jnp.cos(losses_))

        return jax.jit(both, compiler_options=QUICK)(hidden, head)

    wanted = gradients(plain_cross_entropy.cross_entropy)
    xla_chunked.CHUNK = 3
    forward_part, report = xla_chunked.forward_part, {}
    for sizes in MESHES:
        parts: set[tuple[int, int]] = set()

        def seen(hidden, head, labels, *, vocab_axis, parts=parts):
            parts.add((hidden.shape[0], head.shape[1]))
            return forward_part(hidden, head, labels, vocab_axis=vocab_axis)

        xla_chunked.forward_part = seen
        with a_mesh(sizes):
            found = gradients(xla_chunked.cross_entropy)
        report[f"cross_entropy {'x'.join(map(str, sizes))}"] = {"worst": worst(found, wanted), "parts": sorted(parts)}
    return report


def order_report() -> dict[str, Any]:
    """Collectives of bringing a stream whose samples are split into order, and back, with gradients."""
    ids = jnp.ones((8, 600), jnp.int32)
    stream = TokenStream(ids[:, :400], ids[:, :400], ids[:, 400:], ids[:, 400:], ids[:, 400:])

    def loss(x, stream):
        order = with_order(stream).order
        assert order is not None
        return jnp.sum(unsort(jnp.sin(sort_by_position(x, order)), order) ** 2)

    with a_mesh((2, 4, 1)) as mesh:
        samples = NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
        x, stream = jax.tree.map(lambda x: jax.device_put(x, samples), (jnp.ones((8, 600, 4)), stream))
        text = jax.jit(jax.grad(loss)).lower(x, stream).compile().as_text() or ""
    return {"order": re.findall(r" (all-\w+|collective-\w+|scatter)\(", text)}


def mixed_report() -> dict[str, Any]:
    """A slot in a batch that is split, some of whose samples have it on: worst difference, and what devices send."""
    arch = testing.tiny_architecture(3)
    layer = select_layer(testing.random_params(arch)["blocks"], 0)["self"]
    visual, text, stream = testing.decoder_inputs(arch, testing.random_batch(arch, (((3, 4),), ((2, 2),)) * 8))
    on = jnp.arange(visual.shape[0]) % 3 == 0

    def slot(layer, visual, text, on, stream):
        return mixed_self_attention(layer, visual, text, on, stream, arch)

    wanted = slot(layer, visual, text, on, stream)
    with a_mesh((2, 4, 1)) as mesh:
        samples, whole = NamedSharding(mesh, PartitionSpec(("replica", "fsdp"))), NamedSharding(mesh, PartitionSpec())
        inputs = jax.tree.map(lambda x: jax.device_put(x, samples), (visual, text, on, stream))
        program = jax.jit(slot).lower(jax.device_put(layer, whole), *inputs).compile()
        found = program(jax.device_put(layer, whole), *inputs)
    sent = re.findall(r"= (\S+) (all-\w+|collective-\w+|scatter)(?:-start)?\(", program.as_text() or "")
    return {"mixed": {"worst": worst(found, wanted), "sent": sorted({" ".join(x) for x in sent})}}


@contextlib.contextmanager
def a_mesh(sizes: tuple[int, int, int]) -> Iterator[Mesh]:
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), ("replica", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        yield mesh


def worst(found, wanted) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(float(np.max(np.abs(np.asarray(x, float) - np.asarray(y, float)))) for x, y in pairs)


if __name__ == "__main__":
    print(json.dumps(attention_report() | cross_entropy_report() | order_report() | mixed_report()))
