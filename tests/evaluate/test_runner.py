"""`evaluate`: its files, and figures that match the samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visor_jax.budget import Budget
from visor_jax.commands.recipe import evaluation_data
from visor_jax.config import from_dict
from visor_jax.data.questions import Place, single_questions
from visor_jax.data.sources import source_kind
from visor_jax.errors import RequestError
from visor_jax.evaluate.chunks import ChunkScores
from visor_jax.evaluate.measure import requested_budgets
from visor_jax.evaluate.runner import chunks_of, evaluate, evaluation_identity
from visor_jax.evaluate.scoring import score
from visor_jax.evaluate.summary import level_means, task_accuracies
from visor_jax.evaluate.tables import print_budgets
from visor_jax.files.read_write import read_json
from visor_jax.loading import load
from visor_jax.report.page import write_report
from visor_jax.scale.mesh import build_mesh
from visor_jax.testing import questions_of
from visor_jax.workdir.folder import Workdir

pytestmark = pytest.mark.usefixtures("quick")
MESH = build_mesh(1, -1, 1)
FIELDS = {"easy", "middle", "hard", "tasks", "decoder_gflops", "end_to_end_gflops", "samples"}


def test_budgets_by_contract(tiny_run: Path) -> None:
    result, model = read_json(tiny_run / "eval" / "test.json"), load(tiny_run)
    budgets = result["budgets"]
    assert set(budgets) == {*requested_budgets(model, None)} and {"empty", "full", "auto"} <= set(budgets)
    for row in budgets.values():
        assert row.keys() >= FIELDS and row["samples"] == 24
        assert all(0 <= row["tasks"][task] <= 1 for task in result["levels"])
        assert row["end_to_end_gflops"] > row["decoder_gflops"] > 0
        assert 0 < row["cache_bytes"] < result["dense"]["cache_bytes"]
    assert budgets["empty"]["decoder_gflops"] < budgets["full"]["decoder_gflops"] < result["dense"]["decoder_gflops"]
    assert set(result["levels"].values()) == {"easy", "middle", "hard"} and len(result["levels"]) == 24


def test_auto_figures_follow_the_policys_choices(tiny_run: Path) -> None:
    result, model = read_json(tiny_run / "eval" / "test.json"), load(tiny_run)
    config = from_dict(Workdir(tiny_run).config())
    samples = list(single_questions(config, "test", config.evaluate.samples))
    batches = questions_of(config, samples).batches(config.evaluate.batch_size)
    scores = score(model.params, batches, model.viable_budgets, model.arch, mesh=MESH, routed=True)
    assert scores.routes is not None
    picked = scores.routes.argmax(axis=1)
    accuracies = task_accuracies(scores.correct[picked, np.arange(24)], scores.tasks)
    auto = result["budgets"]["auto"]
    assert auto["tasks"] == pytest.approx(accuracies)
    assert {level: auto[level] for level in ("easy", "middle", "hard")} == pytest.approx(
        level_means(accuracies, source_kind(config).levels)
    )
    assert all(sum(shares.values()) == pytest.approx(1) for shares in result["routes"].values())
    names = [str(Budget.of(model.viable_budgets[index])) for index in picked]
    assert result["shares"] == {name: pytest.approx(names.count(name) / 24) for name in set(names)}
    cheapest, dearest = (result["budgets"][name]["decoder_gflops"] for name in ("empty", "full"))
    assert cheapest < auto["decoder_gflops"] <= dearest * 1.5, "a budget's FLOPs plus the policy's"
    for sample, bits in list(zip(samples, picked, strict=True))[:3]:
        answer = model.answer(list(sample.images), sample.turns[0].question, max_new_tokens=1)
        assert answer.budget == str(Budget.of(model.viable_budgets[bits]))


@pytest.mark.slow
def test_times_are_measured_beside_the_scores_and_change_nothing_else(
    tiny_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, config = read_json(tiny_copy / "eval" / "test.json"), from_dict(Workdir(tiny_copy).config())
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, timing_rounds=1))
    result = json.loads(json.dumps(evaluate(config, load(tiny_copy), Workdir(tiny_copy))))
    timing = result.pop("timing")
    assert result == before and set(timing["budgets"]) == set(result["budgets"]) and timing["rounds"] == 1
    assert timing["device"] == "cpu" and timing["budgets"]["auto"]["route"] in timing["budgets"]
    print_budgets({**result, "timing": timing})
    output = capsys.readouterr().out
    assert "one question of median length" in output and "user\\n<image>\\n" in output


def test_the_dial_never_saves_by_being_turned_up(tiny_run: Path) -> None:
    dial = read_json(tiny_run / "eval" / "test.json")["dial"]
    assert [point["dial"] for point in dial] == [-4.0, 0.0, 4.0]
    assert all(low["decoder_gflops"] <= high["decoder_gflops"] for low, high in pairwise(dial))
    assert {"easy", "hard", "accuracy", "decoder_gflops", "end_to_end_gflops"} <= dial[0].keys()


def test_examples_are_there_to_be_looked_at(tiny_run: Path) -> None:
    result = read_json(tiny_run / "eval" / "test.json")
    assert {example["task"] for example in result["examples"]} == set(result["levels"])
    for example in result["examples"]:
        with Image.open(tiny_run / "eval" / example["image"]) as picture:
            assert picture.size == (96, 96)
        assert example["question"] and example["answer"] and example["budget"] in result["budgets"]


def test_records_without_a_picture_are_evaluated_and_shown(tiny_copy: Path, tmp_path: Path) -> None:
    """Also if they come first; the report shows them without a picture."""
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "What is two plus two?"}, {"from": "gpt", "value": "4"}]
    records = [{"id": "t", "conversations": talk}, {"id": "p", "image": "a.png", "conversations": talk}]
    (tmp_path / "set.json").write_text(json.dumps(records))
    model, workdir = load(tiny_copy), Workdir(tiny_copy)
    config = evaluation_data(from_dict(workdir.config()), "llava", str(tmp_path / "set.json"))
    result = evaluate(config, model, workdir)
    assert [example["image"] for example in result["examples"]] == ["", "examples/test/1.png"]
    assert result["budgets"]["auto"]["samples"] == 2
    (tiny_copy / "config.json").unlink()  # the report only shows evaluations of the workdir's configuration
    workdir.claim(config)
    assert write_report(workdir).read_text().count("no picture</div>") == 1


def test_splits_share_neither_chunks_nor_pictures(tiny_copy: Path) -> None:
    """Both have questions at the same places, and generated ones have no other identity."""
    model, workdir, config = load(tiny_copy), Workdir(tiny_copy), from_dict(Workdir(tiny_copy).config())
    questions = {split: single_questions(config, split, 8) for split in ("validation", "test")}
    places = questions["test"].plan()
    assert places == questions["validation"].plan()
    chunks = {
        split: chunks_of(config, model, workdir, evaluation_identity(config, model, workdir, split), split)
        for split in questions
    }
    for group in chunks["test"]:
        kept = chunks["validation"][group]
        kept.save(places, model.viable_budgets, False, no_scores(places, len(model.viable_budgets)))
        assert kept.load(places, model.viable_budgets, False) is not None
        assert chunks["test"][group].load(places, model.viable_budgets, False) is None
    before = {path.name: path.read_bytes() for path in (tiny_copy / "eval" / "examples" / "test").iterdir()}
    evaluate(config, model, workdir, split="validation", budgets=["full"])
    assert before == {path.name: path.read_bytes() for path in (tiny_copy / "eval" / "examples" / "test").iterdir()}


def no_scores(places: Sequence[Place], num_budgets: int) -> ChunkScores:
    """Scores of a chunk in which no question is right."""
    zeros = np.zeros((num_budgets, len(places)))
    ids, sizes = [place.id for place in places], np.ones((len(places), 4), np.int64)
    return ChunkScores(zeros > 0, zeros, None, sizes, ids, ["color"] * len(places), [])


def test_examples_and_times_need_room_for_an_answer(tiny_copy: Path) -> None:
    """Scores do not; where no question leaves any, there are none of both."""
    model, config = load(tiny_copy), from_dict(Workdir(tiny_copy).config())
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, timing_rounds=1))
    text = dataclasses.replace(model.arch.text, max_positions=1)
    model.arch = dataclasses.replace(model.arch, text=text)
    result = evaluate(config, model, Workdir(tiny_copy), budgets=["full"], name="short")
    assert result["examples"] == [] and "timing" not in result and result["budgets"]["full"]["samples"] == 24


def test_a_result_of_another_file_of_the_same_name_is_kept(tiny_copy: Path, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "What is two plus two?"}, {"from": "gpt", "value": "4"}]
    model, workdir = load(tiny_copy), Workdir(tiny_copy)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "set.json").write_text(json.dumps([{"id": name, "conversations": talk}]))
    a, b = (evaluation_data(from_dict(workdir.config()), "llava", str(tmp_path / x / "set.json")) for x in "ab")
    first = evaluate(a, model, workdir, budgets=["full"], name="of_set")
    with pytest.raises(RequestError, match=r"the questions of .*a/set.json, which these of .*b/set.json would replace"):
        evaluate(b, model, workdir, budgets=["full"], name="of_set")
    assert read_json(tiny_copy / "eval" / "of_set" / "test.json") == first
    evaluate(a, model, workdir, budgets=["full"], name="of_set")
    for config in (a, b):
        evaluate(config, model, workdir, budgets=["full"], name="partial")


def test_chosen_budgets_and_an_earlier_stage(tiny_copy: Path) -> None:
    model = load(tiny_copy / "full")
    config = from_dict(Workdir(tiny_copy).config())
    result = evaluate(config, model, Workdir(tiny_copy), split="validation", budgets=["full", "0b01", "1"])
    assert {"full", "0b01"} <= set(result["budgets"]) <= {"full", "0b01", "0b10"}
    assert "auto" not in result["budgets"] and "dial" not in result
    assert read_json(tiny_copy / "eval" / "validation.json") == result
    with pytest.raises(RequestError, match="no trained policy"):
        evaluate(config, model, Workdir(tiny_copy), budgets=["auto"])


@pytest.mark.parametrize(
    ("gflops", "shown"),
    [
        ((0.0042, 0.0312), ("decoder MFLOP", "4.20", "31.20")),
        ((4.2, 31.2), ("decoder GFLOP", "4.20", "31.20")),
        ((1790.0, 54020.0), ("decoder TFLOP", "1.79", "54.02")),
        ((999.0, 7600.0), ("decoder GFLOP", "999.00", "7600.00")),
        ((0.0, 0.5), ("decoder MFLOP", "0.00", "500.00")),
    ],
)
def test_costs_are_printed_in_one_suitable_unit(
    capsys: pytest.CaptureFixture[str], gflops: tuple[float, ...], shown: tuple[str, ...]
) -> None:
    row = {"easy": None, "hard": None, "tasks": {"all": 0.5}, "end_to_end_gflops": 90000.0, "samples": 3}
    budgets = {f"b{number}": {**row, "decoder_gflops": max(cost, 1e-9)} for number, cost in enumerate(gflops)}
    dense = {"decoder_gflops": 80000.0, "end_to_end_gflops": 99000.0}
    print_budgets({"benchmark": "own", "split": "test", "levels": {}, "budgets": budgets, "dense": dense})
    output = capsys.readouterr().out
    assert all(f"{word} " in output for word in shown)
