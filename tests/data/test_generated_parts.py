"""Mixtures with generated parts: what every consumer reads of them, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visor_jax.config import Config, architecture, as_config, stage_config
from visor_jax.data.draws import RANGE, index_range
from visor_jax.data.from_config import (
    agreed_taps,
    evaluation_source,
    held_out_parts,
    label_source,
    make_source,
    stage_parts,
)
from visor_jax.data.mixture import TurnsOfParts
from visor_jax.data.questions import label_questions, single_questions
from visor_jax.data.sample import Sample, Turn
from visor_jax.data.source_kind import SourceKind
from visor_jax.data.sources import SOURCES, check_source, source_kind
from visor_jax.errors import RequestError
from visor_jax.testing import tiny_config
from visor_jax.train.objectives import make_objective
from visor_jax.train.objectives.held_out import answer_fields
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import annotations_checksum

EXERCISES = ("crops", "lists", "pages")


class Drawn:
    """An endless source: sample i is a gray picture and a question about it, named "EXERCISE/SPLIT/i"."""

    def __init__(self, exercise: str, split: str, purpose: str = "") -> None:
        self.name, self._split, self._purpose = exercise, split, purpose

    def __len__(self) -> int:
        return 20 * RANGE

    def __getitem__(self, index: int) -> Sample:
        gray = np.full((48, 48, 3), index % 256, np.uint8)
        turns = (Turn("What is it?", "gray", f"{self.name}_task"),)
        return Sample(f"{self.name}/{self._split}{self._purpose}/{index}", (gray,), turns, self.name)


def check_exercise(config: Config) -> None:
    if config.data.path not in EXERCISES:
        raise RequestError(f"data.path={config.data.path!r}: expected one of {', '.join(EXERCISES)}")


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generated source `almanac` draws gray pictures."""
    kind = SourceKind(
        open=lambda config, split: Drawn(config.data.path, split),
        endless=True,
        levels={f"{exercise}_task": "easy" for exercise in EXERCISES},
        tasks=lambda config: [f"{config.data.path}_task"],
        for_evaluation=lambda config, split: Drawn(config.data.path, split, "-asked"),
        check=check_exercise,
    )
    monkeypatch.setitem(sys.modules, "drawn_kind", SimpleNamespace(SOURCE=kind))
    monkeypatch.setitem(SOURCES, "almanac", "drawn_kind")


PARTS = (("almanac", "crops", "all", 1.0), ("almanac", "lists", "all", 3.0), ("almanac", "pages", "all", 4.0))


def configured(parts: Any = PARTS, **fields: Any) -> Any:
    return tiny_config({"stages": ("full", "search", "universal", "label"), "data.parts": parts, **fields})


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder with `some.json`: five records about a picture each."""
    records = []
    for number in range(5):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red."}]
        records.append({"id": f"some{number}", "image": f"{number}.png", "conversations": talk})
    (tmp_path / "some.json").write_text(json.dumps(records))
    return tmp_path


def test_each_stage_reads_its_own_range_of_each_part() -> None:
    config = as_config(configured())
    check_source(config)
    for stage in ("base_words", "full"):
        parts = stage_parts(config, stage)
        assert [(part.path, part.weight, part.shuffle) for part in parts] == [
            ("crops", 1.0, False), ("lists", 3.0, False), ("pages", 4.0, False),
        ]  # fmt: skip
        start = index_range(stage)[1].start
        assert [part.source[7].id for part in parts] == [f"{name}/train/{start + 7}" for name in EXERCISES]
    assert agreed_taps(config, 2) == 0, "there are no videos"


def test_passes_ask_the_first_part_or_the_one_that_is_named() -> None:
    config = configured()
    kind = source_kind(as_config(config))
    assert kind.endless and "crops_task" in kind.levels
    assert evaluation_source(config, "test")[3].id == "crops/test-asked/3"
    named = configured(**{"data.question_part": "pages", "label.samples": 6})
    assert [sample.turns[0].task for sample in single_questions(named, "validation", 3)] == ["pages_task"] * 3
    assert label_source(named)[3].id == "pages/train/3"
    assert [place.index for place in label_questions(named).plan()][:2] == [
        index_range("label")[1].start + n for n in (0, 1)
    ]


def test_everything_else_reads_the_parts_in_turn() -> None:
    source = make_source(configured(), "validation")
    assert isinstance(source, TurnsOfParts)
    assert [source[index].id for index in range(5)] == [
        "crops/validation/0", "lists/validation/0", "pages/validation/0", "crops/validation/1", "lists/validation/1",
    ]  # fmt: skip
    with pytest.raises(IndexError):
        source[len(source)]


def test_stored_and_generated_parts_train_together(stored: Path, tmp_path: Path) -> None:
    curriculum = ((0, (("lists", 1.0),)), (2, (("some.json", 1.0), ("pages", 1.0))))
    fields = {"data.root": str(stored), "data.test_fraction": 0.0, "stage_overrides.full.curriculum": curriculum}
    config = configured((*PARTS, ("llava", "some.json", "all", 2.0)), **fields)
    check_source(as_config(config))
    source_kind(as_config(config)).check_splits(as_config(config), {"train", "validation"})
    assert agreed_taps(config, 2) > 0, "stored parts may hold videos"
    objective = make_objective(config, "full", Workdir(tmp_path / "run"))
    steps = list(objective.steps(0, 6))
    start = index_range("full")[1].start
    assert [id for step in steps[:2] for id in step.ids] == [f"lists/train/{start + place}" for place in range(8)]
    later = [id for step in steps[2:] for id in step.ids]
    assert sorted(later) == sorted(
        [f"pages/train/{start + place}" for place in range(8)] + [id for id in later if id.startswith("some")]
    )
    assert len({*[id for id in later if id.startswith("some")][:5]}) == 5, "an epoch of the stored part"
    again = list(objective.steps(3, 6))
    assert [step.ids for step in again] == [step.ids for step in steps[3:]]
    before = annotations_checksum(config.to_dict(), "train")
    (stored / "lists").write_text("a file whose name is that of an exercise")
    assert before and annotations_checksum(config.to_dict(), "train") == before


def test_metrics_name_the_phase(tmp_path: Path) -> None:
    config = configured(**{"stage_overrides.full.curriculum": ((0, (("lists", 1.0),)), (1, (("pages", 1.0),)))})
    objective = make_objective(config, "full", Workdir(tmp_path / "run"))
    metrics = {"turn_correct": np.ones((4, 2), bool), "target_tokens": 8.0, "samples": 4, "loss": 1.0}
    metrics["source_sums"] = np.ones((3, 2))
    rows = [objective.summarize(step, metrics) for step in objective.steps(0, 2)]
    assert [row["phase"] for row in rows] == [1, 2]
    plain = make_objective(configured(), "full", Workdir(tmp_path / "run"))
    assert "phase" not in plain.summarize(next(iter(plain.steps(0, 1))), metrics)


def test_a_stage_is_validated_on_each_part_that_it_trains_on() -> None:
    phases = ((0, (("lists", 1.0), ("crops", 0.0))), (1, (("pages", 1.0),)))
    config = configured(**{"stage_overrides.full.curriculum": phases})
    held_out = held_out_parts(config, "full")
    assert [name for name, _ in held_out] == ["lists", "pages"]
    assert held_out[1][1][2].id == "pages/validation/2" and held_out[1][1][2].source == "pages"
    assert [name for name, _ in held_out_parts(config, "universal")] == ["crops", "lists", "pages"]
    assert [name for name, _ in held_out_parts(tiny_config(), "full")] == [""]
    totals = {
        f"{budget}{part}": {"samples": 2.0, "tokens": 4.0, "turns": 2.0, "loss": loss, "right": right}
        for budget in ("empty", "full")
        for part, loss, right in (("/part=lists", 4.0, 2.0), ("/part=pages", 8.0, 0.0))
    }
    row = answer_fields(totals)
    assert (row["samples"], row["accuracy/budget=full"], row["accuracy/budget=full/part=lists"]) == (4, 0.5, 1.0)
    assert (row["loss/budget=empty"], row["loss/budget=empty/part=pages"]) == (1.5, 2.0)


@pytest.mark.parametrize(
    ("parts", "fields", "message"),
    [
        ((("almanac", "crps", "all", 1.0),), {}, r"data\.path='crps': expected one of crops"),
        ((("almanac", "crops", "first:3", 1.0),), {}, r"data\.parts\[0\]: sampling='first:3': chooses among stored"),
        ((("almanac", "crops", "all", 0.0),), {}, r"data\.parts\[0\]: weight=0: 'almanac' has no number of records"),
        ((*PARTS, PARTS[1]), {}, r"data\.parts: the generated part \('almanac', 'lists'\) stands 2 times"),
        ((*PARTS, ("", "a.json", "all", 0.0)), {}, r"data\.parts\[3\]: no weight"),
        ((*PARTS, ("almanc", "a", "all", 1.0)), {}, r"source='almanc': expected one of .*did you mean 'almanac'"),
        ((*PARTS, ("", "a.json", "all", 1.0)), {"data.question_part": "a.json"}, r"names a stored part.*crops, lists"),
        (PARTS, {"data.question_part": "page"}, r"question_part='page': expected '' or the path.*did you mean 'pages'"),
    ],
)
def test_parts_that_do_not_fit_are_wrong_requests(parts: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check_source(as_config(configured(parts, **fields)))
    assert "\n" not in str(caught.value)


def test_the_stage_base_trains_on_answers_of_any_source() -> None:
    config = as_config(configured(stages=("base",)))
    check_source(config)
    assert stage_config(config, "base").init_from == ""
    assert architecture(config, "base").plan == "dense" and architecture(config).plan == "visor"
