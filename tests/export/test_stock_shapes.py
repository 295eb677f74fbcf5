"""Logits equal transformers' for stock checkpoints of any shape, including 0.5B, from the same files and pixels."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

import visor_jax
from visor_jax import testing
from visor_jax.data.anyres import visual_token_count
from visor_jax.loading import Visor, load

try:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
except ImportError:  # its name in transformers 5.3
    from transformers.models.llava_onevision.image_processing_llava_onevision import (
        LlavaOnevisionImageProcessor as LlavaOnevisionImageProcessorPil,
    )

CONFIGS = Path(visor_jax.__file__).parents[1] / "configs"
TOKENIZER = testing.almanac_tokenizer()
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.25, 0.2]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Small shapes of all kinds of LLaVA-OneVision checkpoints."""
    kv_heads, head_dim = draw(st.sampled_from([1, 2])), draw(st.sampled_from([8, 16]))
    heads = kv_heads * draw(st.integers(1, 3))
    patch = draw(st.sampled_from([7, 14]))
    tile = patch * draw(st.integers(2, 4)) + draw(st.sampled_from([0, patch // 2 - 1]))  # 384 is 27 times 14 and 6
    grids = draw(st.sets(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=6))
    tied = draw(st.booleans())
    return {
        "vision_config": {
            "model_type": "siglip_vision_model", "image_size": tile, "patch_size": patch, "hidden_size": 24,
            "intermediate_size": 40, "num_hidden_layers": draw(st.integers(1, 3)),
            "num_attention_heads": draw(st.sampled_from([1, 3])), "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2", "vocab_size": TOKENIZER.vocab_size + draw(st.integers(0, 9)),
            "hidden_size": heads * head_dim, "intermediate_size": draw(st.sampled_from([24, 56])),
            "num_hidden_layers": draw(st.integers(3, 8)), "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
            "rope_parameters": {"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 1e6]))},
            "tie_word_embeddings": tied,
        },
        "image_grid_pinpoints": [[rows * tile, columns * tile] for rows, columns in sorted(grids)],
        "vision_aspect_ratio": f"anyres_max_{draw(st.integers(1, 9))}",
        "tie_word_embeddings": tied,
    }  # fmt: skip


def save_stock(folder: Path, config: dict[str, Any]) -> LlavaOnevisionForConditionalGeneration:
    """Writes a random model with transformers, and a checkpoint's preprocessor and tokenizer; returns the model."""
    torch.manual_seed(0)
    full = LlavaOnevisionConfig(**config, image_token_index=TOKENIZER.image_token_id, video_token_index=0)
    model = LlavaOnevisionForConditionalGeneration(full).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    (folder / "tokenizer.json").write_text(TOKENIZER.text)
    return model


def stock_logits(model: Any, visor: Visor, tokens: list[int], picture: Image.Image) -> np.ndarray:
    """Returns transformers' logits at the text tokens of a prompt with one placeholder."""
    config, image = model.config, TOKENIZER.image_token_id
    tile = config.vision_config.image_size
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": tile, "width": tile}, image_mean=MEAN, image_std=STD,
        image_grid_pinpoints=config.image_grid_pinpoints,
    )  # fmt: skip
    # Explicit, because older versions mistake a picture one pixel high for one with a single channel.
    pixels = processor.preprocess([[picture]], input_data_format="channels_last", return_tensors="pt")
    count = visual_token_count((picture.height, picture.width), visor.arch)
    ids = torch.tensor([[i for token in tokens for i in [token] * (count if token == image else 1)]])
    sizes = torch.tensor([(picture.height, picture.width)])
    with torch.no_grad():
        actual = model(input_ids=ids, pixel_values=pixels["pixel_values"], image_sizes=sizes).logits[0]
    return actual[ids[0] != image].numpy()


def largest_difference(config: dict[str, Any], size: tuple[int, int]) -> tuple[float, float]:
    """Returns the largest difference of our logits from transformers' for the same files, and the largest logit."""
    with tempfile.TemporaryDirectory() as folder:
        model = save_stock(Path(folder), config)
        visor = load(folder)
    words = [word for word in range(2, 12) if word != TOKENIZER.image_token_id]
    tokens = [*words[:3], TOKENIZER.image_token_id, *words[3:]]
    picture = Image.fromarray(testing.random_picture(*size, seed=1))
    expected = stock_logits(model, visor, tokens, picture)
    actual = visor.logits(tokens, [picture])
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max()), float(np.abs(expected).max())


SIDES = st.tuples(st.integers(1, 150), st.integers(1, 150))


def check_shape(config: dict[str, Any], size: tuple[int, int]) -> None:
    difference, largest = largest_difference(config, size)
    assert largest > 0.05, "logits are large enough for a comparison"
    assert difference <= 1e-5


@hypothesis.given(configurations(), SIDES)
@hypothesis.settings(max_examples=3, deadline=None)
def test_shapes_of_every_kind_give_transformers_logits(config: dict[str, Any], size: tuple[int, int]) -> None:
    check_shape(config, size)


@pytest.mark.slow
@hypothesis.given(configurations(), SIDES)
@hypothesis.settings(max_examples=30, deadline=None)
def test_many_shapes_give_transformers_logits(config: dict[str, Any], size: tuple[int, int]) -> None:
    check_shape(config, size)


# --- the 0.5B shape ---------------------------------------------------------------------------------------------------

HALF = [0.5, 0.5, 0.5]  # the published mean and deviation
TRUE_05B: dict[str, Any] = {
    "vision_config": {
        "model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "hidden_size": 1152,
        "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16, "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2", "vocab_size": 152_000, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
    },
    "image_grid_pinpoints": [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)],
    "vision_aspect_ratio": "anyres_max_9",
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.slow
def test_the_true_half_billion_gives_transformers_logits() -> None:
    """One tile and its base tile, 1,485 visual tokens. The bound is 2e-4: float32 sums of wide layers round more."""
    difference, largest = largest_difference(TRUE_05B, (384, 384))
    print(f"0.5B: largest logit difference {difference:.2e}, largest logit {largest:.2f}")
    assert difference <= 2e-4


@pytest.mark.slow
def test_import_holds_little_more_than_the_parameters(tmp_path: Path) -> None:
    """Measures the peak memory of the process of `visor import`, which includes writing."""
    save_stock(tmp_path / "hub", TRUE_05B)
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps({"image_mean": HALF, "image_std": HALF}))
    config = f"--config={CONFIGS / 'llava_ov_0p5b.py'}:{tmp_path / 'hub' / 'tokenizer.json'}"
    arguments = ["import", f"--from={tmp_path / 'hub'}", f"--workdir={tmp_path / 'run'}", config, "--json"]
    command = [sys.executable, "-P", "-c", COMMAND_AND_PEAK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report, peak = done.stdout.splitlines()[-2:]
    size = 4 * json.loads(report)["parameters"]
    print(f"0.5B: {size / 1e9:.2f} GB of parameters, peak {int(peak) / 1e9:.2f} GB, {int(peak) / size:.2f}x")
    assert size < int(peak) <= 1.3 * size


# `getrusage` would report the memory of the parent process.
COMMAND_AND_PEAK = """
import sys
from visor_jax import __main__ as cli
status = cli.main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(1024 * int(peak.split()[1]))
sys.exit(status)
"""
