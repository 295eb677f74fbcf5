"""The dense plan is LLaVA-OneVision: the same logits as transformers' model on the same weights, from pixels on."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from visor_jax import testing
from visor_jax.architecture import AnyResArchitecture, Architecture, VisionArchitecture
from visor_jax.data.anyres import visual_token_count
from visor_jax.data.collate import RowShape, encode_tokens, make_batch
from visor_jax.model.visor import logits
from visor_jax.testing import IMAGE_TOKEN
from visor_jax.tree import flatten

TILE = 28
GRIDS = tuple((rows * TILE, columns * TILE) for rows in (1, 2, 3) for columns in (1, 2, 3))
VISION = VisionArchitecture(
    tile_size=TILE, patch_size=7, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4
)
ARCH = testing.tiny_architecture(
    4,  # a super-block and one layer more
    plan="dense",
    vision=VISION,
    anyres=AnyResArchitecture(GRIDS, max_tiles=2, image_mean=(0.4, 0.5, 0.6), image_std=(0.3, 0.25, 0.2)),
)
TIED = dataclasses.replace(ARCH, text=dataclasses.replace(ARCH.text, tie_word_embeddings=True))

# (height, width) of the pictures of each prompt, (frames, height, width) of the videos
CASES: dict[str, tuple[tuple[int, ...], ...]] = {
    "one tile": ((28, 28),),
    "wide": ((20, 61),),
    "tall": ((90, 31),),
    "unpadded": ((37, 50),),
    "shrunk": ((84, 84),),
    "shrunk and unpadded": ((75, 60),),
    "tiny": ((5, 9),),
    "two pictures": ((28, 28), (40, 25)),
    "three pictures": ((30, 90), (28, 28), (61, 20)),
    "text only": (),
    "video": ((3, 20, 61),),
    "one picture and two videos": ((2, 40, 25), (37, 50), (2, 28, 28)),
}
VIDEO_TOKEN = 0
WINDOW = RowShape(tiles=10, visual=64, text=9)


def torch_weights(params: Any, arch: Architecture) -> dict[str, torch.Tensor]:
    """Our parameters under transformers' names and in its layouts, by hand."""
    decoder, tower = "model.language_model", "model.vision_tower"
    first_left_over = 3 * arch.num_blocks
    stacked = {
        "vision/layers": [f"{tower}.encoder.layers.{i}" for i in range(arch.vision.num_layers)],
        "blocks/text": [f"{decoder}.layers.{3 * block}" for block in range(arch.num_blocks)],
        "blocks/cross": [f"{decoder}.layers.{3 * block + 1}" for block in range(arch.num_blocks)],
        "blocks/self": [f"{decoder}.layers.{3 * block + 2}" for block in range(arch.num_blocks)],
        "tail": [f"{decoder}.layers.{first_left_over + i}" for i in range(arch.num_tail_layers)],
    }
    single = {
        "vision": f"{tower}.embeddings",
        "connector": "model.multi_modal_projector",
        "embed_tokens": f"{decoder}.embed_tokens",
        "norm": f"{decoder}.norm",
        "lm_head": "lm_head",
    }
    state = {"model.image_newline": params["image_newline"]}
    for path, x in flatten({name: x for name, x in params.items() if name != "image_newline"}).items():
        for ours, theirs in stacked.items():
            if path.startswith(ours + "/"):
                inner = path.removeprefix(ours)
                state |= {key + torch_name(inner): torch_layout(path, x[index]) for index, key in enumerate(theirs)}
                break
        else:
            where, slash, inner = path.partition("/")
            state[single[where] + torch_name(slash + inner)] = torch_layout(path, x)
    return {name: torch.tensor(np.ascontiguousarray(x)) for name, x in state.items()}


def torch_name(path: str) -> str:
    """ "/mlp/fc1/kernel" -> ".mlp.fc1.weight"."""
    *modules, leaf = path.split("/")
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def torch_layout(path: str, x: np.ndarray) -> np.ndarray:
    if path == "vision/patch_embedding/kernel":  # [row * column * channel, out] -> [out, channel, row, column]
        side = VISION.patch_size
        return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
    return x.T if path.endswith("/kernel") else x


@cache
def reference(arch: Architecture) -> LlavaOnevisionForConditionalGeneration:
    text, vision = arch.text, arch.vision
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": vision.tile_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
            "tie_word_embeddings": text.tie_word_embeddings,
        },
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[list(grid) for grid in GRIDS],
        vision_aspect_ratio=f"anyres_max_{arch.anyres.max_tiles}",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    unused = {name for name in model.state_dict() if "post_layernorm" in name}  # features are taken before it
    found = model.load_state_dict(torch_weights(testing.random_params(arch), arch), strict=False)
    expected_missing = unused | ({"lm_head.weight"} if text.tie_word_embeddings else set())
    assert set(found.missing_keys) == expected_missing and not found.unexpected_keys
    model.tie_weights()
    return model


def prompt(case: str) -> tuple[list[int], list[np.ndarray]]:
    """Token ids with one placeholder for each picture, text around all of them; and the pictures."""
    rng = np.random.default_rng(len(case))
    sizes = CASES[case]
    tokens = rng.integers(2, ARCH.text.vocab_size, 2).tolist()
    for index in range(len(sizes)):
        tokens += [IMAGE_TOKEN, *rng.integers(2, ARCH.text.vocab_size, 1 + index % 2).tolist()]
    tokens += rng.integers(2, ARCH.text.vocab_size, 3).tolist()
    return tokens, [random_pixels(size, seed=index) for index, size in enumerate(sizes)]


def random_pixels(size: tuple[int, ...], seed: int) -> np.ndarray:
    if len(size) == 2:
        return testing.random_picture(size[0], size[1], seed=seed)
    return np.stack([testing.random_picture(*size[1:], seed=100 * seed + frame) for frame in range(size[0])])


def reference_logits(arch: Architecture, case: str) -> np.ndarray:
    """transformers' logits at the text tokens, its own processor having made the tiles."""
    tokens, pictures = prompt(case)
    ids: list[int] = []
    videos = [x for x in pictures if x.ndim == 4]
    pictures, sizes = [x for x in pictures if x.ndim == 3], iter(CASES[case])
    for token in tokens:  # transformers refuses a wrong number of placeholders
        if token != IMAGE_TOKEN:
            ids.append(token)
            continue
        size = next(sizes)
        count = visual_token_count(size, arch, len(pictures))
        ids += [IMAGE_TOKEN if len(size) == 2 else VIDEO_TOKEN] * count
    inputs = {}
    if videos:
        inputs["pixel_values_videos"] = torch.stack([torch.tensor(frames_of(video, arch)) for video in videos])
    if pictures:
        processor = LlavaOnevisionImageProcessorPil(
            size={"height": TILE, "width": TILE},
            image_grid_pinpoints=[list(grid) for grid in GRIDS],
            image_mean=list(arch.anyres.image_mean),
            image_std=list(arch.anyres.image_std),
        )
        made = processor.preprocess([[Image.fromarray(picture) for picture in pictures]], return_tensors="pt")
        inputs |= {"pixel_values": made["pixel_values"], "image_sizes": torch.tensor([x.shape[:2] for x in pictures])}
        inputs["batch_num_images"] = torch.tensor([len(pictures)])
    with torch.no_grad():
        found = reference(arch)(input_ids=torch.tensor([ids]), **inputs).logits[0].numpy()
    return found[~np.isin(ids, (IMAGE_TOKEN, VIDEO_TOKEN))]


def frames_of(video: np.ndarray, arch: Architecture) -> np.ndarray:
    """[F, 3, S, S]: each frame stretched to a tile and normalized, as LLaVA-NeXT's processor does (Pillow's pixels)."""
    frames = [Image.fromarray(frame).resize((TILE, TILE), Image.Resampling.BICUBIC) for frame in video]
    values = np.stack([np.asarray(frame) for frame in frames]).astype(np.float32) / 255
    mean, std = np.float32(arch.anyres.image_mean), np.float32(arch.anyres.image_std)
    return ((values - mean) / std).transpose(0, 3, 1, 2)


@cache
def our_logits(arch: Architecture) -> dict[str, np.ndarray]:
    """All cases as the rows of one batch."""
    examples = [encode_tokens(*prompt(case), IMAGE_TOKEN, arch) for case in CASES]
    batch = make_batch([[example] for example in examples], WINDOW, arch).arrays
    params = testing.random_params(arch)
    found = np.asarray(testing.quick_jit(partial(logits, arch=arch))(params, batch, np.zeros(0, bool)))
    return {
        case: found[row, : example.size.text] for row, (case, example) in enumerate(zip(CASES, examples, strict=True))
    }


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str) -> None:
    found, expected = our_logits(ARCH)[case], reference_logits(ARCH, case)
    assert found.shape == expected.shape and np.abs(expected).max() > 1, "logits large enough to tell"
    assert np.abs(found - expected).max() <= 1e-5


def test_logits_equal_transformers_with_a_tied_head() -> None:
    case = "unpadded"
    assert np.abs(our_logits(TIED)[case] - reference_logits(TIED, case)).max() <= 1e-5
