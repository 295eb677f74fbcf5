"""Folders of other programs are read correctly, or refused with the field's name and a remedy."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from visor_jax.__main__ import main
from visor_jax.errors import RequestError
from visor_jax.hf.config import architecture_of
from visor_jax.hf.headers import locate
from visor_jax.hf.keys import canonical_key
from visor_jax.hf.preprocessor import CLIP_MEAN, CLIP_STD, read_preprocessor
from visor_jax.hf.read import Checkpoint, check, open_checkpoint
from visor_jax.loading import load

GRIDS = [[28 * rows, 28 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
STATISTICS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2]}


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of links to an untied model with one safetensors file; tests may replace its files."""
    (tmp_path / "folder").mkdir()
    for file in saved["memory"].iterdir():
        name = "model.safetensors" if file.suffix == ".safetensors" else file.name
        (tmp_path / "folder" / name).symlink_to(file)
    return tmp_path / "folder"


def write(file: Path, value: Any) -> None:
    file.unlink(missing_ok=True)
    file.write_text(json.dumps(value))


def with_config(folder: Path, **changes: Any) -> Path:
    """Changes fields of config.json; None removes one."""
    whole = {**json.loads((folder / "config.json").read_text()), **changes}
    write(folder / "config.json", {name: value for name, value in whole.items() if value is not None})
    return folder


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({rename(name): x for name, x in tensors.items()}, folder / "model.safetensors")


# --- the image processor ----------------------------------------------------------------------------------------------

OBEYED = [
    {},
    {"image_processor_type": "LlavaOnevisionImageProcessorFast", "processor_class": "LlavaOnevisionProcessor"},
    {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "do_center_crop": False},
    {"do_pad": False, "do_convert_rgb": None, "rescale_factor": 0.00392156862745098, "resample": 3},
    {"size": {"height": 28, "width": 28}, "crop_size": None, "image_grid_pinpoints": GRIDS},
    {"size": {"shortest_edge": 28, "longest_edge": None}},
    {"size": 28},
]
REFUSED = [
    ("do_resize", False, "expected true"),
    ("do_rescale", False, "expected true"),
    ("do_normalize", False, "expected true"),
    ("do_convert_rgb", False, "expected true"),
    ("do_center_crop", True, "expected false"),
    ("do_pad", "yes", "expected true or false"),
    ("rescale_factor", 2 / 255, r"expected 1/255"),
    ("resample", 2, "expected 3, bicubic"),
    ("resample", "bicubic", "expected 3, bicubic"),
    ("size", {"height": 14, "width": 14}, r'expected \{"height": 28, "width": 28\}'),
    ("size", {"height": 28, "width": 28, "longest_edge": 30}, r'expected \{"height": 28'),
    ("crop_size", {"height": 14, "width": 14}, r'expected \{"height": 28'),
    ("image_grid_pinpoints", [[28, 28]], "expected the same pairs in the same order as in config.json"),
    ("image_grid_pinpoints", GRIDS[::-1], "expected the same pairs in the same order as in config.json"),
    ("image_processor_type", "LlavaNextImageProcessor", "expected 'LlavaOnevisionImageProcessor'"),
    ("image_mean", [0.5], "expected three numbers from 0 to 1"),
    ("image_std", 0.5, "expected three numbers"),
]


@pytest.mark.parametrize("joint", [False, True], ids=["preprocessor_config", "processor_config"])
@pytest.mark.parametrize("fields", OBEYED, ids=str)
def test_fields_of_the_image_processor_are_obeyed(folder: Path, fields: dict[str, Any], joint: bool) -> None:
    """transformers 5 saves only processor_config.json, which includes the image processor."""
    if joint:
        (folder / "preprocessor_config.json").unlink()
        processor = {"image_processor": {**STATISTICS, **fields}, "num_image_tokens": 16, "image_token": "<image>"}
        write(folder / "processor_config.json", {**processor, "vision_aspect_ratio": "anyres_max_4"})
    else:
        write(folder / "preprocessor_config.json", {**STATISTICS, **fields})
    anyres = open_checkpoint(folder).arch.anyres
    assert (anyres.image_mean, anyres.image_std) == ((0.4, 0.5, 0.6), (0.3, 0.25, 0.2))


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_other_values_of_the_image_processor_are_refused(folder: Path, field: str, value: Any, message: str) -> None:
    write(folder / "preprocessor_config.json", {**STATISTICS, field: value})
    with pytest.raises(RequestError, match=rf"preprocessor_config\.json: {field}=.*{message}"):
        open_checkpoint(folder)
    write(folder / "processor_config.json", {"image_processor": {**STATISTICS, field: value}})
    write(folder / "preprocessor_config.json", STATISTICS)  # transformers does not read it in this case
    with pytest.raises(RequestError, match=rf"processor_config\.json: image_processor\.{field}=.*{message}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vision_aspect_ratio", "anyres_max_9", "expected 'anyres_max_4', as in config.json"),
        ("vision_feature_select_strategy", "default", "expected 'full'"),
        ("num_image_tokens", 729, "expected 16, the patches of one tile"),
        ("image_token", "<picture>", "expected '<image>'"),
        ("image_processor", [], "expected an object"),
    ],
)
def test_a_processor_that_counts_otherwise_is_refused(folder: Path, field: str, value: Any, message: str) -> None:
    write(folder / "processor_config.json", {field: value})
    with pytest.raises(RequestError, match=rf"processor_config\.json: {field}=.*{message}"):
        open_checkpoint(folder)


def test_statistics_that_are_missing_are_transformers_default_and_files_are_named(folder: Path) -> None:
    write(folder / "preprocessor_config.json", {})
    anyres = open_checkpoint(folder).arch.anyres
    assert (list(anyres.image_mean), list(anyres.image_std)) == (CLIP_MEAN, CLIP_STD)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match=r"no such file; expected it, or processor_config\.json of transformers 5"):
        open_checkpoint(folder)
    write(folder / "processor_config.json", {"num_image_tokens": 16})
    with pytest.raises(RequestError, match=r"processor_config\.json is there, and has no image_processor"):
        open_checkpoint(folder)


def test_the_published_files_are_taken(tmp_path: Path) -> None:
    """The fields of llava-hf's 0.5B, written by the converter of transformers 4."""
    grids = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "image_grid_pinpoints": grids,
        "image_token_index": 151646, "model_type": "llava_onevision", "projector_hidden_act": "gelu",
        "text_config": {
            "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24, "model_type": "qwen2",
            "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1e6,
            "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 152000,
        },
        "tie_word_embeddings": False, "use_image_newline_parameter": True, "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
        },
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    }  # fmt: skip
    preprocessor = {
        "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
        "image_grid_pinpoints": grids, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor",
        "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"height": 384, "width": 384},
    }  # fmt: skip
    processor = {
        "image_token": "<image>", "num_image_tokens": 729, "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>", "vision_feature_select_strategy": "full",
    }  # fmt: skip
    write(tmp_path / "preprocessor_config.json", preprocessor)
    write(tmp_path / "processor_config.json", processor)
    arch = architecture_of(config, read_preprocessor(tmp_path), tmp_path)
    assert (arch.text.num_layers, arch.text.rope_theta, arch.text.tie_word_embeddings) == (24, 1e6, True)
    assert (arch.vision.num_layers, arch.anyres.max_tiles, len(arch.anyres.pinpoints)) == (26, 9, 36)
    assert arch.anyres.image_mean == arch.anyres.image_std == (0.5, 0.5, 0.5)


# --- config.json ------------------------------------------------------------------------------------------------------

MEANT: dict[str, Callable[[Path], object]] = {
    "vision_feature_layer as a list of one": lambda folder: with_config(folder, vision_feature_layer=[-2]),
    "vision_feature_layer counted from 1": lambda folder: with_config(folder, vision_feature_layer=2),
    "head_dim as it follows": lambda folder: text_config(folder, head_dim=8),
    "image_token_id": lambda folder: with_config(
        folder,
        image_token_id=json.loads((folder / "config.json").read_text())["image_token_index"],
        image_token_index=None,
    ),
    "a byte order mark": lambda folder: marked(folder / "config.json"),
}


def text_config(folder: Path, **changes: Any) -> Path:
    text = {**json.loads((folder / "config.json").read_text())["text_config"], **changes}
    return with_config(folder, text_config=text)


def marked(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(b"\xef\xbb\xbf" + content)


@pytest.mark.parametrize("case", MEANT)
def test_other_spellings_of_the_same_mean_the_same(folder: Path, case: str) -> None:
    before = open_checkpoint(folder)
    MEANT[case](folder)
    after = open_checkpoint(folder)
    assert (after.arch, after.image_token_id) == (before.arch, before.image_token_id)


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 5e4},
        {"rope_theta": 5e4, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 5e4, "rope_scaling": {"type": "default", "rope_theta": 3.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rope_scaling": None},
        {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 8.0}},
    ],
    ids=str,
)
def test_rotary_embedding_is_read_as_transformers_reads_it(folder: Path, rope: dict[str, Any]) -> None:
    from transformers import Qwen2Config

    actual = open_checkpoint(text_config(folder, **{"rope_parameters": None, **rope})).arch.text.rope_theta
    assert actual == Qwen2Config(**copy.deepcopy(rope)).rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling=.*expected none, or rope_type 'default'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*expected none, or rope_type 'default'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters=.*expected none, or rope_type 'default'"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn': expected an object"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, r"rope_scaling\.partial_rotary_factor=0\.5: expected 1\.0"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5: expected 1\.0"),
        ({"rope_theta": -1, "rope_parameters": None}, "rope_theta=-1: expected a positive number"),
    ],
    ids=str,
)
def test_scaled_rotary_embedding_is_refused(folder: Path, rope: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        open_checkpoint(text_config(folder, **rope))


def test_pinpoints_that_are_missing_are_transformers_default(folder: Path) -> None:
    from transformers import LlavaOnevisionConfig

    from visor_jax.hf.config import DEFAULT_PINPOINTS, IMAGE_TOKEN, TEXT_DEFAULTS, VISION_DEFAULTS

    stock = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2"}, vision_config={"model_type": "siglip_vision_model"}
    )
    assert stock.image_grid_pinpoints == DEFAULT_PINPOINTS and stock.image_token_index == IMAGE_TOKEN
    assert {name: getattr(stock.text_config, name) for name in TEXT_DEFAULTS} == TEXT_DEFAULTS
    assert {name: getattr(stock.vision_config, name) for name in VISION_DEFAULTS} == VISION_DEFAULTS


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "llava"}, {"model_type": "llava_qwen"}, {"mm_projector_type": "mlp2x_gelu"}],
    ids=str,
)
def test_the_layout_of_llavas_code_is_refused_with_how_to_convert_it(folder: Path, changes: Any) -> None:
    with pytest.raises(RequestError, match=r"convert_llava_onevision_weights_to_hf\.py") as refused:
        load(with_config(folder, **changes))
    assert len(str(refused.value).replace(str(folder), "")) < 450


# --- names of tensors -------------------------------------------------------------------------------------------------

WRAPPED: dict[str, Callable[[str], str]] = {
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of DistributedDataParallel": lambda name: f"_orig_mod.module.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "activation checkpointing": lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "PEFT, merged": lambda name: f"base_model.model.{name}",
}


@pytest.mark.parametrize("case", WRAPPED)
def test_names_of_wrappers_are_left_out(folder: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    before = locate(folder)
    renamed(folder, WRAPPED[case])
    with caplog.at_level(logging.INFO, logger="visor_jax"):
        after = locate(folder)
    assert {key: (x.shape, x.dtype) for key, x in after.items()} == {k: (x.shape, x.dtype) for k, x in before.items()}
    assert "read without the names of PyTorch's wrappers" in caplog.text


OTHERS: dict[str, tuple[Callable[[str], str], str]] = {
    "an adapter": (lambda name: f"base_model.model.{name}".replace("q_proj", "q_proj.base_layer"), "merge_and_unload"),
    "LoRA": (lambda name: f"base_model.model.{name}".replace("q_proj.weight", "q_proj.lora_A.weight"), "PEFT adapter"),
    "flat shards": (lambda name: f"{name}._flat_param", "FULL_STATE_DICT"),
    "LLaVA's own names": (
        lambda name: name.replace("model.language_model.layers.", "model.layers."),
        r"convert_llava_onevision_weights_to_hf\.py",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_names_of_other_layouts_are_refused_with_what_to_do(folder: Path, case: str) -> None:
    rename, message = OTHERS[case]
    renamed(folder, rename)
    with pytest.raises(RequestError, match=f"tensors such as .*{message}") as refused:
        load(folder)
    assert len(str(refused.value).replace(str(folder), "")) < 450


def test_a_tensor_with_and_without_a_wrapper_is_there_twice(folder: Path) -> None:
    extra = {"module.model.image_newline": torch.zeros(32)}
    save_file({**load_file(folder / "model.safetensors"), **extra}, folder / "twice.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "twice.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(RequestError, match=r"image_newline is in model\.safetensors too, as"):
        load(folder)
    assert canonical_key("module.model.image_newline") == "model.image_newline"


def test_an_adapters_folder_is_refused_with_how_to_merge_it(folder: Path) -> None:
    (folder / "config.json").unlink()
    write(folder / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(RequestError, match="a PEFT adapter, without the model; merge it into its model"):
        load(folder)


def checked(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    check(checkpoint)
    return checkpoint


def test_a_head_that_is_missing_and_not_tied_is_not_drawn_at_random(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({name: x for name, x in tensors.items() if "lm_head" not in name}, folder / "model.safetensors")
    with pytest.raises(RequestError, match=r"lm_head\.weight is missing, .* set tie_word_embeddings to true"):
        checked(folder)
    assert checked(with_config(folder, tie_word_embeddings=True)).arch.text.tie_word_embeddings


def test_a_refusal_is_exit_status_2_and_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = folder / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    renamed(folder, OTHERS["LoRA"][0])
    ask = ["generate", f"--model={folder}", f"--image={picture}", "--question=What is this?"]
    assert main(ask) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert main(ask) == 2
    output = capsys.readouterr().err
    assert output.endswith("config.json: cannot be read: Not a regular file\n") and output.count("\n") == 1
