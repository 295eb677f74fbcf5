"""The sharding table at full size: it covers every parameter, splits large ones, and refuses collisions."""

from __future__ import annotations

import dataclasses
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from visor_jax import testing
from visor_jax.architecture import MESH_AXES, Architecture
from visor_jax.config import architecture, load_config
from visor_jax.model.layers import Params
from visor_jax.model.visor import abstract_params
from visor_jax.scale.sharding import RULES, logical_axes, param_shardings, partition_spec
from visor_jax.tree import flatten, path_name

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"0.5B": "llava_ov_0p5b.py", "1.5B": "llava_ov_1p5b.py", "7B": "llava_ov_7b.py"}


def true_size(name: str, plan: str) -> Architecture:
    return dataclasses.replace(architecture(load_config(CONFIGS / SIZES[name])), plan=plan)


@cache
def true_params(name: str, plan: str) -> Params:
    return abstract_params(true_size(name, plan))


def mesh(replica: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((replica, fsdp, tensor), MESH_AXES)


def size(tree: Any) -> int:
    return sum(prod(x.shape) for x in jax.tree.leaves(tree))


def test_the_dense_half_billion_model_has_transformers_parameters() -> None:
    """893.7 M as in `LlavaOnevisionForConditionalGeneration`, without the unused post_layernorm."""
    text = true_size("0.5B", "dense").text
    config = LlavaOnevisionConfig(  # the defaults are SigLIP so400m at 384 with 26 layers
        text_config={
            "model_type": "qwen2",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "tie_word_embeddings": text.tie_word_embeddings,
        }
    )
    with torch.device("meta"):
        reference = LlavaOnevisionForConditionalGeneration(config)
    expected = sum(x.numel() for name, x in reference.named_parameters() if "post_layernorm" not in name)
    assert size(true_params("0.5B", "dense")) == expected
    assert round(expected / 1e6, 1) == 893.7


@pytest.mark.parametrize("plan", ["visor", "dense"])
@pytest.mark.parametrize("name", SIZES)
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
    per_device = jax.tree.map(lambda x, s: prod(s.shard_shape(x.shape)), params, param_shardings(params, on))
    assert sum(jax.tree.leaves(per_device)) <= 1.02 * size(params) / (sizes[1] * sizes[2])


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


@pytest.mark.parametrize("axis", ["heads", "mlp", "vocab"])
@pytest.mark.parametrize("sizes", [(64, 64), (63, 61)])
def test_two_dimensions_on_one_mesh_axis_are_refused(axis: str, sizes: tuple[int, int]) -> None:
    """Refused for any sizes, even if both rules could apply, because the rules are wrong."""
    params = flatten(true_params("0.5B", "dense"))
    path = next(path for path in params if set(logical_axes(path)) == {axis, "embed"})
    stacked = params[path].shape[:-2]
    with pytest.raises(ValueError, match=f"{path}.*one mesh axis"):
        partition_spec(path, (*stacked, *sizes), mesh(1, 8, 1), {**RULES, axis: RULES["embed"]})


def test_the_table_as_it_stands_never_collides() -> None:
    for path, leaf in flatten(true_params("7B", "visor")).items():
        partition_spec(path, leaf.shape, mesh(2, 2, 2))


def test_a_super_block_of_another_pattern_is_split_alike() -> None:
    shardings = param_shardings(abstract_params(testing.other_plan()), mesh(1, 4, 2))
    specs = {path: tuple(actual.spec) for path, actual in flatten(shardings).items()}
    for path in ("head", "tail", "blocks/self", "blocks/cross", "blocks/text/layer_0", "blocks/text/layer_1"):
        assert specs[f"{path}/mlp/up_proj/kernel"] == (None, "fsdp", "tensor")
        assert specs[f"{path}/self_attn/o_proj/kernel"] == (None, "tensor", "fsdp")


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
