"""Checkpoints in Hugging Face's format: transformers' give its logits, ours load unchanged, invalid ones are refused.

Refusals precede reading any parameter.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration

from visor_jax import testing
from visor_jax.__main__ import main
from visor_jax.data.anyres import visual_token_count
from visor_jax.data.chat import encode_prompt
from visor_jax.errors import RequestError
from visor_jax.export import torch_export
from visor_jax.hf.keys import canonical_key
from visor_jax.hf.read import open_checkpoint
from visor_jax.loading import Visor, load
from visor_jax.tree import flatten

try:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
except ImportError:  # its name in transformers 5.3
    from transformers.models.llava_onevision.image_processing_llava_onevision import (
        LlavaOnevisionImageProcessor as LlavaOnevisionImageProcessorPil,
    )

SIZES = ((28, 28), (20, 61), (84, 80))
TOKENIZER = testing.almanac_tokenizer()


StockModel = Callable[[bool], LlavaOnevisionForConditionalGeneration]


def stock_inputs(model: Any, tokens: list[int], pictures: list[Any], arch: Any) -> dict[str, torch.Tensor]:
    """Returns the inputs of transformers' model: one placeholder per visual token."""
    side = model.config.vision_config.image_size
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=model.config.image_grid_pinpoints,
        image_mean=list(arch.anyres.image_mean), image_std=list(arch.anyres.image_std),
    )  # fmt: skip
    lengths = iter([visual_token_count((p.height, p.width), arch, len(pictures)) for p in pictures])
    image = TOKENIZER.image_token_id
    ids = [i for token in tokens for i in [token] * (next(lengths) if token == image else 1)]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": processor.preprocess([pictures], return_tensors="pt")["pixel_values"],
        "image_sizes": torch.tensor([(p.height, p.width) for p in pictures]),
        "batch_num_images": torch.tensor([len(pictures)]),
    }


def stock_logits(model: LlavaOnevisionForConditionalGeneration, tokens: list[int], pictures: list[Any], arch: Any):
    inputs = stock_inputs(model, tokens, pictures, arch)
    with torch.no_grad():
        actual = model(**inputs).logits[0]
    return actual[inputs["input_ids"][0] != TOKENIZER.image_token_id].numpy()


@pytest.mark.parametrize("form", ["shards", "tied", "memory"])
def test_a_stock_checkpoint_gives_transformers_logits(
    saved: dict[str, Path], stock_model: StockModel, form: str
) -> None:
    model = load(saved[form])
    assert model.arch.plan == "dense" and model.arch.vision.num_layers == 2 and model.arch.anyres.max_tiles == 4
    rng = np.random.default_rng(0)
    for number in (1, 2):
        pictures = [Image.fromarray(testing.random_picture(*size, seed=i)) for i, size in enumerate(SIZES[-number:])]
        words = rng.integers(2, TOKENIZER.vocab_size - 9, 6).tolist()
        words = [word for word in words if word != TOKENIZER.image_token_id]
        tokens = [*words[:2], *[TOKENIZER.image_token_id] * number, *words[2:]]
        expected = stock_logits(stock_model(form == "tied"), tokens, pictures, model.arch)
        np.testing.assert_allclose(model.logits(tokens, pictures), expected, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_answers_are_transformers_own_and_end_where_it_ends(
    saved: dict[str, Path], stock_model: StockModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`visor generate` on a checkpoint's folder, with the folder's tokenizer and generation_config.json."""
    folder = Path(shutil.copytree(saved["shards"], tmp_path / "copy"))
    picture, question = Image.fromarray(testing.random_picture(30, 50, seed=0)), "Which digit is below A?"
    picture.save(tmp_path / "picture.png")
    ask = "generate", f"--model={folder}", f"--image={tmp_path / 'picture.png'}", f"--question={question}"
    tokens = stock_answer(stock_model(False), encode_prompt(TOKENIZER, question), picture, load(folder).arch, 12)
    assert main([*ask, "--max-new-tokens=12", "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert (actual["text"], actual["budget"], actual["complete"]) == (TOKENIZER.decode(tokens), "dense", False)
    end = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[end], 5000]}))
    assert main([*ask, "--max-new-tokens=12", "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert (actual["text"], actual["complete"]) == (TOKENIZER.decode(tokens[:end]), True)
    for malformed in ("[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [-1]}'):
        (folder / "generation_config.json").write_text(malformed)
        with pytest.raises(RequestError, match=r"generation_config\.json: "):
            load(folder)


def stock_answer(model: Any, prompt: list[int], picture: Image.Image, arch: Any, count: int) -> list[int]:
    """Returns the greedy tokens of transformers' `generate`, without placeholders."""
    inputs = stock_inputs(model, prompt, [picture], arch)
    greedy = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        made = model.generate(**inputs, **greedy, suppress_tokens=[TOKENIZER.image_token_id])
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def test_what_we_exported_comes_back(tiny_run: Path, tmp_path: Path) -> None:
    model = load(tiny_run)
    (tmp_path / "out").mkdir()
    torch_export.write_folder(tmp_path / "out", model, stage="policy", dtype="float32", max_shard_bytes=100_000)
    back = load(tmp_path / "out")
    assert (back.stage, back.has_policy, back.viable_budgets) == ("policy", True, model.viable_budgets)
    assert jax.tree.structure(back.params) == jax.tree.structure(model.params)
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(back.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(RequestError, match=r"plan=dense: .* plan 'visor'"):
        load(tmp_path / "out", plan="dense")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("training_stage", "../elsewhere", "expected one of base_words,"),
        ("training_stage", 3, "expected one of base_words,"),
        ("viable_budgets", [4, 5], "expected a list of budgets, 0b and 2 bits each"),
        ("viable_budgets", ["0b10", "0b101"], "expected a list of budgets, 0b and 2 bits each"),
        ("viable_budgets", ["0b10"] * 33, "expected at most"),
        ("has_policy", "yes", "expected true or false"),
        ("system_prompt", ["be kind"], "text or null"),
    ],
)
def test_what_our_exports_add_is_checked(tiny_run: Path, tmp_path: Path, field: str, value: Any, expected: str) -> None:
    """A foreign folder cannot name files to write, or budgets that the model does not have."""
    torch_export.write_folder(tmp_path, load(tiny_run), stage="policy", dtype="float32", max_shard_bytes=100_000_000)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(RequestError, match=f"config.json: {field}.*{expected}|{expected}"):
        open_checkpoint(tmp_path)


def test_a_dense_checkpoint_is_given_new_layers(saved: dict[str, Path]) -> None:
    dense, visor = load(saved["shards"]), load(saved["shards"], plan="visor")
    assert visor.arch == dataclasses.replace(dense.arch, plan="visor")
    old, new = flatten(dense.params), flatten(visor.params)
    for path, array in old.items():
        np.testing.assert_array_equal(array, new[path], err_msg=path)
    parts = {path.split("/")[1 if path.startswith("blocks/") else 0] for path in new.keys() - old.keys()}
    assert parts == {"cross_attention", "routing"}
    copied = new["blocks/cross_attention/q_proj/kernel"]
    np.testing.assert_array_equal(copied, old["blocks/cross/self_attn/q_proj/kernel"])
    image = Image.fromarray(testing.random_picture(30, 50, seed=0))
    assert visor.answer(image, "Which digit is shown?", "full", max_new_tokens=2).budget == "full"
    with pytest.raises(RequestError, match="plan='sparse': expected"):
        load(saved["shards"], plan="sparse")


# --- invalid folders --------------------------------------------------------------------------------------------------


def changed_copy(folder: Path, tmp_path: Path, change: Any) -> Path:
    """Copies a folder with one file of tensors and changes its tensors."""
    copy = tmp_path / "changed"
    copy.mkdir()
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        shutil.copy(folder / name, copy)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, copy / "model.safetensors")
    return copy


def key(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


def drop(end: str) -> Any:
    return lambda tensors: tensors.pop(key(tensors, end))


def put(end: str, make: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key(tensors, end)] = make(tensors[key(tensors, end)])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("layers.4.mlp.up_proj.weight"), r"layers\.4\.mlp\.up_proj\.weight is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra is not expected"),
        (put("image_newline", lambda x: x[:-1]), r"image_newline has shape \(31,\), expected \(32,\)"),
        (put("layers.0.input_layernorm.weight", lambda x: x * float("nan")), "input_layernorm.weight holds NaN or Inf"),
        (put("linear_1.bias", lambda x: x.to(torch.int32)), "linear_1.bias is I32, expected one of F32"),
    ],
)
def test_tensors_are_checked_before_they_are_read(saved: dict[str, Path], tmp_path: Path, change: Any, message: str):
    with pytest.raises(RequestError, match=f"1 tensors are not as config.json says: .*{message}"):
        load(changed_copy(saved["shards"], tmp_path, change))


def test_all_problems_are_counted_and_the_first_of_each_kind_named(saved: dict[str, Path], tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors)[::2]:
            tensors[f"other.{name}"] = tensors.pop(name)

    with pytest.raises(RequestError, match="tensors are not as config") as refused:
        load(changed_copy(saved["shards"], tmp_path, rename))
    refusal = str(refused.value).replace(str(tmp_path), "")
    assert "other." in refusal and "more are missing" in refusal and "more are not expected" in refusal
    assert (
        int(refusal.split(" tensors are not")[0].rpartition(" ")[2]) > 100
        and len(refusal) < 1000
        and "\n" not in refusal
    )


def test_what_transformers_does_not_read_is_not_read(saved: dict[str, Path], tmp_path: Path) -> None:
    """model.safetensors counts; other files of tensors, and an index of missing shards, are ignored."""
    for file in saved["tied"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    save_file({"adapter": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    load(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "float99", int])
def test_a_dtype_that_is_none_of_floating_point_is_refused(saved: dict[str, Path], dtype: Any) -> None:
    with pytest.raises(RequestError, match="expected float32, bfloat16, float16"):
        load(saved["shards"], dtype=dtype)
    assert load(saved["shards"], dtype=np.float16).params["norm"]["scale"].dtype == np.float16


def test_a_path_that_is_no_model_says_what_may_stand_there(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "no such folder; expected a workdir"), (tmp_path, "no complete stage")):
        with pytest.raises(RequestError, match=f"{message}.*Hugging Face"):
            load(path)


def test_a_tied_head_must_be_the_embeddings(saved: dict[str, Path], tmp_path: Path) -> None:
    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.ones_like(tensors[key(tensors, "embed_tokens.weight")])

    with pytest.raises(RequestError, match=r"lm_head\.weight differs from the embeddings"):
        load(changed_copy(saved["tied"], tmp_path, untie))


def test_files_that_are_missing_or_cut_short(saved: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved["shards"], tmp_path / "copy"))
    shards = sorted(copy.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-7])
    with pytest.raises(RequestError, match=f"{shards[0].name}: no whole safetensors file"):
        load(copy)
    shards[0].unlink()
    with pytest.raises(RequestError, match=f"{shards[0].name}: no such file; the index names it"):
        load(copy)
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(RequestError, match=r"no \.safetensors"):
        load(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"safetensors|tokenizer"):
        load(copy)


# --- the command ------------------------------------------------------------------------------------------------------

CONFIG = """
from visor_jax.config import default_config

def get_config():
    config = default_config()
    config.stages = ("warmup", "full", "search", "universal", "label", "policy")
    config.model.text.update(
        vocab_size={vocab}, hidden_size=32, intermediate_size=48, num_layers=7, num_heads=4, num_kv_heads=2, head_dim=8,
        rms_norm_eps=1e-5, rope_theta=5e4,
    )
    config.model.vision.update(
        tile_size=28, patch_size=7, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4
    )
    config.model.anyres.update(
        pinpoints="(1x1),...,(3x3)", max_tiles=4, image_mean=(0.4, 0.5, 0.6), image_std=(0.3, 0.25, 0.2)
    )
    config.data.update(source="llava", path="train.json", tiles=10)
    config.tokenizer.path = "almanac"
    return config
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.py"
    file.write_text(CONFIG.replace("{vocab}", str(TOKENIZER.vocab_size + 9)))
    return file


@pytest.mark.usefixtures("quick")
def test_import_makes_the_stage_that_training_goes_on_from(
    saved: dict[str, Path], tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    command = ["import", f"--from={saved['shards']}", f"--workdir={workdir}", f"--config={config_file}", "--json"]
    assert main(command) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    model = load(workdir)
    assert isinstance(model, Visor) and model.stage == "base" == result["stage"]
    stated = json.loads((saved["shards"] / "config.json").read_text())["text_config"]["max_position_embeddings"]
    assert model.arch.text.max_positions == stated, "the checkpoint's value, if the configuration has none"
    counts = {name: x.size for name, x in flatten(model.params).items()}
    new = {name: n for name, n in counts.items() if "cross_attention" in name or name.startswith("routing")}
    assert result["parameters"] == sum(counts.values()) and result["new_parameters"] == sum(new.values())
    assert result["new"].keys() == {"blocks/cross_attention", "routing"}
    assert f"{100 * sum(new.values()) / (sum(counts.values()) - sum(new.values())):.1f} % on top" in printed.err
    stored = load_file(next(saved["memory"].glob("*.safetensors")))
    stored = {canonical_key(name): x for name, x in stored.items()}
    newline = stored["model.image_newline"].numpy()
    np.testing.assert_array_equal(model.params["image_newline"], newline)
    Image.fromarray(testing.random_picture(30, 50, seed=0)).save(tmp_path / "picture.png")
    ask = "generate", f"--workdir={workdir}", f"--image={tmp_path / 'picture.png'}", "--question=Which digit is shown?"
    assert main([*ask, "--budget=0b01", "--max-new-tokens=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"] == "0b01"
    assert main(ask) == 2 and "no trained policy; name a budget" in capsys.readouterr().err
    assert main(command) == 2
    assert "base: is complete already; expected another --workdir" in capsys.readouterr().err


def test_import_into_another_shape_names_every_difference(
    saved: dict[str, Path], tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--config.model.text.intermediate_size=64", "--config.model.anyres.max_tiles=9"]
    command = ["import", f"--from={saved['shards']}", f"--workdir={tmp_path / 'run'}", f"--config={config_file}"]
    assert main([*command, *other]) == 2
    refusal = capsys.readouterr().err
    assert "model.text.intermediate_size is 48 there and 64 here" in refusal
    assert "model.anyres.max_tiles is 4 there and 9 here" in refusal
    assert not (tmp_path / "run").exists()


def test_import_without_a_tokenizer_names_the_checkpoints_own(
    saved: dict[str, Path], tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import", f"--from={saved['shards']}", f"--workdir={tmp_path / 'run'}", f"--config={config_file}"]
    assert main([*command, "--config.tokenizer.path=not_here.json"]) == 2
    refusal = capsys.readouterr().err
    assert "no file not_here.json" in refusal and f"--config.tokenizer.path={saved['shards']}/tokenizer.json" in refusal
    assert not (tmp_path / "run").exists()
