"""Pages of another make: a report of the shipped base, and wrong requests."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from visor_jax.config import from_dict


@pytest.fixture
def shifts(script: Callable[[str], types.ModuleType]) -> types.ModuleType:
    return script("shifts")


def test_sets_change_the_pages_and_nothing_else(shifts: types.ModuleType) -> None:
    config = shifts.config_of("almanac-base")
    changed = {title: shifts.on_pages(config, fields, 9, 3) for title, fields in shifts.SETS.items()}
    assert (
        changed["unseen fonts"].data.path == "pages_unseen_fonts" and changed["real tables only"].data.mixed_share == 0
    )
    same = changed["as in training"].to_dict()
    assert (same["seed"], same["evaluate"]["samples"]) == (3, 9)
    same["seed"], same["evaluate"]["samples"] = config.seed, config.evaluate.samples
    assert from_dict(same) == config


def test_the_table_has_a_row_per_set_and_budget(
    shifts: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shifts, "SETS", {"real tables only": shifts.SETS["real tables only"]})
    out = tmp_path / "shifts.json"
    assert shifts.main(["--models", "almanac-base", "--samples", "46", "--out", str(out)]) == 0
    row = json.loads(out.read_text())["almanac-base"]["real tables only"]["full"]
    accuracy, low, high = row["easy"]
    assert 0 <= low <= accuracy <= high <= 1 and accuracy > 0.5 and {"blind", "shuffled"} <= row.keys()
    assert f"| almanac-base | real tables only | full | {100 * accuracy:.1f} " in capsys.readouterr().out


def test_models_that_cannot_be_told_apart_or_loaded_are_refused(
    shifts: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shifts.main(["--models", "a/run", "b/run"]) == 2
    assert "--models=a/run b/run: expected different folder names" in capsys.readouterr().err
    assert shifts.main(["--models", "none"]) == 2
    assert "none: no such folder" in capsys.readouterr().err
