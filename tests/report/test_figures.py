"""The figures: which numbers they draw."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.report import curves, figures
from visor_jax.report.facts import Stage, all_budgets, fixed_budgets, mixed_accuracy, read_facts, tasks_by_level
from visor_jax.workdir.folder import Workdir


def texts(svg: bytes) -> list[str]:
    return [
        "".join(e.itertext()) for e in xml.etree.ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]


@pytest.fixture
def evaluation(full_run: Path) -> dict[str, Any]:
    return json.loads((full_run / "eval" / "test.json").read_text())


def test_cost_curve_names_budgets_and_the_dense_cost(evaluation: dict[str, Any]) -> None:
    words = texts(figures.cost_curve(evaluation))
    assert {"empty", "0b100", "0b110", "full", "auto", "auto, dial turned", "easy tasks", "hard tasks"} <= set(words)
    assert "70.2 MFLOP" in words
    del evaluation["dial"], evaluation["budgets"]["auto"]
    assert not {"auto", "auto, dial turned"} & set(texts(figures.cost_curve(evaluation)))


def test_budgets_of_equal_cost_share_one_label_the_better_first(evaluation: dict[str, Any]) -> None:
    rows = evaluation["budgets"]
    rows["0b010"] = {**rows["0b100"], "hard": rows["0b100"]["hard"] + 0.01}
    words = texts(figures.cost_curve(evaluation))
    assert words.index("0b010") + 1 == words.index("0b100")


def test_of_many_budgets_the_outermost_are_named(evaluation: dict[str, Any]) -> None:
    rows, full = evaluation["budgets"], evaluation["budgets"]["full"]
    for number in range(1, 7):
        rows[f"0b{number:03b}1"] = {**full, "decoder_gflops": 0.014 + 0.002 * number}
    words = texts(figures.cost_curve(evaluation))
    assert {"empty", "full"} <= set(words) and not [word for word in words if word.startswith("0b")]


def test_the_same_numbers_give_the_same_bytes(evaluation: dict[str, Any]) -> None:
    assert figures.cost_curve(evaluation) == figures.cost_curve(evaluation)


def test_names_are_drawn_as_they_are() -> None:
    name = r"$\frac{1}$"
    by_task = {
        name: {"empty": 3.0, "full": 1.0},
        "": {"full": 2.0},
        "\x00\ud800\n": {"empty": 1.0},
        "字": {"empty": 1.0},
    }
    words = texts(figures.shares(by_task, ["empty", "full"], [(name, "hard")]))
    assert name in words and "all" in words and "\N{REPLACEMENT CHARACTER}" * 3 in words
    assert {"75", "25", "100"} <= set(words)  # counts became shares
    assert "…" in figures.plain("x" * 50) and len(figures.plain("x" * 50)) == 18


@given(st.lists(st.one_of(st.none(), st.floats(0, 100)), max_size=300))
def test_curve_keeps_the_mean_and_the_ends(values: list[float | None]) -> None:
    rows = [{"step": step, "loss": value} for step, value in enumerate(values, start=1)]
    line = curves.curve([*rows, {"step": 999}], "loss")
    finite = [value for value in values if value is not None]
    assert len(line.steps) == min(len(finite), curves.BINS)
    assert np.all(np.diff(line.steps) > 0)
    if finite:
        assert line.least.min() == min(finite) and line.largest.max() == max(finite)
        assert np.all(line.least <= line.mean + 1e-9) and np.all(line.mean <= line.largest + 1e-9)


def test_steps_are_grouped_by_budget_or_by_slots_where_they_are_many() -> None:
    few = [{"step": i, "loss": 1.0, "budget": name} for i, name in enumerate(["full", "0b010", "empty", "full"])]
    assert {name: len(rows) for name, rows in curves.by_budget(few).items()} == {"empty": 1, "0b010": 1, "full": 2}
    assert list(curves.by_budget(few)) == ["empty", "0b010", "full"]
    names = ["empty", "full", *(f"0b{n:04b}" for n in range(1, 12))]
    many = [{"step": i, "loss": 1.0, "budget": name} for i, name in enumerate(names)]
    groups = curves.by_budget(many)
    # 1 to 11 in binary: 1, 2, 4, 8 have one bit; 3, 5, 6, 9, 10 two; 7 and 11 three.
    assert {name: len(rows) for name, rows in groups.items()} == {
        "0 slots on": 1, "1 slots on": 4, "2 slots on": 5, "3 slots on": 2, "full": 1,
    }  # fmt: skip


def test_losses_over_decades_get_a_logarithmic_axis() -> None:
    falling = [{"step": i, "loss": 10 ** (2 - 4 * i / 100), "budget": "full"} for i in range(100)]
    flat = [{**row, "loss": 1 + row["step"] / 100} for row in falling]
    assert {"0.1", "10"} <= set(texts(curves.loss_curve(Stage("full", falling, True))))
    assert "1.0" in texts(curves.loss_curve(Stage("full", flat, True)))


def test_a_stage_whose_losses_are_all_lost_can_be_drawn() -> None:
    rows = [{"step": i, "loss": None, "budget": "full"} for i in range(1, 4)]
    assert "step" in texts(curves.loss_curve(Stage("full", rows, False)))


def test_facts_are_ordered_by_cost_slots_and_level(full_run: Path) -> None:
    facts = read_facts(Workdir(full_run))
    assert fixed_budgets(facts.evaluation) == ["empty", "0b100", "0b110", "full"]
    facts.evaluation["routes"]["card"] = {"0b011": 1.0}
    assert all_budgets(facts) == ["empty", "0b100", "0b011", "0b110", "full"]
    levels = [level for _, level in tasks_by_level(facts.evaluation)]
    assert levels == ["easy"] * 4 + ["hard"] * 6
    assert [stage.name for stage in facts.stages] == ["base", "warmup", "full", "universal", "policy"]


def test_the_mix_counts_levels_alike() -> None:
    row = {"tasks": {"a": 1.0, "b": 0.5, "c": 0.0, "d": None}}
    assert mixed_accuracy(row, {"a": "easy", "b": "hard", "c": "hard", "d": "hard"}) == pytest.approx(0.625)
    assert mixed_accuracy(row, {}) == pytest.approx(0.5)
    assert mixed_accuracy({"tasks": {}}, {}) is None


def test_only_tasks_are_colored_by_level() -> None:
    tasks = [("above", "hard"), ("digit", "easy")]
    deepest = {level: figures.to_hex(shades(1.0)) for level, shades in figures.SHADES.items()}

    def drawn(*names: str) -> str:
        row = {"loss": 1.0, "budget": "full", **{f"accuracy/{name}": 0.5 for name in names}}
        rows = [{"step": step, **row} for step in (1, 2, 3)]
        return curves.accuracy_curve(Stage("full", rows, True), tasks).decode()

    of_tasks, of_others = drawn("above", "digit"), drawn("above", "named")  # a base stage may report any metrics
    assert deepest["hard"] in of_tasks and deepest["easy"] in of_tasks and deepest[""] not in of_tasks
    assert deepest["hard"] not in of_others and deepest[""] in of_others


def test_of_many_tasks_the_means_of_levels_have_names() -> None:
    tasks = [(f"task{n}", "easy" if n % 2 else "hard") for n in range(14)]
    rows = [{"step": step, "loss": 1.0, "budget": "full"} for step in range(1, 30)]
    for row in rows:
        row |= {f"accuracy/task{n}": 0.5 for n in range(row["step"] % 3, 14, 3)}
    words = texts(curves.accuracy_curve(Stage("full", rows, True), tasks))
    assert {"easy tasks, mean of 7", "hard tasks, mean of 7"} <= set(words) and "task3" not in words
    few = texts(curves.accuracy_curve(Stage("full", rows, True), tasks[:13]))  # one is not a known task
    assert "task3" in few and "hard tasks, mean of 7" not in few


def test_the_positions_of_the_dial_are_written_above_its_points(full_run: Path) -> None:
    evaluation = read_facts(Workdir(full_run)).evaluation
    costs = [point["decoder_gflops"] for point in evaluation["dial"]]
    evaluation["dial"] = [
        {**point, "decoder_gflops": costs[0] * factor}
        for point, factor in zip(evaluation["dial"], (1, 1.02, 1.4, 1.4, 1.41, 2, 2.8), strict=True)
    ]
    words = texts(figures.cost_curve(evaluation))
    assert "position of the dial" in words
    assert figures.dial_text([-1.0, 0.0, 0.5]) == "\N{MINUS SIGN}1\n0\n+0.5"
    for position in ("\N{MINUS SIGN}4", "\N{MINUS SIGN}2", "\N{MINUS SIGN}1", "+1", "+2", "+4"):
        assert any(position in word for word in words), position
    del evaluation["dial"]
    assert "position of the dial" not in texts(figures.cost_curve(evaluation))


def test_the_loss_of_each_source_is_drawn() -> None:
    rows = [{"step": n, "loss": 2.0, "loss/source=charts": 3.0 / n, "loss/source=pages": 1.0} for n in range(1, 20)]
    rows[3].pop("loss/source=charts")  # a step without that source
    stage = Stage("full", rows, True)
    assert curves.sources_of(stage) == ["loss/source=pages", "loss/source=charts"]
    drawn = curves.source_curve(stage).decode()
    assert "charts" in drawn and "pages" in drawn and "loss by source" in drawn
