"""Fixtures of the tests of Hugging Face folders: tiny LLaVA-OneVision checkpoints written by transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from visor_jax import testing

TOKENIZER = testing.almanac_tokenizer()
STOCK_TILE = 28
STOCK_GRIDS = [[rows * STOCK_TILE, columns * STOCK_TILE] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def make_stock_model(tied: bool) -> LlavaOnevisionForConditionalGeneration:
    """A random LLaVA-OneVision with seven decoder layers; one of its three tower layers is unused."""
    torch.manual_seed(int(tied))
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "image_size": STOCK_TILE, "patch_size": 7, "hidden_size": 32,
            "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": TOKENIZER.vocab_size + 9, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "tie_word_embeddings": tied,
        },
        image_token_index=TOKENIZER.image_token_id,
        video_token_index=0,
        image_grid_pinpoints=STOCK_GRIDS,
        vision_aspect_ratio="anyres_max_4",
        vision_feature_layer=-2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config).eval()


def finish_folder(folder: Path) -> Path:
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "tokenizer.json").write_text(TOKENIZER.text)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with such a model in all supported forms."""
    root = tmp_path_factory.mktemp("hub")
    make_stock_model(False).save_pretrained(root / "shards", max_shard_size="60KB")
    make_stock_model(True).save_pretrained(root / "tied")
    memory = root / "memory"
    make_stock_model(False).config.save_pretrained(memory)
    save_file(
        {name: x.contiguous() for name, x in make_stock_model(False).state_dict().items()}, memory / "a.safetensors"
    )
    return {folder.name: finish_folder(folder) for folder in (root / "shards", root / "tied", memory)}


@pytest.fixture(scope="session")
def stock_model() -> Callable[[bool], LlavaOnevisionForConditionalGeneration]:
    return make_stock_model


@pytest.fixture(autouse=True)
def no_gradients(pytorch_session: None):
    with torch.no_grad():
        yield
