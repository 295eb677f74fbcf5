"""The table of data sources: what it refuses, and that one line adds a source to every pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from visor_jax import testing
from visor_jax.adapt.label import label_stage
from visor_jax.adapt.search import search_stage
from visor_jax.config import apply_overrides, default_config
from visor_jax.data.from_config import make_source
from visor_jax.data.sample import Sample, Turn
from visor_jax.data.source_kind import SourceKind
from visor_jax.data.sources import SOURCES, check_source
from visor_jax.errors import RequestError
from visor_jax.evaluate.runner import evaluate
from visor_jax.loading import load, load_stage
from visor_jax.testing import tiny_config
from visor_jax.train.loop import train
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import Labels


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=lava"], "data.source='lava': expected one of 'glyphs', 'llava'; did you mean 'llava'"),
        (["data.source=llava", "stages=full"], "data.path='': expected the JSON file that data.source='llava' reads"),
        (
            ["data.source=llava", "data.path=a.json"],
            "the stage 'base' in stages learns .* expected data.source='glyphs'",
        ),
        (["data.source=llava", "data.path=a.json", "stages=full", "stage=base"], "the stage 'base' in stage "),
    ],
)
def test_what_does_not_fit_a_source_is_refused(overrides: list[str], message: str) -> None:
    config = apply_overrides(default_config(), [f"--config.{override}" for override in overrides])
    with pytest.raises(RequestError, match=message):
        check_source(config)


class Squares:
    """Twelve pictures, each with an easy and a hard question."""

    name = "squares"

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        picture = testing.random_picture(24, 24, seed=index)
        turns = (Turn("Which digit is above A?", "4", "plain"), Turn("What colour is A?", "red", "deep"))
        return Sample(f"{self.split}/{index}", (picture,), turns, self.name)


@pytest.mark.usefixtures("quick")
def test_one_line_adds_a_source_to_every_pass(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {"plain": "easy", "deep": "hard"}
    monkeypatch.setitem(SOURCES, "squares", SourceKind(open=lambda config, split: Squares(split), levels=levels))
    changes: dict[str, Any] = {"data.source": "squares", "stages": ("full", "search", "universal", "label", "policy")}
    changes |= {"stage_overrides.full.init_from": str(tiny_copy / "base")}
    changes |= {f"{part}.samples": 6 for part in ("search", "label", "evaluate")}
    config = tiny_config(changes, steps=2)
    check_source(config)
    assert make_source(config, "test")[0].id == "test/0"

    path = tiny_copy.parent / "squares"
    workdir = Workdir(path)
    workdir.create()
    workdir.claim(config)
    train(config, "full", workdir)
    search_stage(config, workdir, load_stage(workdir, "full"))
    train(config, "universal", workdir)
    labels = label_stage(config, workdir, load_stage(workdir, "universal"))
    assert len(labels.label) == 6 and len(Labels.read(workdir).label) == 6
    train(config, "policy", workdir)
    result = evaluate(config, load(path), workdir)
    assert result["benchmark"] == "squares" and result["levels"] == levels
    assert all(row["easy"] is not None and row["hard"] is not None for row in result["budgets"].values())
    assert (path / "full" / "metrics.jsonl").read_text().count("accuracy/deep") == 2
