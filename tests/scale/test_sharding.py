"""The sharding table at the true sizes: it covers every parameter, splits what is large, and refuses collisions."""

from __future__ import annotations

import dataclasses
from functools import cache
from math import prod
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from visor_jax import testing
from visor_jax.architecture import (
    Architecture,
    CrossAttentionArchitecture,
    PolicyArchitecture,
    TextArchitecture,
    VisionArchitecture,
)
from visor_jax.model.layers import Params
from visor_jax.model.visor import abstract_params
from visor_jax.scale.mesh import AXES
from visor_jax.scale.sharding import RULES, logical_axes, param_shardings, partition_spec, path_name
from visor_jax.train.optimizer import flatten

SO400M = VisionArchitecture(
    tile_size=384, patch_size=14, hidden_size=1152, intermediate_size=4304, num_layers=26, num_heads=16
)
QWEN2 = {
    "0.5B": TextArchitecture(152_000, 896, 4864, 24, 14, 2, 64),
    "1.5B": TextArchitecture(151_936, 1536, 8960, 28, 12, 2, 128),
    "7B": TextArchitecture(152_064, 3584, 18_944, 28, 28, 4, 128),
}


def true_size(name: str, plan: str) -> Architecture:
    text = QWEN2[name]
    cross = CrossAttentionArchitecture(num_kv_heads=text.num_kv_heads)
    return Architecture(text=text, vision=SO400M, cross=cross, policy=PolicyArchitecture(256), plan=plan)


@cache
def true_params(name: str, plan: str) -> Params:
    return abstract_params(true_size(name, plan))


def mesh(replica: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((replica, fsdp, tensor), AXES)


def size(tree: Any) -> int:
    return sum(prod(x.shape) for x in jax.tree.leaves(tree))


def test_the_dense_half_billion_model_has_transformers_parameters() -> None:
    """893.7 M as `LlavaOnevisionForConditionalGeneration` counts them, less the post_layernorm that nobody reads."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    text = QWEN2["0.5B"]
    config = LlavaOnevisionConfig(  # its defaults are SigLIP so400m at 384 with 26 layers
        text_config={
            "model_type": "qwen2",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "tie_word_embeddings": True,
        }
    )
    import torch

    with torch.device("meta"):
        reference = LlavaOnevisionForConditionalGeneration(config)
    tied = dataclasses.replace(true_size("0.5B", "dense"), text=dataclasses.replace(text, tie_word_embeddings=True))
    expected = sum(x.numel() for name, x in reference.named_parameters() if "post_layernorm" not in name)
    assert size(abstract_params(tied)) == expected
    assert round(expected / 1e6, 1) == 893.7


@pytest.mark.parametrize("plan", ["visor", "dense"])
@pytest.mark.parametrize("name", QWEN2)
def test_every_parameter_is_in_the_table_and_every_large_one_is_split(name: str, plan: str) -> None:
    on = mesh(1, 16, 1)
    for path, leaf in flatten(true_params(name, plan)).items():
        spec = partition_spec(path, leaf.shape, on)
        assert len(spec) == len(leaf.shape)
        assert prod(leaf.shape) < 4e6 or "fsdp" in spec, f"{path} {leaf.shape} is whole on every device"


@pytest.mark.parametrize(
    ("name", "sizes"), [("0.5B", (1, 8, 1)), ("7B", (2, 8, 4)), ("7B", (1, 64, 1)), ("1.5B", (1, 4, 2))]
)
def test_a_device_holds_little_more_than_its_share(name: str, sizes: tuple[int, int, int]) -> None:
    """Within 2 % of an even split over fsdp x tensor; replicas hold copies."""
    params = true_params(name, "visor")
    on = mesh(*sizes)
    held = jax.tree.map(lambda x, s: prod(s.shard_shape(x.shape)), params, param_shardings(params, on))
    assert sum(jax.tree.leaves(held)) <= 1.02 * size(params) / (sizes[1] * sizes[2])


def test_what_a_mesh_axis_does_not_divide_stays_whole() -> None:
    spec = partition_spec("blocks/self/mlp/up_proj/kernel", (8, 896, 4864), mesh(1, 3, 7))
    assert spec == PartitionSpec(None, None, None)
    spec = partition_spec("blocks/self/mlp/up_proj/kernel", (8, 896, 4864), mesh(1, 7, 3))
    assert spec == PartitionSpec(None, "fsdp", None)


def test_golden_shardings_of_each_kind_of_parameter() -> None:
    shardings = {p: s.spec for p, s in flatten(param_shardings(true_params("0.5B", "visor"), mesh(1, 4, 2))).items()}
    golden = {
        "vision/patch_embedding/kernel": (None, "fsdp"),
        "vision/position_embedding/embedding": (None, "fsdp"),
        "vision/layers/self_attn/out_proj/kernel": (None, "tensor", "fsdp"),
        "vision/layers/mlp/fc1/kernel": (None, "fsdp", "tensor"),
        "vision/layers/layer_norm1/bias": (None, None),
        "connector/linear_1/kernel": ("fsdp", "tensor"),
        "image_newline": (None,),
        "embed_tokens/embedding": ("tensor", "fsdp"),
        "lm_head/kernel": ("fsdp", "tensor"),
        "norm/scale": (None,),
        "blocks/text/self_attn/q_proj/kernel": (None, "fsdp", "tensor"),
        "blocks/text/self_attn/q_proj/bias": (None, "tensor"),
        "blocks/self/self_attn/o_proj/kernel": (None, "tensor", "fsdp"),
        "blocks/cross/mlp/down_proj/kernel": (None, "tensor", "fsdp"),
        "blocks/cross_attention/k_proj/kernel": (None, "fsdp", "tensor"),
        "blocks/cross_attention/gate": (None,),
        "blocks/cross_attention/conditional_position/kernel": (None, None, "fsdp"),
        "routing/token": (None,),
    }
    assert {path: tuple(shardings[path]) for path in golden} == golden


def test_two_dimensions_on_one_mesh_axis_are_refused() -> None:
    for axis in ("heads", "mlp", "vocab"):
        colliding = {**RULES, axis: RULES["embed"]}
        path = next(
            p for p in flatten(true_params("0.5B", "dense")) if axis in logical_axes(p) and "embed" in logical_axes(p)
        )
        for shape in ((8, 64, 64), (8, 63, 61)):  # whether or not the sizes would let both be split
            lead = shape[: len(shape) - len(logical_axes(path))]
            with pytest.raises(ValueError, match=f"{path}.*one mesh axis"):
                partition_spec(path, (*lead, *shape[1:]), mesh(1, 8, 1), colliding)


def test_the_table_as_it_stands_never_collides() -> None:
    for path, leaf in flatten(true_params("7B", "visor")).items():
        partition_spec(path, leaf.shape, mesh(2, 2, 2))


def test_an_unknown_parameter_names_itself_and_the_file_to_mend() -> None:
    with pytest.raises(KeyError, match=r"blocks/self/adapter/kernel.*sharding\.py"):
        logical_axes("blocks/self/adapter/kernel")


def test_shardings_have_the_tree_of_the_parameters() -> None:
    params = testing.random_params(testing.tiny_architecture(4))
    shardings = param_shardings(params, mesh(1, 2, 2))
    assert jax.tree.structure(shardings) == jax.tree.structure(params)
    assert all(isinstance(s, NamedSharding) for s in jax.tree.leaves(shardings))
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    assert sorted(names) == sorted(flatten(params)) and len(set(names)) == len(names)
    assert np.all([s.mesh.shape["tensor"] == 2 for s in jax.tree.leaves(shardings)])
