"""Exported folders: their files, loading, the recorded comparison, and refused or failed exports."""

import argparse
import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from visor_jax import testing
from visor_jax.budget import all_subsets
from visor_jax.commands import export as command
from visor_jax.data import chat_template
from visor_jax.errors import RequestError, RunError
from visor_jax.export import torch_export
from visor_jax.export.parity import NEW_TOKENS, Comparison, Parity, compare
from visor_jax.export.torch_model import VisorForConditionalGeneration, VisorProcessor
from visor_jax.loading import Visor, load
from visor_jax.testing import tiny_config

PROVEN = Parity(1e-5, [Comparison("p", "full", "full", 0.0, True)])
REFUTED = Parity(1e-5, [Comparison("p", "full", "full", 3e-5, True)])


def tiny_model(plan: str = "visor", tied: bool = False, pinpoints=None, standardize: bool = False) -> Visor:
    tokenizer, base = testing.almanac_tokenizer(), testing.tiny_architecture(6)
    arch = testing.tiny_architecture(
        plan=plan,
        text=dataclasses.replace(
            base.text, num_layers=6, vocab_size=tokenizer.vocab_size + 3, tie_word_embeddings=tied
        ),
        anyres=dataclasses.replace(
            base.anyres, pinpoints=base.anyres.pinpoints if pinpoints is None else pinpoints, standardize=standardize
        ),
    )
    params = testing.random_params(arch)
    viable = all_subsets(arch.num_slots)[:3]
    return Visor(params, arch, tokenizer, viable, system="Be brief.", has_policy=plan == "visor")


@pytest.fixture(scope="module")
def model() -> Visor:
    return tiny_model()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """A folder written by `export` with its comparison, and the result of `export`."""
    out = tmp_path_factory.mktemp("exports") / "visor"
    return out, torch_export.export(model, out, stage="policy")


@pytest.fixture
def unproven(monkeypatch):
    """Replaces the comparison during export by a successful result."""
    monkeypatch.setattr(torch_export, "compare", lambda *_: PROVEN)


def some_inputs(folder) -> dict[str, torch.Tensor]:
    picture = Image.fromarray(testing.random_picture(8, 14))
    return VisorProcessor.from_pretrained(folder)(picture, "Which digit is below A?")


def test_the_proof_covers_every_viable_budget_and_auto(model, exported):
    out, result = exported
    proof = json.loads((out / "parity.json").read_text())
    assert result == {
        "out": str(out),
        "max_logit_difference": proof["max_logit_difference"],
        "greedy_tokens_equal": True,
    }
    assert proof["max_logit_difference"] <= proof["bound"] == 1e-5
    assert proof["max_route_difference"] <= 1e-5
    assert proof["new_tokens"] == NEW_TOKENS == 64
    assert proof["budgets"] == ["0b01", "0b10", "auto", "empty"]
    assert proof["files"]["model.safetensors"] == (out / "model.safetensors").stat().st_size
    assert len({path.stat().st_mode for path in out.iterdir() if path.is_file()}) == 1
    assert all(comparison["max_logit_difference"] > 0 for comparison in proof["comparisons"])  # the two programs differ


def test_the_folder_loads_with_remote_code_and_survives_saving_again(exported, tmp_path):
    out, _ = exported
    inputs = some_inputs(out)
    direct: Any = VisorForConditionalGeneration.from_pretrained(out).eval()
    loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
    assert type(loaded).__module__.startswith("transformers_modules.")
    expected = direct(**inputs, budget="0b10").logits
    assert torch.equal(loaded(**inputs, budget="0b10").logits, expected)
    processor = get_class_from_dynamic_module("processing_visor.VisorProcessor", str(out)).from_pretrained(out)
    picture = Image.fromarray(testing.random_picture(8, 14))
    assert torch.equal(processor(picture, "Which digit is below A?")["pixel_values"], inputs["pixel_values"])
    tokens = loaded.generate(**inputs, budget="auto", max_new_tokens=5)
    assert torch.equal(tokens, direct.generate(**inputs, max_new_tokens=5))
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again.eval()(**inputs, budget="0b10").logits, expected)
    processor.save_pretrained(tmp_path / "again")  # completes the folder, so that it loads
    get_class_from_dynamic_module("processing_visor.VisorProcessor", str(tmp_path / "again"))
    picture, question = testing.random_picture(8, 14), "Which digit is below A?"
    first, second = (load(folder).answer(picture, question, max_new_tokens=5) for folder in (out, tmp_path / "again"))
    assert first.text == second.text


@pytest.mark.parametrize("budget", ["0b10", "auto"])
@pytest.mark.slow
def test_a_compiled_model_gives_the_same_logits(exported, budget):
    """The graph breaks at Python values (sizes, budget, cache); the backend generates no code."""
    inputs = some_inputs(exported[0])
    model: Any = VisorForConditionalGeneration.from_pretrained(exported[0]).eval()
    with torch.no_grad():
        expected = model(**inputs, budget=budget).logits
        compiled: Any = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs, budget=budget).logits, expected, rtol=0, atol=1e-6)


def test_exported_files_do_not_import_visor_jax(exported):
    out, _ = exported
    files = sorted(path.name for path in out.glob("*.py"))
    assert files == sorted(torch_export.MODULE_FILES)
    assert (out / "template_visor.py").read_bytes() == Path(chat_template.__file__).read_bytes()
    for name in files:
        text = (out / name).read_text()
        imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
        assert not [line for line in imports if "visor_jax" in line or "jax" in line.split()[1]]


def test_a_changed_weight_is_caught(model, exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(file)
    weights["model.language_model.layers.5.mlp.down_proj.weight"][0, 0] += 0.05
    save_file(weights, file, metadata={"format": "pt"})
    proof = compare(model, tmp_path / "copy")
    assert not proof.holds and "do not agree" in proof.why_not()


def test_a_lost_weight_is_caught(model, exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(file)
    del weights["model.routing.token"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"routing\.token"):
        compare(model, tmp_path / "copy")


def test_bfloat16_weights_are_proven_as_rounded(model, tmp_path):
    result = torch_export.export(model, tmp_path / "out", stage="policy", dtype="bfloat16")
    assert result["greedy_tokens_equal"] and result["max_logit_difference"] <= 1e-5
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        names = weights.keys()
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert VisorForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("pinpoints", [None, ()], ids=["grids", "no grids"])
def test_a_dense_plan_is_a_stock_model(tmp_path, pinpoints):
    model = tiny_model("dense", tied=pinpoints is None, pinpoints=pinpoints)
    result = torch_export.export(model, tmp_path / "out", stage="dense")
    assert result["greedy_tokens_equal"] and result["max_logit_difference"] <= 1e-5
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(loaded) is transformers.LlavaOnevisionForConditionalGeneration
    if pinpoints is None:  # `load` requires grids, which every LLaVA-OneVision has
        again = load(tmp_path / "out")
        assert (again.stage, again.system) == ("dense", "Be brief.")


def test_a_dense_plan_of_standardized_pictures_brings_its_processor(tmp_path):
    """transformers has no processor that standardizes pictures, so the folder holds ours, and loads here again."""
    model, out = tiny_model("dense", tied=True, pinpoints=(), standardize=True), tmp_path / "out"
    result = torch_export.export(model, out, stage="dense")
    assert result["greedy_tokens_equal"] and result["max_logit_difference"] <= 1e-5
    assert {path.name for path in out.glob("*.py")} == {*torch_export.PROCESSOR_FILES}
    processor = transformers.AutoProcessor.from_pretrained(out, trust_remote_code=True)
    assert type(processor).__name__ == "VisorProcessor" and processor.tiler.standardize
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoProcessor.from_pretrained(out, trust_remote_code=False)
    with pytest.raises((ValueError, OSError, KeyError)):
        transformers.AutoImageProcessor.from_pretrained(out)
    again = load(out)
    assert again.arch.anyres == model.arch.anyres
    picture, tokens = testing.random_picture(8, 14), [5, model.tokenizer.image_token_id, 6, 7]
    np.testing.assert_allclose(again.logits(tokens, [picture]), model.logits(tokens, [picture]), rtol=1e-5, atol=1e-5)


def test_large_weights_are_sharded(model, unproven, tmp_path):
    torch_export.export(model, tmp_path / "whole", stage="policy")
    torch_export.export(model, tmp_path / "sharded", stage="policy", max_shard_bytes=100_000)
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all((tmp_path / "sharded" / name).stat().st_size < 120_000 for name in files)
    inputs = some_inputs(tmp_path / "whole")
    one, other = (
        VisorForConditionalGeneration.from_pretrained(tmp_path / name).eval()(**inputs, budget="full").logits
        for name in ("whole", "sharded")
    )
    assert torch.equal(one, other)


def test_a_model_without_a_policy_refuses_auto(tmp_path, unproven):
    model = copy.copy(tiny_model())
    model.has_policy = False
    torch_export.export(model, tmp_path / "out", stage="full")
    loaded = VisorForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    inputs = some_inputs(tmp_path / "out")
    assert loaded(**inputs).budgets.all()
    with pytest.raises(ValueError, match="policy"):
        loaded(**inputs, budget="auto")


def test_an_export_that_does_not_agree_leaves_nothing(model, monkeypatch, tmp_path):
    monkeypatch.setattr(torch_export, "compare", lambda *_: REFUTED)
    with pytest.raises(RunError, match="logits differ by up to 3e-05, allowed 1e-05"):
        torch_export.export(model, tmp_path / "out", stage="policy")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_one(model, monkeypatch, tmp_path):
    monkeypatch.setattr(torch_export, "compare", lambda *_: PROVEN)
    torch_export.export(model, tmp_path / "out", stage="policy")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(torch_export, "compare", lambda *_: REFUTED)
    with pytest.raises(RunError):
        torch_export.export(model, tmp_path / "out", stage="policy", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_not_finite_are_not_exported(model, unproven, tmp_path):
    params = jax.tree.map(np.array, model.params)
    params["image_newline"][0] = np.inf
    with pytest.raises(RunError, match="image_newline"):
        torch_export.export(model.with_params(params), tmp_path / "out", stage="policy")
    assert list(tmp_path.iterdir()) == []


def test_destinations_are_not_overwritten(model, unproven, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    (tmp_path / "full" / "config.json").write_text("{}")  # as in a workdir or in somebody's model
    for name, force in [("file", False), ("file", True), ("full", False), ("full", True)]:
        with pytest.raises(RequestError, match=f"{name}"):
            torch_export.export(model, tmp_path / name, stage="policy", force=force)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "all of it"
    (tmp_path / "empty").mkdir()
    torch_export.export(model, tmp_path / "empty", stage="policy")
    with pytest.raises(RequestError, match="not empty"):
        torch_export.export(model, tmp_path / "empty", stage="policy")
    torch_export.export(model, tmp_path / "empty", stage="full", force=True)
    assert "`full`" in (tmp_path / "empty" / "README.md").read_text()


def test_unknown_dtypes_are_refused(model, tmp_path):
    with pytest.raises(RequestError, match="float16"):
        torch_export.export(model, tmp_path / "out", stage="policy", dtype="float16")


def test_packed_visual_tokens_are_refused(model, tmp_path):
    packed = copy.copy(model)
    packed.arch = dataclasses.replace(model.arch, anyres=dataclasses.replace(model.arch.anyres, packing=4))
    with pytest.raises(RequestError, match=r"model\.anyres\.packing=4"):
        torch_export.export(packed, tmp_path / "out", stage="dense")


def arguments(tmp_path, **changes) -> argparse.Namespace:
    given = {"workdir": str(tmp_path), "out": None, "stage": None, "dtype": "float32", "force": False, "json": True}
    return argparse.Namespace(**{**given, **changes})


def test_the_command_exports_the_newest_complete_stage(model, unproven, monkeypatch, tmp_path):
    loaded_stages = []
    monkeypatch.setattr("visor_jax.loading.load_stage", lambda workdir, stage: loaded_stages.append(stage) or model)
    for stage in ("full", "universal"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "complete.json").write_text('{"step": 1}')
    result = command.main(arguments(tmp_path), tiny_config())
    assert loaded_stages == ["universal"]
    assert result == {
        "out": str(tmp_path / "export"),
        "max_logit_difference": 0.0,
        "greedy_tokens_equal": True,
    }
    command.main(arguments(tmp_path, stage="full", out=str(tmp_path / "other")), tiny_config())
    assert loaded_stages[1:] == ["full"] and (tmp_path / "other" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "no complete stage"), ({"stage": "polcy"}, "policy"), ({"dtype": "int8"}, "int8")],
)
def test_the_command_refuses_by_name(tmp_path, changes, message):
    with pytest.raises(RequestError, match=message):
        command.main(arguments(tmp_path, **changes), tiny_config())
