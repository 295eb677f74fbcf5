"""Fixtures of the export tests: a tiny PyTorch model with random weights, in both plans, and an exported folder."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from visor_jax import testing
from visor_jax.budget import all_subsets
from visor_jax.export import torch_export
from visor_jax.export.torch_model import VisorConfig, VisorForConditionalGeneration
from visor_jax.hf import keys as key_map
from visor_jax.loading import Visor

IMAGE = 60  # id of the placeholder
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "patch_size": 4,
    "image_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vision_use_head": False,
}
GRIDS = [[16 * rows, 16 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


@pytest.fixture(autouse=True)
def no_gradients(pytorch_session: None):
    with torch.no_grad():
        yield


def randomize(model: VisorForConditionalGeneration, seed: int = 0) -> VisorForConditionalGeneration:
    """Draws every parameter at random, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = name.endswith("gate") or ("norm" in name and name.endswith("weight"))
        spread = parameter.shape[-1] ** -0.5 if name.endswith("proj.weight") or ".fc" in name else 0.3
        parameter.copy_(1 + 0.2 * noise if is_scale else spread * noise)
    return model.eval()


def tiny_config(plan: str = "visor", num_layers: int = 7, **changes) -> VisorConfig:
    names = ["0b" + format(index, f"0{num_layers // 3}b") for index in range(2 ** (num_layers // 3))]
    text = {**TEXT, **changes.pop("text", {}), "num_hidden_layers": num_layers}
    return VisorConfig(
        text_config=text,
        vision_config=VISION,
        image_token_index=IMAGE,
        **{
            "image_grid_pinpoints": GRIDS,
            "vision_aspect_ratio": "anyres_max_2",
            "plan": plan,
            "policy_hidden_size": 16,
            "policy_max_budgets": 9,
            "viable_budgets": names if plan == "visor" else (),
            "has_policy": plan == "visor",
            **changes,
        },
    )


@pytest.fixture(scope="session")
def visor() -> VisorForConditionalGeneration:
    """A model of seven layers: two super-blocks and one more layer; four viable budgets."""
    with torch.no_grad():
        return randomize(VisorForConditionalGeneration(tiny_config()))


def greedily(count: int, **settings) -> dict:
    """Returns arguments of `generate` for `count` greedy tokens, none of them a placeholder or an end token."""
    return {
        "max_new_tokens": count,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "suppress_tokens": [IMAGE],
        **settings,
    }


def prompt(model, sizes=((20, 30),), before=3, after=5, seed=0) -> dict[str, torch.Tensor]:
    """Returns the inputs of one prompt with pictures of these (height, width) between random text tokens."""
    generator = torch.Generator().manual_seed(seed)
    inputs, pieces = {}, [torch.randint(2, IMAGE, (before,), generator=generator)]
    if sizes:
        tiles = 1 + max((height // 16) * (width // 16) for height, width in GRIDS)
        inputs = {
            "pixel_values": torch.randn((len(sizes), tiles, 3, 16, 16), generator=generator),
            "image_sizes": torch.tensor(sizes),
            "batch_num_images": torch.tensor([len(sizes)]),
        }
        for features in model.get_image_features(**inputs).pooler_output:
            pieces += [torch.full((len(features),), IMAGE), torch.randint(2, IMAGE, (2,), generator=generator)]
    ids = torch.cat([*pieces, torch.randint(2, IMAGE, (after,), generator=generator)])
    return {"input_ids": ids[None], **inputs}


def join(prompts: list[dict[str, torch.Tensor]], side: str = "left") -> dict[str, torch.Tensor]:
    """Returns the inputs of several prompts as one padded batch."""
    longest = max(inputs["input_ids"].shape[1] for inputs in prompts)

    def pad(row: torch.Tensor) -> torch.Tensor:
        missing = longest - row.shape[1]
        return torch.nn.functional.pad(row, (missing, 0) if side == "left" else (0, missing))

    ids = torch.cat([pad(inputs["input_ids"]) for inputs in prompts])
    mask = torch.cat([pad(torch.ones_like(inputs["input_ids"])) for inputs in prompts])
    with_pictures = [inputs for inputs in prompts if "pixel_values" in inputs]
    names = ("pixel_values", "image_sizes", "batch_num_images")
    pictures = {name: torch.cat([inputs[name] for inputs in with_pictures]) for name in names} if with_pictures else {}
    return {"input_ids": ids, "attention_mask": mask, **pictures}


def stock_twin(ours: VisorForConditionalGeneration) -> LlavaOnevisionForConditionalGeneration:
    """Returns transformers' model with the shape and the weights of a dense plan of ours."""
    config = ours.config
    stock = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config=config.text_config.to_dict(),
            vision_config=config.vision_config.to_dict(),
            image_token_index=config.image_token_index,
            video_token_index=61,
            image_grid_pinpoints=config.image_grid_pinpoints,
            vision_aspect_ratio=config.vision_aspect_ratio,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).eval()
    weights = ours.state_dict()
    stock_weights = {key: weights.get(key_map.canonical_key(key)) for key in stock.state_dict()}
    unused = {key for key, value in stock_weights.items() if value is None}
    assert all("post_layernorm" in key for key in unused), unused
    stock.load_state_dict({key: value for key, value in stock_weights.items() if value is not None}, strict=False)
    return stock


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The helpers above, because tests cannot import conftest.py."""
    return SimpleNamespace(
        IMAGE=IMAGE,
        greedily=greedily,
        config=tiny_config,
        randomize=randomize,
        prompt=prompt,
        join=join,
        stock_twin=stock_twin,
    )


# --- a folder of `visor export`, without parity.json ------------------------------------------------------------------

TOKENIZER = testing.almanac_tokenizer()


@pytest.fixture(scope="session")
def jax_model() -> Visor:
    """A random VISOR plan of six layers, with grids, a policy and three viable budgets."""
    base = testing.tiny_architecture(6)
    text = dataclasses.replace(base.text, num_layers=6, vocab_size=TOKENIZER.vocab_size + 3)
    arch = testing.tiny_architecture(text=text, anyres=base.anyres)
    budgets = all_subsets(arch.num_slots)[:3]
    return Visor(testing.random_params(arch), arch, TOKENIZER, budgets, system="Be brief.", has_policy=True)


@pytest.fixture(scope="session")
def visor_folder(jax_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    torch_export.write_folder(folder, jax_model, stage="policy", dtype="float32", max_shard_bytes=10**9)
    return folder
