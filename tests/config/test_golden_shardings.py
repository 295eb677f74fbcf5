"""The shipped configurations' parameters lie where `visor_jax/scale/golden/` says, on every topology named there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from visor_jax.config import load_config
from visor_jax.testing.golden import CASES, FOLDER, Case, as_text, shardings

CONFIGS = Path(__file__).parents[2] / "configs"
REMEDY = "if this is what you want: python -m visor_jax.testing.golden"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shardings_are_golden(case: Case) -> None:
    found = shardings(case, load_config(CONFIGS / f"{case.config}.py"))
    text = (FOLDER / f"{case.name}.json").read_text(encoding="utf-8")
    golden = json.loads(text)
    wrong = {path for path in golden["params"].keys() | found["params"].keys()
             if golden["params"].get(path) != found["params"].get(path)}  # fmt: skip
    assert not wrong, f"{sorted(wrong)[:5]}: {REMEDY}"
    assert text == as_text(found), REMEDY
    assert found["bytes_per_device"] < 1.02 * found["bytes"] / (case.fsdp * case.tensor)


def test_fine_tuning_shares_the_files_of_its_model(shipped: Callable[[Path], str]) -> None:
    config = load_config(shipped(CONFIGS / "llava_ov_finetune.py"))
    found = shardings(CASES[0], config)
    assert as_text(found) == (FOLDER / f"{CASES[0].name}.json").read_text(encoding="utf-8")


def test_every_file_has_a_case() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {case.name for case in CASES}
