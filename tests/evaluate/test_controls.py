"""An evaluation of a source with controls: middle level, gray and exchanged pictures, intervals, resuming."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visor_jax.config import Config, as_config
from visor_jax.data.sample import Sample, Turn
from visor_jax.data.source_kind import SPLITS, SourceKind
from visor_jax.data.sources import SOURCES
from visor_jax.evaluate import scoring
from visor_jax.evaluate.chunks import ChunkScores
from visor_jax.evaluate.runner import evaluate
from visor_jax.evaluate.tables import print_budgets
from visor_jax.files.read_write import read_json
from visor_jax.loading import Visor, load
from visor_jax.testing import tiny_config
from visor_jax.workdir.folder import Workdir

pytestmark = pytest.mark.usefixtures("quick")
KINDS = ("table", "bars")
LEVELS = {"bright": "easy", "side": "middle", "both": "hard"}


class Pages:
    """Pictures of two gray halves, with a question of each level in turn."""

    name = "pages"

    def __init__(self, split: str) -> None:
        self._first = 30 * SPLITS.index(split)

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < 30:
            raise IndexError(index)
        number, task = self._first + index, list(LEVELS)[index % 3]
        image = np.full((48, 48, 3), number, np.uint8)
        return Sample(
            f"pages/{number}",
            (image,),
            (Turn("Which?", "left" if number % 2 else "right", task),),
            "pages",
            kind=KINDS[number % 2],
        )


def source_of_pages(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Config:
    module = types.ModuleType("pages")
    vars(module)["SOURCE"] = SourceKind(open=lambda _, split: Pages(split), **fields)
    monkeypatch.setitem(sys.modules, "pages", module)
    monkeypatch.setitem(SOURCES, "pages", "pages")
    evaluation = {"evaluate.samples": 24, "evaluate.control_samples": 12, "evaluate.batch_size": 4}
    return as_config(tiny_config({"data.source": "pages", "stages": ("full",), **evaluation}))


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    return source_of_pages(monkeypatch, levels=LEVELS, controls=True)


@pytest.fixture
def model(tiny_run: Path) -> Visor:
    return load(tiny_run)


def test_controls_have_the_shape_of_budgets(
    config: Config, model: Visor, tiny_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(config, model, Workdir(tiny_copy), name="pages")
    assert result["budgets"].keys() == result["blind"].keys() == result["shuffled"].keys() >= {"empty", "full", "auto"}
    for group, samples in {"budgets": 24, "blind": 12, "shuffled": 12}.items():
        for name, row in result[group].items():
            assert row.keys() == result["budgets"]["full"].keys() >= {"easy", "middle", "hard"}
            assert row["samples"] == samples and row["tasks"].keys() == LEVELS.keys()
            limits = result["intervals"][group][name]
            assert limits.keys() == {"tasks", "easy", "middle", "hard"}
            assert all(limits["tasks"][t][0] <= row["tasks"][t] <= limits["tasks"][t][1] for t in LEVELS)
    assert {"easy", "middle", "hard"} <= result["dial"][0].keys()
    print_budgets(result)
    printed = capsys.readouterr().out
    assert printed.index("without the right picture: 12 questions") < printed.index("pages, test split: 24 questions")
    assert "middle" in printed and re.search(r"±\d|\(\d+\.\d to", printed)
    assert printed.index("│ bright ") < printed.index("│ side ") < printed.index("│ both "), "in the order of levels"
    assert "by kind of picture, budget full" in printed and "table" in printed
    questions = read_json(tiny_copy / "eval" / "pages" / "test.questions.json")
    assert questions["budgets"]["kinds"] == [KINDS[index % 2] for index in range(24)]
    assert {kind: row["samples"] for kind, row in result["kinds"].items()} == dict.fromkeys(KINDS, 12)
    of_kinds = [result["kinds"][kind]["budgets"]["full"]["tasks"]["side"] for kind in KINDS]
    assert np.mean(of_kinds) == pytest.approx(result["budgets"]["full"]["tasks"]["side"])
    for group in ("budgets", "blind", "shuffled"):
        for name, right in questions[group]["right"].items():
            of_task = [bit == "1" for bit, task in zip(right, questions[group]["tasks"], strict=True) if task == "side"]
            assert np.mean(of_task) == pytest.approx(result[group][name]["tasks"]["side"])


def test_a_blind_model_answers_all_questions_alike(config: Config, model: Visor, tiny_copy: Path) -> None:
    """All questions read the same: with gray pictures the log-likelihoods are equal, up to the answer."""
    seen: list[ChunkScores] = []
    score = scoring.Scorer.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring.Scorer, "score", lambda self, chunk: seen.append(found := score(self, chunk)) or found)
        evaluate(config, model, Workdir(tiny_copy), name="pages", budgets=["full"])
    row = len(model.viable_budgets) - 1
    blind, shuffled = (np.concatenate([c.log_likelihood[row] for c in seen[a:b]]) for a, b in ((6, 9), (9, 12)))
    assert len({f"{value:.4f}" for value in blind}) == 2 < len({f"{value:.4f}" for value in shuffled})


def test_a_killed_evaluation_continues_in_the_control_that_it_had_reached(
    config: Config, model: Visor, tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(config, model, Workdir(tiny_copy), name="whole")
    score, scored = scoring.Scorer.score, []

    def score_until(last: int) -> Any:
        def counted(self: scoring.Scorer, chunk: Any) -> ChunkScores:
            if len(scored) == last:
                raise KeyboardInterrupt
            scored.append(chunk.places)
            return score(self, chunk)

        return counted

    monkeypatch.setattr(scoring.Scorer, "score", score_until(10))  # 6 chunks of questions, 3 blind, 1 shuffled
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, model, Workdir(tiny_copy), name="pages")
    scored.clear()
    monkeypatch.setattr(scoring.Scorer, "score", score_until(99))
    again = evaluate(config, model, Workdir(tiny_copy), name="pages")
    assert len(scored) == 2
    assert again == whole
    assert not (tiny_copy / "eval" / "pages" / "chunks").exists()


def test_a_source_without_controls_has_none(monkeypatch: pytest.MonkeyPatch, model: Visor, tiny_copy: Path) -> None:
    levels = {task: "hard" if level == "middle" else level for task, level in LEVELS.items()}
    config = source_of_pages(monkeypatch, levels=levels)
    result = evaluate(config, model, Workdir(tiny_copy), name="pages", budgets=["full"])
    assert "blind" not in result and "shuffled" not in result and "middle" not in result["budgets"]["full"]
    assert result["intervals"].keys() == {"confidence", "budgets"}


def test_a_control_without_a_question_is_left_out(
    config: Config, model: Visor, tiny_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One question per task: there is no other picture to ask about."""
    few = as_config(tiny_config({"data.source": "pages", "stages": ("full",), "evaluate.samples": 3}))
    assert config.data.source == "pages"
    result = evaluate(few, model, Workdir(tiny_copy), name="pages", budgets=["full"])
    assert "blind" in result and "shuffled" not in result
    assert "no question of split test can be asked shuffled" in caplog.text
