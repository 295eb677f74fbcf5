"""Stages that start from a checkpoint in Hugging Face's format: the one that the package ships, or a folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import visor_jax
from visor_jax import testing
from visor_jax.commands.recipe import run_stages
from visor_jax.config import Config, apply_overrides, architecture, as_config, shipped
from visor_jax.errors import RequestError
from visor_jax.export.model_card import about_stage
from visor_jax.export.ship import lineage, ship
from visor_jax.export.torch_export import write_folder
from visor_jax.files.read_write import read_json
from visor_jax.generate.visor import Visor
from visor_jax.loading import load
from visor_jax.model.visor import abstract_params, init_params
from visor_jax.scale.mesh import configured_mesh
from visor_jax.scale.sharding import param_shardings
from visor_jax.testing import tiny_config
from visor_jax.train.state import start_params
from visor_jax.tree import flatten
from visor_jax.workdir.folder import Workdir

NAME = "almanac-base"


def configured(changes: Mapping[str, Any] | None = None) -> Config:
    return as_config(tiny_config({"stage_overrides.warmup.init_from": NAME, "stages": ("warmup",), **(changes or {})}))


def dense_model() -> Visor:
    """A dense model of the tiny configuration's sizes, with random parameters."""
    arch = dataclasses.replace(architecture(configured()), plan="dense")
    return Visor(testing.random_params(arch), arch, testing.almanac_tokenizer(), [()], stage="base_pages")


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped checkpoints with one of random weights, in place of the package's."""
    model, folder = dense_model(), tmp_path / "assets" / NAME
    folder.mkdir(parents=True)
    write_folder(folder, model, stage="base_pages", dtype="float32", max_shard_bytes=10**9)
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "assets")
    return tmp_path / "assets"


def started(config: Config, stage: str, workdir: Path) -> dict[str, Any]:
    arch, mesh = architecture(config, stage), configured_mesh(config)
    places = param_shardings(abstract_params(arch), mesh)
    fresh = testing.quick_jit(lambda key: init_params(arch, key))
    return flatten(start_params(config, stage, arch, mesh, Workdir(workdir), places, fresh))


def test_a_stage_starts_from_the_shipped_checkpoint(assets: Path, tmp_path: Path) -> None:
    dense = flatten(dense_model().params)
    params = started(configured(), "warmup", tmp_path)
    assert all(np.array_equal(params[path], array) for path, array in dense.items())
    new = {path for path in params if path not in dense}
    assert new and all(path.startswith(("blocks/cross_attention/", "routing/")) for path in new)
    copied = params["blocks/cross_attention/q_proj/kernel"]
    assert np.array_equal(copied, dense["blocks/cross/self_attn/q_proj/kernel"]), "by copying self-attention"


def test_a_dense_stage_starts_from_a_folder(assets: Path, tmp_path: Path) -> None:
    changes = {
        "model.plan": "dense",
        "stages": ("dense",),
        "stage_overrides.dense.init_from": str(assets / NAME),
    }
    params = started(as_config(tiny_config(changes)), "dense", tmp_path)
    dense = flatten(dense_model().params)
    assert params.keys() == dense.keys() and all(np.array_equal(params[path], dense[path]) for path in dense)


def test_a_stage_may_reduce_the_tokens_of_a_checkpoint_and_have_another_pattern(assets: Path, tmp_path: Path) -> None:
    dense = flatten(dense_model().params)
    reduced = {"model.reduction.method": "hired", "model.reduction.ratio": 0.25}
    for changes in ({"model.anyres.packing": 4}, reduced, {"model.pattern": ("cross", "self")}):
        params = started(configured(changes), "warmup", tmp_path)
        assert np.array_equal(params["embed_tokens/embedding"], dense["embed_tokens/embedding"])
        assert "blocks/cross_attention/q_proj/kernel" in params


def test_it_is_loaded_and_imported_by_its_name(assets: Path, tmp_path: Path) -> None:
    from visor_jax.__main__ import main

    model = visor_jax.load(NAME)
    assert (model.arch.plan, model.stage) == ("dense", "base_pages")
    fields = {"stages": ("warmup",)}
    code = f"from visor_jax.testing import tiny_config\n\n\ndef get_config():\n    return tiny_config({fields!r})\n"
    (tmp_path / "config.py").write_text(code)
    arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    assert main(["import", f"--from={NAME}", *arguments]) == 0
    assert load(tmp_path / "run").stage == "base"


def test_a_run_records_where_it_started_and_notices_other_weights(assets: Path, tmp_path: Path, quick: None) -> None:
    config, run = configured({"train.steps": 1}), tmp_path / "run"
    (assets / NAME / "README.md").write_text("---\nlicense: mit\n---\n")
    run_stages(config, str(run), ["warmup"])
    workdir = Workdir(run)
    assert read_json(run / "warmup" / "complete.json")["origin"] == {"license": "mit"}
    assert about_stage(config.export, workdir, "warmup").license == "mit"
    before = workdir.identity(config, "warmup")
    assert before["inputs"]["start"] and before == workdir.identity(config, "warmup")
    weights = assets / NAME / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert workdir.identity(config, "warmup")["inputs"] != before["inputs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.text.intermediate_size": 64}, "intermediate_size is 48 there and 64 here"),
        ({"model.text.vocab_size": 700}, "vocab_size"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_a_wrong_request(
    assets: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        started(configured(changes), "warmup", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_and_a_wrong_name_are_wrong_requests(assets: Path, tmp_path: Path) -> None:
    shutil.rmtree(assets / NAME)
    with pytest.raises(RequestError, match=r"almanac-base: .* holds no checkpoint; expected an installation"):
        started(configured(), "warmup", tmp_path)
    with pytest.raises(RequestError, match=r"almanac-base: .* holds no checkpoint"):
        visor_jax.load(NAME)
    with pytest.raises(RequestError, match=r"init_from='almanac-bas': expected .*did you mean 'almanac-base'"):
        apply_overrides(configured(), ["stage_overrides.warmup.init_from=almanac-bas"])


@pytest.mark.slow
def test_shipping_writes_what_loads_and_what_made_it(assets: Path, tmp_path: Path, quick: None) -> None:
    """The second run starts from the first one's stage, as a base that is trained over several days."""
    dense = {"model.plan": "dense", "train.steps": 1, "stages": ("base_words",)}
    run_stages(as_config(tiny_config(dense)), str(tmp_path / "one"), ["base_words"])
    start = {"stage_overrides.base_pages.init_from": str(tmp_path / "one" / "base_words"), "stages": ("base_pages",)}
    run_stages(as_config(tiny_config({**dense, **start})), str(tmp_path / "two"), ["base_pages"])
    workdir = Workdir(tmp_path / "two")
    assert [(run.path.name, stage) for run, stage in lineage(workdir, "base_pages")] == [
        ("one", "base_words"),
        ("two", "base_pages"),
    ]
    folder = ship(workdir, "base_pages", NAME, assets)
    assert not list(folder.glob("*.py"))
    recipe = json.loads((folder / "recipe.json").read_text())
    assert list(recipe["stages"]) == ["base_words", "base_pages"]
    assert recipe["stages"]["base_words"]["samples"] == 4 and recipe["parity"]["greedy_tokens_equal"]
    model, trained = load(NAME), load(tmp_path / "two")
    for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(trained.params), strict=True):
        assert np.array_equal(ours, theirs.astype("bfloat16").astype("float32"))
    with pytest.raises(RequestError, match=r"--stage=base_lists: .* holds no complete stage"):
        ship(workdir, "base_lists", NAME, assets)

    further = {"stage_overrides.base_lists.init_from": NAME, "stages": ("base_lists",)}
    run_stages(as_config(tiny_config({**dense, **further})), str(tmp_path / "three"), ["base_lists"])
    ship(Workdir(tmp_path / "three"), "base_lists", NAME, assets)
    last = json.loads((folder / "recipe.json").read_text())
    assert list(last["stages"]) == ["base_lists"] and last["start"] == recipe and recipe["start"] is None
