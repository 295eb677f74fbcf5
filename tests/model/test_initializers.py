"""The parameter tree, whose names are a contract, and initial values."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from visor_jax import testing
from visor_jax.architecture import CrossAttentionArchitecture
from visor_jax.model.initializers import start_cross_attention
from visor_jax.model.super_block import CrossAttention
from visor_jax.model.visor import abstract_params, init_params, logits
from visor_jax.tree import flatten

ARCH = testing.tiny_architecture(8)
KEY = jax.random.key(0)
MULTI_HEAD = dataclasses.replace(ARCH, cross=CrossAttentionArchitecture(num_kv_heads=4))

QWEN2 = """
input_layernorm/scale 32; self_attn/q_proj/kernel 32,32; self_attn/q_proj/bias 32; self_attn/k_proj/kernel 32,16;
self_attn/k_proj/bias 16; self_attn/v_proj/kernel 32,16; self_attn/v_proj/bias 16; self_attn/o_proj/kernel 32,32;
post_attention_layernorm/scale 32; mlp/gate_proj/kernel 32,48; mlp/up_proj/kernel 32,48; mlp/down_proj/kernel 48,32"""
CROSS = """text_norm/scale 32; visual_norm/scale 32; q_proj/kernel 32,32; q_proj/bias 32; k_proj/kernel 32,16;
k_proj/bias 16; v_proj/kernel 32,16; v_proj/bias 16; o_proj/kernel 32,32; gate ; conditional_position/kernel 7,32"""
SIGLIP = """
layer_norm1/scale 16; layer_norm1/bias 16; self_attn/q_proj/kernel 16,16; self_attn/q_proj/bias 16;
self_attn/k_proj/kernel 16,16; self_attn/k_proj/bias 16; self_attn/v_proj/kernel 16,16; self_attn/v_proj/bias 16;
self_attn/out_proj/kernel 16,16; self_attn/out_proj/bias 16; layer_norm2/scale 16; layer_norm2/bias 16;
mlp/fc1/kernel 16,24; mlp/fc1/bias 24; mlp/fc2/kernel 24,16; mlp/fc2/bias 16"""
OUTSIDE = """
vision/patch_embedding/kernel 48,16; vision/patch_embedding/bias 16; vision/position_embedding/embedding 4,16;
connector/linear_1/kernel 16,32; connector/linear_1/bias 32; connector/linear_2/kernel 32,32;
connector/linear_2/bias 32;
image_newline 32; embed_tokens/embedding 64,32; norm/scale 32; lm_head/kernel 32,64"""
ROUTING = """token 32; norm/scale 32; fc1/kernel 32,16; fc1/bias 16; fc2/kernel 16,8; fc2/bias 8"""


def table(text: str, prefix: str = "", stacked: int | None = None) -> dict[str, tuple[int, ...]]:
    entries = [entry.split(" ") for entry in text.replace("\n", " ").strip().split("; ")]
    lead = () if stacked is None else (stacked,)
    return {prefix + name: (*lead, *(int(n) for n in sizes.split(",") if n)) for name, sizes in entries}


DENSE_TREE = {
    **table(OUTSIDE),
    **table(SIGLIP, "vision/layers/", 1),
    **{k: v for kind in ("text", "cross", "self") for k, v in table(QWEN2, f"blocks/{kind}/", 2).items()},
    **table(QWEN2, "tail/", 2),
}
VISOR_TREE = {**DENSE_TREE, **table(CROSS, "blocks/cross_attention/", 2), **table(ROUTING, "routing/")}


@pytest.mark.parametrize(("plan", "tree"), [("visor", VISOR_TREE), ("dense", DENSE_TREE)])
def test_names_and_shapes_of_all_parameters(plan: str, tree: dict[str, tuple[int, ...]]) -> None:
    found = flatten(abstract_params(dataclasses.replace(ARCH, plan=plan)))
    assert {path: leaf.shape for path, leaf in found.items()} == tree
    assert {leaf.dtype for leaf in found.values()} == {np.dtype("float32")}


def test_depths_that_leave_nothing_over_have_no_tail() -> None:
    assert "tail" not in abstract_params(testing.tiny_architecture(6))
    shallow = abstract_params(testing.tiny_architecture(2, plan="dense"))
    assert "blocks" not in shallow and shallow["tail"]["mlp"]["up_proj"]["kernel"].shape == (2, 32, 48)


def test_the_same_key_gives_the_same_parameters_and_another_key_others() -> None:
    one, again, other = (testing.fresh_params(ARCH, seed) for seed in (0, 0, 1))
    for path, x in flatten(one).items():
        np.testing.assert_array_equal(x, flatten(again)[path])
        start_alike = path.endswith(("scale", "bias", "gate", "conditional_position/kernel"))
        assert start_alike == np.array_equal(x, flatten(other)[path]), path


def test_the_projections_that_end_a_residual_branch_have_their_gain() -> None:
    text = dataclasses.replace(ARCH.text, residual_init=0.25)
    layer = testing.fresh_params(dataclasses.replace(ARCH, text=text))["blocks"]["self"]
    size, width = text.hidden_size, text.intermediate_size
    assert float(layer["self_attn"]["v_proj"]["kernel"].std()) == pytest.approx(size**-0.5, rel=0.1)
    assert float(layer["self_attn"]["o_proj"]["kernel"].std()) == pytest.approx(0.25 * size**-0.5, rel=0.1)
    assert float(layer["mlp"]["down_proj"]["kernel"].std()) == pytest.approx(0.25 * width**-0.5, rel=0.1)


@pytest.mark.parametrize("arch", [ARCH, MULTI_HEAD])
def test_copy_starts_cross_attention_from_its_layers_own_attention(arch) -> None:
    """Each of its key/value heads is the one that the same query head reads in the layer itself."""
    params = start_cross_attention(testing.random_params(arch), arch)
    own, new = params["blocks"]["cross"]["self_attn"], params["blocks"]["cross_attention"]
    for name in ("q_proj", "o_proj"):
        for leaf in own[name]:
            np.testing.assert_array_equal(new[name][leaf], own[name][leaf])
    kv_heads, size = arch.cross.num_kv_heads, arch.text.head_dim
    for name in ("k_proj", "v_proj"):
        for leaf in ("kernel", "bias"):
            assert new[name][leaf].shape[-1] == kv_heads * size
            for query_head in range(arch.text.num_heads):
                head = query_head * kv_heads // arch.text.num_heads
                base = query_head * arch.text.num_kv_heads // arch.text.num_heads
                copied = new[name][leaf][..., head * size : (head + 1) * size]
                np.testing.assert_array_equal(copied, own[name][leaf][..., base * size : (base + 1) * size])


def test_copied_multi_head_cross_attention_reads_the_same() -> None:
    """Repeating key/value heads adds parameters and changes nothing yet."""
    params = testing.random_params(ARCH)
    batch = testing.random_batch(ARCH).arrays
    on = np.array([True, False])
    found = [
        np.asarray(
            testing.quick_jit(logits, static_argnames="arch")(start_cross_attention(params, a), batch, on, arch=a)
        )
        for a in (ARCH, MULTI_HEAD)
    ]
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_fresh_parameters_are_a_copy_by_default_and_the_gate_is_open() -> None:
    blocks = testing.fresh_params(ARCH)["blocks"]
    np.testing.assert_array_equal(
        blocks["cross_attention"]["k_proj"]["kernel"], blocks["cross"]["self_attn"]["k_proj"]["kernel"]
    )
    np.testing.assert_array_equal(blocks["cross_attention"]["gate"], np.ones(2, np.float32))
    assert not blocks["cross_attention"]["conditional_position"]["kernel"].any()


def test_zero_starts_behind_a_closed_gate() -> None:
    """With no slot on, the picture changes nothing at the start: the model is the language model alone."""
    zero = CrossAttentionArchitecture(num_kv_heads=4, init="zero")
    arch = dataclasses.replace(testing.tiny_architecture(3), cross=zero)
    params, batch = testing.random_params(arch), testing.random_batch(arch).arrays
    cross = start_cross_attention(params, arch)["blocks"]["cross_attention"]
    assert cross == params["blocks"]["cross_attention"], "everything but the gate is random"
    cross["gate"] = np.asarray(CrossAttention(arch, rngs=nnx.Rngs(0)).gate[...])[None]
    assert cross["gate"] == 0
    program = testing.quick_jit(logits, static_argnames="arch")
    found = np.asarray(program(params, batch, np.array([False]), arch=arch))

    blind = {**batch, "visual_segments": np.zeros_like(batch["visual_segments"])}
    expected = np.asarray(program(params, blind, np.zeros(0, bool), arch=dataclasses.replace(arch, plan="dense")))
    real = batch["text_segments"] > 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
    seeing = np.asarray(program(params, batch, np.array([True]), arch=arch))
    assert np.abs(seeing[real] - expected[real]).max() > 1e-3, "a slot that is on sees the picture"


def test_no_factorization_that_would_wait_for_its_own_threads():
    """Two concurrent batched LAPACK calls deadlock in JAX's thread pool on two cores; a random start makes none."""
    lowered = jax.jit(lambda key: init_params(ARCH, key)).lower(KEY).as_text()
    assert "stablehlo" in lowered and "lapack" not in lowered


def test_no_parameter_of_weak_type():
    """The first step would hand on stronger types than it was given, and be compiled a second time for the second."""
    for arch in (ARCH, MULTI_HEAD):
        shapes = flatten(jax.eval_shape(lambda key, arch=arch: init_params(arch, key), KEY))
        assert [path for path, leaf in shapes.items() if leaf.weak_type] == []
