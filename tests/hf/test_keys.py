"""The table between parameter tree and PyTorch keys is complete, exact in shape, and invertible."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from visor_jax import testing
from visor_jax.config import architecture, load_config
from visor_jax.export.torch_export import stock_tensors, visor_tensors
from visor_jax.export.torch_model import VisorConfig, VisorForConditionalGeneration
from visor_jax.hf import keys as key_map
from visor_jax.hf.config import write_config
from visor_jax.model.visor import abstract_params


def variant(plan="visor", num_layers=7, tied=False):
    base = testing.tiny_architecture(num_layers)
    return testing.tiny_architecture(
        num_layers,
        plan=plan,
        text=dataclasses.replace(base.text, tie_word_embeddings=tied),
    )


VARIANTS = {
    "visor": variant(),
    "visor, no layer over, tied": variant(num_layers=6, tied=True),
    "another pattern": testing.other_plan(),
    "dense, two layers over": variant("dense", num_layers=8),
    "dense, tied": variant("dense", tied=True),
}


CONFIGS = Path(__file__).parents[2] / "configs"
TRUE_SIZES = {
    name: dataclasses.replace(architecture(load_config(CONFIGS / f"llava_ov_{name}.py")), plan="dense")
    for name in ("0p5b", "1p5b", "7b")
}


def config_of(arch) -> dict:
    token = testing.almanac_tokenizer().image_token_id
    fields = {"image_token_id": token, "system": None, "viable_budgets": [], "has_policy": False}
    return write_config(arch, **fields, stage="full", dtype="float32")


@pytest.mark.parametrize("arch", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_is_in_the_table_once(arch):
    params = abstract_params(arch)
    actual: dict[tuple[str, ...], list] = {}
    for entry in key_map.entries(arch):
        actual.setdefault(entry.path, []).append(entry.index)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    expected = {tuple(key.key for key in path): leaf for path, leaf in leaves}
    assert actual.keys() == expected.keys()
    for path, indices in actual.items():
        whole = indices == [None] or indices == list(range(expected[path].shape[0]))
        assert whole, (path, indices)


@pytest.mark.parametrize("arch", VARIANTS.values(), ids=VARIANTS)
def test_keys_and_shapes_are_those_of_the_pytorch_model(arch):
    values = {**config_of(arch), "plan": arch.plan}
    with torch.device("meta"):
        model = VisorForConditionalGeneration(VisorConfig(**values))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    actual = {key: shape for key, (shape, _) in visor_tensors(abstract_params(arch), arch).items()}
    assert actual == expected


@pytest.mark.parametrize("arch", [*(a for a in VARIANTS.values() if a.plan == "dense"), *TRUE_SIZES.values()])
def test_a_dense_plan_has_the_keys_and_shapes_of_transformers(arch):
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**config_of(arch)))
    expected = {key_map.canonical_key(name): tuple(p.shape) for name, p in model.named_parameters()}
    tensors = stock_tensors(abstract_params(arch), arch)
    assert {key_map.canonical_key(key): shape for key, (shape, _) in tensors.items()} == expected


@pytest.mark.parametrize("arch", VARIANTS.values(), ids=VARIANTS)
def test_there_and_back_gives_the_same_parameters(arch):
    params = testing.random_params(arch)
    tensors = visor_tensors(params, arch)
    for key, (shape, get) in tensors.items():
        assert get().shape == shape, key
    for entry in key_map.entries(arch):
        back, array = key_map.from_torch(tensors[entry.key][1](), entry), key_map.leaf(params, entry)
        np.testing.assert_array_equal(back, array if entry.index is None else array[entry.index], err_msg=entry.key)


@pytest.mark.parametrize("arch", [a for a in VARIANTS.values() if a.plan == "dense"])
def test_every_spelling_leads_back_to_one_key(arch):
    for entry in key_map.entries(arch):
        hub = key_map.hub_key(entry.key)
        short = entry.key.replace("vision_tower.vision_model.", "vision_tower.")
        assert {key_map.canonical_key(key) for key in (entry.key, hub, short)} == {entry.key}
    assert key_map.hub_key("model.language_model.layers.3.mlp.up_proj.weight") == (
        "language_model.model.layers.3.mlp.up_proj.weight"
    )
    assert key_map.hub_key("lm_head.weight") == "language_model.lm_head.weight"
    assert key_map.hub_key("model.image_newline") == "image_newline"
