"""Labels: the cheapest budget that is good enough, and lookup of each labeled question."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from visor_jax.adapt.label import cheapest_good_enough, label_stage
from visor_jax.budget import budget_name
from visor_jax.config import from_dict
from visor_jax.data.almanac.exercises import EXERCISES
from visor_jax.data.draws import index_range
from visor_jax.data.from_config import make_source
from visor_jax.data.questions import label_questions
from visor_jax.data.skips import SkipLog
from visor_jax.errors import RequestError
from visor_jax.evaluate.scoring import Scores, score
from visor_jax.files.read_write import read_json
from visor_jax.loading import load_stage
from visor_jax.testing import tiny_config
from visor_jax.train.objectives.policy import LabeledExamples
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import Labels

TASKS = (*EXERCISES["pages"].weights, "read")
TABLES = arrays.arrays(
    np.float64, st.tuples(st.integers(1, 8), st.integers(1, 5)), elements=st.floats(-20, 0, allow_nan=False)
)


@given(TABLES, st.floats(0, 0.9), st.data())
def test_the_first_budget_that_reaches_the_bound(table: np.ndarray, tolerance: float, data: st.DataObject) -> None:
    full = data.draw(st.integers(0, table.shape[1] - 1))
    labels = cheapest_good_enough(table, full, tolerance)
    for row, label in zip(table, labels, strict=True):
        bound = row[full] + np.log1p(-tolerance)
        assert label <= full, "never more expensive than the full budget"
        assert label == full or row[label] >= bound
        assert (row[:label] < bound).all(), "every cheaper budget is insufficient"


@given(TABLES, st.floats(0, 0.5), st.floats(0, 0.4))
def test_more_tolerance_never_makes_a_label_dearer(table: np.ndarray, tolerance: float, more: float) -> None:
    full = table.shape[1] - 1
    strict, lax = (cheapest_good_enough(table, full, t) for t in (tolerance, tolerance + more))
    assert (lax <= strict).all()


def test_where_nothing_is_known_the_full_budget_is_taken() -> None:
    table = np.array([[np.nan, np.nan, np.nan], [-np.inf, -5.0, -1.0], [-1.0, -1.0, -1.0]])
    assert cheapest_good_enough(table, 2, 0.01).tolist() == [2, 2, 0]


def test_a_lucky_guess_is_not_good_enough() -> None:
    """Correct by argmax, but with half of the full budget's likelihood."""
    assert cheapest_good_enough(np.log([[0.45, 0.9]]), 1, 0.1).tolist() == [1]


def test_the_files_of_a_labeling(tiny_run: Path) -> None:
    labels, summary = Labels.read(Workdir(tiny_run)), read_json(tiny_run / "labels" / "labels.json")
    assert summary["samples"] == len(labels.label) == 48 == sum(summary["counts"].values())
    assert labels.log_likelihood.shape == (48, len(labels.budgets))
    names = [budget_name(labels.budgets[i]) for i in labels.label]
    assert {n: names.count(n) for n in names} == summary["counts"]
    totals = {n: sum(task.get(n, 0) for task in summary["by_task"].values()) for n in summary["counts"]}
    assert totals == summary["counts"]
    full = labels.budgets.index((True, True))
    again = cheapest_good_enough(labels.log_likelihood, full, summary["tolerance"])
    assert np.array_equal(labels.label, again)


def test_questions_that_the_full_budget_gets_wrong_may_be_left_out(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workdir = tiny_config({"label.only_right": True}), Workdir(tiny_copy)
    everything, right = Labels.read(workdir), np.zeros(48, bool)
    model = load_stage(workdir, "universal")
    (tiny_copy / "config.json").unlink()
    workdir.claim(config)

    def full_is_right(*given: Any, **options: Any) -> Scores:
        scores = score(*given, **options)
        correct = np.ones_like(scores.correct)  # correct answers of cheaper budgets do not count
        correct[-1] = right
        return dataclasses.replace(scores, correct=correct)

    monkeypatch.setattr("visor_jax.adapt.label.score", full_is_right)
    with pytest.raises(RequestError, match=r"label\.only_right=True: the full budget answers no question correctly"):
        label_stage(config, workdir, model)
    right[::3] = True
    selected = label_stage(config, workdir, model)
    np.testing.assert_array_equal(selected.label, everything.label[right])
    np.testing.assert_array_equal(Labels.read(workdir).picture_index, everything.picture_index[right])
    assert read_json(tiny_copy / "labels" / "labels.json")["samples"] == 16


def test_labeled_questions_are_found_again(tiny_run: Path) -> None:
    config, labels = from_dict(Workdir(tiny_run).config()), Labels.read(Workdir(tiny_run))
    all_questions, labeled = label_questions(config), LabeledExamples(config, labels)
    assert {(place.index, place.turn) for place in all_questions.plan()} == set(
        zip(labels.picture_index.tolist(), labels.turn.tolist(), strict=True)
    )
    assert len(labeled.places) == 48
    _, batch = labeled.batch(np.arange(48))
    for row, expected in enumerate(map(all_questions.example, labeled.places)):
        assert batch.ids[row] == f"almanac/pages/train/{config.seed}/{labels.picture_index[row]}", (
            "the id in the data set"
        )
        assert np.array_equal(labeled.example(row).text_tokens, expected.text_tokens)
        assert np.array_equal(labeled.example(row).tiles, expected.tiles)
    assert len(set(labels.picture_index.tolist())) < 48, "pictures have several questions"


def test_labels_of_other_data_are_refused_when_they_are_read(tiny_run: Path) -> None:
    config, labels = from_dict(Workdir(tiny_run).config()), Labels.read(Workdir(tiny_run))
    for changed in ({"turn": labels.turn + 9}, {"picture_index": labels.picture_index + 2**60}):
        with pytest.raises(
            RequestError, match=r"labels\.npz: turn \d+ of record \d+ of almanac cannot be used: .*other data"
        ):
            LabeledExamples(config, dataclasses.replace(labels, **changed))


def test_pictures_that_were_not_trained_on_are_labeled() -> None:
    assert all(place.index >= index_range("label")[1].start for place in label_questions(tiny_config()).plan())


def test_every_task_is_labeled_equally_often() -> None:
    config = tiny_config({"label.samples": 4 * len(TASKS)})
    assert Counter(sample.turns[0].task for sample in label_questions(config)) == dict.fromkeys(TASKS, 4)


def test_tasks_can_be_left_out_of_the_labels() -> None:
    config = tiny_config({"label.samples": 50, "label.without": ("paper", "unit")})
    tasks = Counter(sample.turns[0].task for sample in label_questions(config))
    assert tasks.keys() == {*TASKS} - {"paper", "unit"} and tasks.total() == 50
    assert max(tasks.values()) == 3


@pytest.mark.parametrize(
    ("without", "message"),
    [(("papers",), "have no task 'papers'; did you mean 'paper'"), (tuple(TASKS), "leaves no task to label")],
)
def test_tasks_that_cannot_be_left_out_are_refused(without: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        label_questions(tiny_config({"label.without": without}))


def test_records_that_share_an_id_keep_their_own_labels(tmp_path: Path) -> None:
    records = []
    for number, color in enumerate(("red", "blue", "red", "blue")):
        Image.new("RGB", (48, 48), color).save(tmp_path / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": color}]
        records.append({"id": "same", "image": f"{number}.png", "conversations": talk})
    (tmp_path / "set.json").write_text(json.dumps(records))
    changes = {"data.source": "llava", "data.root": str(tmp_path), "data.path": "set.json", "stages": ("full",)}
    config = tiny_config({**changes, "data.test_fraction": 0.0})
    all_questions, source = label_questions(config), make_source(config, "train")
    assert len({place.id for place in all_questions.plan()}) == 4
    for place in all_questions.plan():
        assert all_questions.read(place).turns[0].answer == source[place.index].turns[place.turn].answer


def test_records_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), "red").save(tmp_path / "0.png")
    talk = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": f"{number}", "image": f"{number}.png", "conversations": talk} for number in range(2)]
    (tmp_path / "set.json").write_text(json.dumps(records))
    changes = {"data.source": "llava", "data.root": str(tmp_path), "data.path": "set.json", "stages": ("full",)}
    skips = SkipLog()
    all_questions = label_questions(tiny_config({**changes, "data.test_fraction": 0.0}), skips)
    assert [id for batch in all_questions.batches(2) for id in batch.ids] == ["0/0"]
    assert [reason for _, reason in skips.counts] == ["missing_file"]


def test_missing_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="run the label stage first"):
        Labels.read(Workdir(tmp_path))


def test_damaged_labels_are_named(tiny_copy: Path) -> None:
    path = tiny_copy / "labels" / "labels.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RequestError, match=r"labels\.npz: damaged .* run the label stage again"):
        Labels.read(Workdir(tiny_copy))
