"""Damaged or foreign configurations in Hugging Face's format are refused by the name of the field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from visor_jax.errors import RequestError
from visor_jax.loading import load

DAMAGED = [
    ("image_grid_pinpoints", None, "multiples of image_size, 28; it is missing, and transformers' default"),
    ("image_grid_pinpoints", [[28]], "expected a list of .height, width., multiples of image_size, 28"),
    ("image_grid_pinpoints", [[30, 30]], "multiples of image_size, 28"),
    ("image_grid_pinpoints", [[-28, 28]], "multiples of image_size, 28"),
    ("vision_aspect_ratio", "square", "expected 'anyres_max_' and a number"),
    ("vision_aspect_ratio", "anyres_max_0", "expected 'anyres_max_' and a number"),
    ("vision_feature_layer", [-2, -1], "expected one layer's number, of 3"),
    ("vision_feature_layer", [], "expected one layer's number, of 3"),
    ("vision_feature_layer", 0, "expected one layer's number, of 3"),
    ("vision_feature_layer", -9, "expected one layer's number, of 3"),
    ("vision_feature_layer", 1_000_000_000, "expected one layer's number, of 3"),
    ("model_type", [], "expected 'llava_onevision' or 'visor'"),
    ("plan", "x", "expected 'dense' or 'visor'"),
    ("text_config", 5, "expected an object"),
    ("image_token_index", "x", "expected a whole number from 0"),
    ("image_token_index", 5, "config.json stands token 5 for a picture, its tokenizer"),
    ("text_config.num_attention_heads", 0, "expected a whole number from 1"),
    ("text_config.num_attention_heads", 3, "expected a multiple of num_key_value_heads, 2"),
    ("text_config.vocab_size", None, r"embed_tokens.weight has shape .*, expected \(151936, 32\)"),
    ("text_config.vocab_size", 100, r"embed_tokens.weight has shape .*, expected \(100, 32\)"),
    ("text_config.hidden_size", "32", "expected a whole number from 1"),
    ("text_config.num_hidden_layers", 10**9, "expected a whole number from 1 to 1000"),
    ("text_config.head_dim", 3, "head_dim=3: expected an even number"),
    ("tie_word_embeddings", "yes", "tie_word_embeddings='yes': expected true or false"),
    ("has_policy", True, "has_policy=True: expected false where viable_budgets has none"),
    ("patch_local", True, "patch_local=True: expected false"),
    ("text_config.intermediate_size", -1, "expected a whole number from 1"),
    ("text_config.rope_parameters", "x", "expected an object"),
    ("vision_config.image_size", None, "expected a list of .height, width., multiples of image_size, 224"),
    ("vision_config.num_attention_heads", 5, "expected a divisor of hidden_size, 32"),
]


@pytest.mark.parametrize(("field", "value", "message"), DAMAGED)
def test_a_damaged_configuration_is_refused_by_field(
    saved: dict[str, Path], tmp_path: Path, field: str, value: Any, message: str
) -> None:
    config = json.loads((saved["shards"] / "config.json").read_text())
    section, _, name = field.rpartition(".")
    (config[section] if section else config)[name] = value
    for file in saved["shards"].iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=message):
        load(tmp_path)


def test_a_field_of_earlier_exports_may_say_what_holds(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["shards"], tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_local": False}))
    assert load(tmp_path / "model").arch == load(saved["shards"]).arch


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("preprocessor_config.json", {"image_mean": [1, 2]}, "image_mean=.1, 2.: expected three numbers"),
        ("preprocessor_config.json", {"image_mean": "abc"}, "expected three numbers"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "image_std.*expected three numbers from 0.0001"),
        ("preprocessor_config.json", {"image_std": [1, 1, float("nan")]}, "expected three numbers from 0.0001"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 127]}, "expected three numbers from 0 to 1"),
        ("model.safetensors.index.json", {"weight_map": []}, "expected for each tensor the name"),
        ("model.safetensors.index.json", {"weight_map": None}, "expected for each tensor the name"),
        ("model.safetensors.index.json", {"weight_map": {"a": 3}}, "expected for each tensor the name"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../b.safetensors"}}, "file next to it"),
    ],
)
def test_other_damaged_files_are_refused(
    saved: dict[str, Path], tmp_path: Path, name: str, content: Any, message: str
) -> None:
    for file in saved["shards"].iterdir():
        if file.name != name:
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(RequestError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_next"}, "model_type='llava_next': expected 'llava_onevision' or 'visor'"),
        ({"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act='gelu': expected 'silu'"),
        ({"text_config": {"rope_scaling": {"type": "yarn"}}}, "rope_scaling"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy='default'"),
    ],
)
def test_other_models_are_refused(saved: dict[str, Path], tmp_path: Path, change: Any, message: str) -> None:
    copy = Path(shutil.copytree(saved["tied"], tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=message):
        load(copy)
    del config["text_config"]
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llava_onevision"}))
    with pytest.raises(RequestError, match="text_config: missing"):
        load(copy)
