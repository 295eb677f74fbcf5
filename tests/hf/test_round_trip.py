"""Exported folders load as the same model bit for bit, directly and imported into a workdir."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from visor_jax import testing
from visor_jax.__main__ import main
from visor_jax.budget import budget_name
from visor_jax.config import architecture
from visor_jax.data.chat import encode_prompt
from visor_jax.export import torch_export
from visor_jax.files.read_write import read_json
from visor_jax.loading import Visor, load

QUESTION = "Which digit is below A?"
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder of the stage policy, written without the comparison."""
    folder = tmp_path_factory.mktemp("exported")
    torch_export.write_folder(folder, load(tiny_run), stage="policy", dtype="float32", max_shard_bytes=100_000)
    return folder


def same(ours: Visor, theirs: Visor, budgets: list[str]) -> None:
    """Asserts equal logits and answers under every budget."""
    picture = Image.fromarray(testing.random_picture(60, 40, seed=1))
    tokens = encode_prompt(ours.tokenizer, QUESTION, system=ours.system)
    assert theirs.tokenizer.text == ours.tokenizer.text and theirs.system == ours.system
    for budget in budgets:
        np.testing.assert_array_equal(
            ours.logits(tokens, [picture], budget), theirs.logits(tokens, [picture], budget), err_msg=budget
        )
    history = [("What is shown?", "A card.")]
    answers = [
        model.answer(picture, QUESTION, budgets[-1], max_new_tokens=4, history=history) for model in (ours, theirs)
    ]
    assert (answers[0].text, answers[0].budget) == (answers[1].text, answers[1].budget)


def test_a_visor_plan_comes_back_with_its_policy_and_budgets(tiny_run: Path, exported: Path) -> None:
    ours, theirs = load(tiny_run), load(exported)
    assert (theirs.stage, theirs.has_policy, theirs.searched) == ("policy", True, True)
    assert theirs.viable_budgets == ours.viable_budgets
    same(ours, theirs, [*map(budget_name, ours.viable_budgets), "auto"])
    picture = Image.fromarray(testing.random_picture(60, 40, seed=2))
    np.testing.assert_array_equal(ours.route(picture, QUESTION), theirs.route(picture, QUESTION))


def test_a_visor_plan_is_imported_as_the_stage_it_was(
    tiny_run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.py").write_text("from visor_jax.testing import tiny_config as get_config\n")
    monkeypatch.setenv("HOME", str(exported.parent))
    command = [
        "import",
        f"--from=~/{exported.name}",
        f"--workdir={tmp_path / 'run'}",
        f"--config={tmp_path / 'config.py'}",
    ]
    assert main(command) == 0
    ours, theirs = load(tiny_run), load(tmp_path / "run")
    assert (theirs.stage, theirs.has_policy) == ("policy", True) and theirs.viable_budgets == ours.viable_budgets
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)
    same(ours, theirs, ["full", "auto"])


def test_a_dense_plan_comes_back_as_the_stock_model(saved: dict[str, Path], tmp_path: Path) -> None:
    ours = load(saved["shards"])
    torch_export.write_folder(tmp_path, ours, stage="dense", dtype="float32", max_shard_bytes=100_000)
    theirs = load(tmp_path)
    assert theirs.arch.plan == "dense" and theirs.arch == ours.arch
    same(ours, theirs, ["full"])


OTHER_PLAN = {
    "model.pattern": ("text", "self", "text", "cross"),
    "model.head_layers": 2,
    "model.text.num_layers": 11,
}


@pytest.mark.parametrize(
    "other", [pytest.param(False, marks=pytest.mark.slow), True], ids=["usual pattern", "another pattern"]
)
def test_cross_attention_of_fewer_heads_than_the_decoder_comes_back(tmp_path: Path, other: bool) -> None:
    """`cross.init` is about the start of training, not about stored parameters."""
    changes = {"model.cross.num_kv_heads": 1, "model.cross.init": "zero"}
    arch = architecture(testing.tiny_config({**changes, **OTHER_PLAN} if other else changes), "full")
    viable = [(False,) * arch.num_slots, (True,) * arch.num_slots]
    model = Visor(testing.random_params(arch), arch, testing.almanac_tokenizer(), viable)
    torch_export.write_folder(tmp_path, model, stage="full", dtype="float32", max_shard_bytes=10**9)
    stored = read_json(tmp_path / "config.json")
    assert ({"layer_pattern", "head_layers"} <= stored.keys()) == other
    assert load(tmp_path).arch.layers == arch.layers
    same(model, load(tmp_path), ["full", "empty"])
