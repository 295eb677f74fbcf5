"""Analyses of a run: tables against its evaluation and the cost formulas, and their pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from visor_jax import testing
from visor_jax.analysis import budgets, costs, lengths, routes
from visor_jax.analysis.base import Row, Run
from visor_jax.budget import budget_name, by_count
from visor_jax.cost import decoder_flops, dense_decoder_flops

ARCH = testing.tiny_architecture(6)
BUDGETS = by_count(ARCH.num_slots)
LEVELS = {"color": "easy", "cell": "hard"}


def budget(color: float, cell: float | None, gflops: float) -> Row:
    price = {"decoder_gflops": gflops, "end_to_end_gflops": gflops + 1}
    return {"tasks": {"color": color, "cell": cell}, "easy": color, "hard": cell, **price, "samples": 8}


@pytest.fixture
def run() -> Run:
    evaluation: dict[str, Any] = {
        "budgets": {
            "full": budget(1.0, 0.75, 3.0),
            "empty": budget(0.5, 0.25, 1.0),
            "0b10": budget(1.0, 0.5, 2.0),
            "auto": budget(1.0, 0.625, 1.5),
        },
        "dense": {"decoder_gflops": 8.0, "end_to_end_gflops": 9.0},
        "levels": LEVELS,
        "routes": {"color": {"empty": 0.75, "0b10": 0.25}, "cell": {"full": 1.0}},
        "dial": [{"dial": -1.0, "accuracy": 0.6, "easy": 1.0, "hard": 0.2, **budget(0, 0, 1.2)}],
    }
    return Run(ARCH, BUDGETS, evaluation)


def test_budgets_are_cheapest_first_and_easy_tasks_before_hard_ones(run: Run) -> None:
    rows = budgets.rows(run)
    assert [row["budget"] for row in rows[:4]] == ["empty", "0b10", "full", "auto"]
    assert [(row["task"], row["level"]) for row in rows[::4]] == [("color", "easy"), ("cell", "hard")]
    assert [row["accuracy"] for row in rows] == [0.5, 1.0, 1.0, 1.0, 0.25, 0.5, 0.75, 0.625]
    drawing = budgets.draw(run, rows)
    shown = np.asarray(drawing.axes[0].images[0].get_array())
    np.testing.assert_allclose(shown, [[50, 100, 100, 100], [25, 50, 75, 62.5]])
    easy, hard = drawing.axes[0].get_yticklabels()
    assert (easy.get_fontstyle(), hard.get_fontweight()) == ("italic", "bold"), "levels differ without color"


def test_a_task_without_a_result_has_no_row(run: Run) -> None:
    run.evaluation["budgets"]["empty"]["tasks"]["cell"] = None
    rows = budgets.rows(run)
    assert [row["budget"] for row in rows if row["task"] == "cell"] == ["0b10", "full", "auto"]
    shown = np.ma.asarray(budgets.draw(run, rows).axes[0].images[0].get_array())
    assert np.isnan(shown.filled(np.nan)[1, 0])


def test_routes_have_a_share_for_every_budget(run: Run) -> None:
    rows = routes.rows(run)
    assert [(row["task"], row["budget"], row["share"]) for row in rows] == [
        ("color", "empty", 0.75), ("color", "0b10", 0.25), ("color", "full", 0.0),
        ("cell", "empty", 0.0), ("cell", "0b10", 0.0), ("cell", "full", 1.0),
    ]  # fmt: skip
    assert [tick.get_text() for tick in routes.draw(run, rows).axes[0].get_yticklabels()] == ["color", "cell"]
    assert routes.rows(Run(ARCH, BUDGETS, {**run.evaluation, "routes": None})) == []


def test_costs_have_the_dial_and_the_dense_decoder(run: Run) -> None:
    rows = costs.rows(run)
    assert [(row["budget"], row["dial"]) for row in rows[-3:]] == [("auto", ""), ("auto", -1.0), ("dense", "")]
    assert rows[0] == {
        "budget": "full", "dial": "", "accuracy": 0.875, "easy": 1.0, "middle": "", "hard": 0.75,
        "decoder_gflops": 3.0, "end_to_end_gflops": 4.0,
    }  # fmt: skip
    assert rows[-1]["decoder_gflops"] == 8.0 and rows[-1]["accuracy"] == ""
    answered = {**run.evaluation, "dense": {**run.evaluation["dense"], **run.evaluation["budgets"]["full"]}}
    assert costs.rows(Run(ARCH, BUDGETS, answered))[-1]["accuracy"] == 0.875, "where the dense model was asked too"
    axes = costs.draw(run, rows).axes[0]
    assert {"easy", "hard"} <= {text.get_text() for text in axes.texts}, "named beside their curves"


def test_lengths_follow_the_formulas(run: Run) -> None:
    rows = lengths.rows(run)
    names = {budget_name(bits): bits for bits in BUDGETS}
    assert len(rows) == len(lengths.LENGTHS) * (1 + len(BUDGETS))
    for row in rows:
        size = row["visual_tokens"], row["text_tokens"]
        dense = row["budget"] == "dense"
        flops = dense_decoder_flops(ARCH, *size) if dense else decoder_flops(ARCH, names[row["budget"]], *size)
        assert row["decoder_gflops"] == pytest.approx(flops / 1e9)
    lines = lengths.draw(run, rows).axes[0].lines
    assert [line.get_label() for line in lines] == ["dense", *names]
    assert len({str(line.get_marker()) for line in lines}) == len(lines), "lines differ without color"
    dense_only = lengths.rows(Run(testing.tiny_architecture(2, plan="dense"), [()]))
    assert {row["budget"] for row in dense_only} == {"dense"}
