"""The model of a run as the command line changes it: fewer visual tokens, another system text, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from visor_jax.__main__ import main
from visor_jax.config import as_config, from_dict
from visor_jax.errors import RequestError
from visor_jax.evaluate.configured import configured
from visor_jax.evaluate.measure import requested_budgets, requested_viable
from visor_jax.files.read_write import read_json
from visor_jax.loading import load, load_stage
from visor_jax.testing import tiny_config
from visor_jax.workdir.folder import Workdir

pytestmark = pytest.mark.usefixtures("quick")


def test_fewer_visual_tokens_need_no_training(tiny_copy: Path) -> None:
    """The decoder reads a fourth of the tokens, and the record says so."""
    reduction = ("--config.model.reduction.method=divprune", "--config.model.reduction.ratio=0.25")
    assert main(["evaluate", f"--workdir={tiny_copy}", "--budget=full", *reduction]) == 0
    whole, fewer = (read_json(tiny_copy / "eval" / name / "test.json") for name in ("", "partial"))
    gflops = [result["budgets"]["full"]["decoder_gflops"] for result in (whole, fewer)]
    assert gflops[1] < 0.7 * gflops[0] and fewer["dense"] == whole["dense"]
    assert fewer["identity"]["config"]["model.reduction.method"] == "divprune"


def test_questions_record_and_examples_have_the_given_system_text(tiny_copy: Path) -> None:
    arguments = ("--budget=full", "--config.tokenizer.system=Be brief.", "--config.evaluate.samples=4")
    assert main(["evaluate", f"--workdir={tiny_copy}", *arguments]) == 0
    whole, other = (read_json(tiny_copy / "eval" / name / "test.json") for name in ("", "partial"))
    assert other["harness"]["system"] == "Be brief." and "Be brief." in other["harness"]["first_prompt"]
    assert not whole["harness"]["system"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.text.rope_theta", 50.0),
        ("model.cross.kernel_size", 3),
        ("model.anyres.max_tiles", 4),
    ],
)
def test_a_field_of_the_parameters_is_refused(
    field: str, value: object, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"--workdir={tiny_run}", f"--config.{field}={value}"]) == 2
    assert f"--config.{field}" in capsys.readouterr().err


def test_parameters_remain_and_tokens_change(tiny_run: Path) -> None:
    trained, model = from_dict(Workdir(tiny_run).config()), load(tiny_run)
    assert configured(model, trained, trained) is model
    changed = configured(model, trained, as_config(tiny_config({"model.anyres.packing": 4})))
    assert changed.arch.anyres.packing == 4 and changed.arch.text == model.arch.text
    assert changed.fingerprint == model.fingerprint and changed.viable_budgets == model.viable_budgets
    shuffled = as_config(tiny_config({"model.anyres.packing": 4, "model.anyres.packing_kind": "shuffle"}))
    with pytest.raises(RequestError, match="the connector of packing_kind=shuffle is as wide as"):
        configured(model, trained, shuffled)
    dense = load_stage(Workdir(tiny_run), "base")
    dropping = {"model.plan": "dense", "stages": ("base",), "model.dropping.method": "fastv"}
    dropping |= {"model.dropping.layers": (2,), "model.dropping.ratios": (0.5,)}
    assert configured(dense, trained, as_config(tiny_config(dropping))).arch.dropping.active
    with pytest.raises(RequestError, match=r"--config\.model\.plan"):
        configured(model, trained, as_config(tiny_config(dropping)))


def test_budgets_of_a_dense_model(tiny_run: Path) -> None:
    dense = load_stage(Workdir(tiny_run), "base")
    assert requested_budgets(dense, None) == requested_budgets(dense, ["full"]) == {"full": ()}
    assert requested_viable(dense, "auto", searched=False) == {"full": ()}, "what harnesses ask without a setting"
    for name in ("fulll", "99", "0b101", "empty"):
        with pytest.raises(RequestError, match="budget"):
            requested_budgets(dense, [name])


def test_a_harness_takes_viable_budgets_only(tiny_run: Path) -> None:
    model = load(tiny_run)
    other = next(bits for bits in [(True, False), (False, True)] if bits not in model.viable_budgets)
    name = "0b" + "".join(str(int(bit)) for bit in other)
    assert requested_budgets(model, [name]) == {name: other}, "evaluate measures it"
    with pytest.raises(RequestError, match="is not viable: expected one of auto, empty"):
        requested_viable(model, name, searched=True)
    assert requested_viable(model, "full", searched=True) == {"full": (True, True)}
