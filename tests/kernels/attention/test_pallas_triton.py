"""Properties of the GPU kernels beyond the contract: lowering for CUDA at real shapes, and refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from visor_jax.kernels.attention import AttentionMask
from visor_jax.kernels.attention import pallas_triton as gpu
from visor_jax.kernels.attention.blocks import NOTHING, block_kinds


@pytest.fixture(autouse=True)
def an_h100() -> Iterator[None]:
    """The target of lowering, which JAX 0.11 reads from a device that does not exist here."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("one",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def arguments(dtype, q_length: int, kv_length: int, heads: int, kv_heads: int, head_dim: int, causal: bool):
    def made():
        q_ids, kv_ids = jnp.zeros((2, q_length), jnp.int32), jnp.zeros((2, kv_length), jnp.int32)
        kv = jnp.zeros((2, kv_length, kv_heads, head_dim), dtype)
        mask = AttentionMask(q_ids, kv_ids, q_ids, kv_ids, jnp.ones(2, bool), causal)
        return jnp.zeros((2, q_length, heads, head_dim), dtype), kv, mask

    return jax.eval_shape(made)


@pytest.mark.parametrize(
    "case",
    [
        (jnp.bfloat16, 8832, 8832, 14, 2, 64, True),
        (jnp.bfloat16, 512, 8832, 28, 4, 128, False),
        (jnp.bfloat16, 729, 729, 16, 16, 72, False),
        (jnp.float32, 1000, 3000, 8, 8, 80, True),
        (jnp.float16, 100, 77, 4, 1, 64, True),
    ],
    ids=str,
)
def test_lowers_for_cuda(case):
    """Triton accepts shapes, layouts and operations; interpreted runs check the results."""

    def loss(q, kv, mask):
        return jnp.sum(gpu.attention(q, kv, kv, mask=mask).astype(jnp.float32) ** 2)

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*arguments(*case)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    for kernel in ("forward_kernel", "grad_q_kernel", "grad_kv_kernel"):
        assert f"attention_{kernel}" in text


@pytest.mark.parametrize("q_length", [1, 1000], ids=["keys split", "whole"])
def test_lowers_for_cuda_with_shared_segments(q_length):
    q, kv, mask = arguments(jnp.bfloat16, q_length, 3000, 8, 2, 64, True)
    mask = dataclasses.replace(mask, q_shared_segments=mask.q_segments)
    step = jax.jit(lambda q, kv, mask: gpu.attention(q, kv, kv, mask=mask)).trace(q, kv, mask)
    assert "attention_forward_kernel" in step.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (28, 4, 128), (12, 2, 128)])
def test_a_decoding_step_lowers_with_keys_split(heads, kv_heads, head_dim):
    shapes = arguments(jnp.bfloat16, 1, 8832, heads, kv_heads, head_dim, True)
    step = jax.jit(lambda q, kv, mask: gpu.attention(q, kv, kv, mask=mask)).trace(*shapes)
    assert "attention_forward_kernel" in step.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [eqn for eqn in all_equations(step.jaxpr.jaxpr) if eqn.primitive.name == "pallas_call"]
    # 46 parts of 192 keys of each of two samples; all heads of a KV head are rows of one block
    assert call.params["grid_mapping"].grid == (1, kv_heads, 2 * 46)
    assert not [eqn for eqn in all_equations(step.jaxpr.jaxpr) if copies_the_cache(eqn)]


def all_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from all_equations(inner)


def copies_the_cache(equation) -> bool:
    """Whether it writes something of the cache's size elsewhere; a pad by nothing does not."""
    if equation.primitive.name not in ("pad", "transpose", "convert_element_type"):
        return False
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    return after.size >= 2 * 8832 * 64 and (equation.primitive.name != "pad" or before.shape != after.shape)


@pytest.mark.parametrize(("length", "part"), [(8832, 192), (8192, 256), (300, 256), (320, 256), (7 * 64, 256)])
def test_parts_leave_no_padding_where_they_need_not(length, part):
    assert gpu.chunk_size_for(length, gpu.Tiles()) == part


def test_a_program_visits_the_blocks_with_work_and_no_other():
    order = jnp.arange(32)[None]
    segments = jnp.array([[1] * 12 + [2] * 12 + [0] * 8])
    mask = AttentionMask(order, order, segments, segments)
    q = jnp.zeros((1, 32, 2, 8))
    call = gpu.Call.of(q, q, mask, 4, 8, True)
    kinds = np.asarray(block_kinds(call.mask, 4, 8)) != NOTHING
    for by_keys, wanted in ((False, kinds[0]), (True, kinds[0].T)):
        for row, expected in zip(np.asarray(call.work(by_keys=by_keys))[0], wanted, strict=True):
            assert row[0] == expected.sum()
            np.testing.assert_array_equal(row[1 : 1 + row[0]], np.nonzero(expected)[0])
    assert 0 < kinds.sum() < kinds.size


def test_serves_where_python_numbers_are_wide():
    order = jnp.arange(12)[None].astype(jnp.int32)
    mask = AttentionMask(order, order, jnp.ones_like(order), jnp.ones_like(order))
    q, kv = jnp.ones((1, 12, 4, 8), jnp.float32), jnp.ones((1, 12, 2, 8), jnp.float32)

    def loss(q, kv):
        return jnp.sum(gpu.attention(q, kv, kv, mask=mask, tiles=gpu.Tiles(4, 4, 4, 4), interpret=True) ** 2)

    narrow = jax.grad(loss, (0, 1))(q, kv)
    with jax.enable_x64(True):
        for wide, found in zip(jax.grad(loss, (0, 1))(q, kv), narrow, strict=True):
            np.testing.assert_allclose(wide, found, atol=1e-6)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("dtype", "head_dim", "message"), [(jnp.int32, 64, "floating"), (jnp.bfloat16, 512, "512")])
def test_refuses_with_its_reason(dtype, head_dim, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda q, kv, mask: gpu.attention(q, kv, kv, mask=mask), *arguments(dtype, 64, 64, 2, 2, head_dim, True)
        )
