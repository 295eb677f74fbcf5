"""The choice of an implementation, and the imports of attention."""

from __future__ import annotations

import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

import visor_jax.kernels
from visor_jax.kernels.attention import AttentionMask, api, base

ONES = jnp.ones((1, 3), jnp.int32)
MASK = visor_jax.kernels.AttentionMask(ONES, ONES, ONES, ONES)
Q = jnp.ones((1, 3, 2, 4))


def test_the_function_and_the_folder_of_the_same_name():
    assert jax.eval_shape(lambda: visor_jax.kernels.attention(Q, Q, Q, mask=MASK)).shape == Q.shape
    assert isinstance(base, types.ModuleType) and base.attention is not visor_jax.kernels.attention
    from visor_jax.kernels.attention import AttentionMask, attention

    assert attention is visor_jax.kernels.attention
    assert AttentionMask is visor_jax.kernels.AttentionMask


def shapes(q_length: int, kv_length: int, dtype=jnp.float32, head_dim: int = 64):
    """Returns shapes of the arguments of attention with 14 heads over 2 key/value heads."""

    def made():
        q_ids, kv_ids = jnp.zeros((1, q_length), jnp.int32), jnp.zeros((1, kv_length), jnp.int32)
        q, kv = jnp.zeros((1, q_length, 14, head_dim), dtype), jnp.zeros((1, kv_length, 2, head_dim), dtype)
        return q, kv, AttentionMask(q_ids, kv_ids, q_ids, kv_ids)

    return jax.eval_shape(made)


@pytest.mark.parametrize(
    ("platform", "arguments", "name"),
    [
        ("cpu", shapes(150, 150), "xla"),
        ("cpu", shapes(1, 8832), "xla_decode"),
        ("cpu", shapes(1, 150), "xla"),
        ("cpu", shapes(2, 8832), "xla"),
        ("gpu", shapes(1, 8832), "xla"),
        ("cpu", shapes(729, 729), "xla_chunked"),
        ("cpu", shapes(80, 7290), "xla_chunked"),
        ("tpu", shapes(150, 150), "xla"),
        ("tpu", shapes(80, 7290), "pallas_tpu"),
        ("tpu", shapes(8832, 8832, jnp.bfloat16), "pallas_tpu"),
        ("tpu", shapes(8832, 8832, jnp.bfloat16, 512), "xla_chunked"),  # a head dim that the kernel does not support
        ("tpu", shapes(8832, 8832, jnp.float16), "xla_chunked"),
        ("gpu", shapes(8832, 8832, jnp.bfloat16), "cudnn"),
        ("gpu", shapes(8831, 8832, jnp.bfloat16), "cudnn"),
        ("gpu", shapes(729, 729, jnp.bfloat16, 72), "cudnn"),  # the vision tower
        ("gpu", shapes(8832, 8832, jnp.float32), "xla_chunked"),
        ("gpu", shapes(8832, 8832, jnp.bfloat16, 512), "xla_chunked"),
    ],
)
def test_automatic_choice(platform, arguments, name, monkeypatch):
    monkeypatch.setattr(api, "platform", lambda: platform)
    assert api.choose(*arguments) == name


TPU = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
AUTOMATIC = (jax.sharding.AxisType.Auto,) * 3


@pytest.mark.parametrize(("devices", "name"), [((1, 256, 1), "pallas_tpu"), ((1, 1, 1), "xla_chunked")])
def test_a_kernel_serves_what_one_device_holds(devices, name):
    """256 samples have more pairs of blocks than one kernel's table; a device of 256 has one of them."""
    q, kv, mask = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((256, *x.shape[1:]), x.dtype), shapes(8832, 8832, jnp.bfloat16)
    )
    abstract = jax.sharding.AbstractMesh(devices, ("replica", "fsdp", "tensor"), AUTOMATIC, abstract_device=TPU)
    with jax.sharding.use_abstract_mesh(abstract):
        assert api.choose(q, kv, mask) == name
        if name == "pallas_tpu":
            assert api.IMPLEMENTATIONS[name].reason(q, kv, mask) is None
        else:
            with pytest.raises(ValueError, match=r"'pallas_tpu' cannot serve: .* pairs of blocks"):
                jax.eval_shape(
                    lambda q, kv, mask: api.attention(q, kv, kv, mask=mask, implementation="pallas_tpu"), q, kv, mask
                )


def test_heads_are_those_of_one_device():
    q, kv, _ = shapes(8, 8)
    abstract = jax.sharding.AbstractMesh((1, 4, 2), ("replica", "fsdp", "tensor"), AUTOMATIC)
    with jax.sharding.use_abstract_mesh(abstract):
        own = api.on_one_device(q, kv)
    assert [x.shape for x in own] == [(1, 8, 7, 64), (1, 8, 1, 64)], "one sample is not split, two KV heads are"


def test_the_platform_is_that_of_the_mesh_or_the_default_device():
    assert api.platform() == "cpu"
    with jax.default_device(jax.devices()[0]):
        assert api.platform() == "cpu"
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((4,), ("fsdp",), abstract_device=TPU)):
        assert api.platform() == "tpu"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of the names of the implementations that run, in order."""
    names: list[str] = []
    for name, entry in list(api.IMPLEMENTATIONS.items()):

        def run(q, *_, mask, name=name):
            names.append(name)
            return q

        monkeypatch.setitem(api.IMPLEMENTATIONS, name, entry._replace(run=run))
    return names


@pytest.mark.parametrize(
    ("name", "platform", "arguments", "reason"),
    [
        ("pallas_tpu", "cpu", shapes(8, 8), "it runs on tpu, and this is computed on cpu"),
        ("pallas_tpu", "tpu", shapes(8, 8, jnp.float16), "dtype float16"),
        ("pallas_gpu", "tpu", shapes(8, 8), "it runs on gpu, and this is computed on tpu"),
        ("pallas_gpu", "gpu", shapes(8, 8, jnp.float32, 512), "head_dim 512"),
        ("xla_decode", "cpu", shapes(17, 64), "17 queries"),
        ("cudnn", "cpu", shapes(8, 8, jnp.bfloat16), "it runs on gpu"),
        ("cudnn", "gpu", shapes(8, 8), "dtype float32"),
        ("cudnn", "gpu", shapes(8, 8, jnp.bfloat16, 192), "head_dim 192"),
        ("splash", "tpu", shapes(8, 8), "causal by positions"),
        ("tokamax", "cpu", shapes(8, 8), "not installed"),
    ],
)
def test_a_forced_implementation_that_cannot_serve_says_why(name, platform, arguments, reason, monkeypatch, called):
    monkeypatch.setattr(api, "platform", lambda: platform)
    monkeypatch.setattr(api.library.importlib.util, "find_spec", lambda _: None)
    q, kv, mask = arguments
    with pytest.raises(ValueError, match=f"implementation '{name}' cannot serve.*{reason}"):
        jax.eval_shape(lambda q, kv, mask: api.attention(q, kv, kv, mask=mask, implementation=name), q, kv, mask)
    assert called == []


def test_none_takes_the_table_and_a_name_forces(called):
    api.attention(Q, Q, Q, mask=MASK)
    api.attention(Q, Q, Q, mask=MASK, implementation="xla_chunked")
    assert called == ["xla", "xla_chunked"]


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_unknown_implementation_is_refused_with_the_list(called):
    force: Callable[..., jax.Array] = api.attention
    with pytest.raises(
        ValueError, match="'flash' does not exist; known are xla, xla_chunked, xla_decode, pallas_tpu, pallas_gpu"
    ):
        force(Q, Q, Q, mask=MASK, implementation="flash")
    assert called == []
