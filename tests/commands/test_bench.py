"""`visor bench` times every budget of a model or a configuration, interleaved, and reports its cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from visor_jax.__main__ import main
from visor_jax.budget import budget_name
from visor_jax.cost import decoder_flops
from visor_jax.loading import load

pytestmark = pytest.mark.usefixtures("quick")


def test_every_viable_budget_is_timed(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(tiny_run)
    capsys.readouterr()
    assert main(["bench", f"--workdir={tiny_run}", "--visual=9", "--text=5", "--rounds=3", "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert (actual["visual_tokens"], actual["text_tokens"]) == (9, 5)
    assert list(actual["budgets"]) == [budget_name(bits) for bits in model.viable_budgets]
    for bits in model.viable_budgets:
        row = actual["budgets"][budget_name(bits)]
        assert row["decoder_gflops"] == decoder_flops(model.arch, bits, 9, 5) / 1e9
        low, middle, high = row["seconds"]
        assert 0 < low <= middle <= high
    costliest = max(actual["budgets"].values(), key=lambda row: row["decoder_gflops"])
    assert costliest["times_faster"] == [1, 1, 1]


@pytest.mark.parametrize("mistake", ["--visual=-1", "--text=0", "--rounds=0"])
def test_sizes_that_make_no_sense_are_refused(tiny_run: Path, mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", f"--workdir={tiny_run}", mistake]) == 2
    assert f"{mistake}: expected at least 1" in capsys.readouterr().err
