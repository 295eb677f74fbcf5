"""The benchmark scripts run at a tiny size and write their reports. Timings are not checked."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from visor_jax import testing
from visor_jax.cost import cache_bytes

pytestmark = pytest.mark.usefixtures("quick", "script")  # `script` puts the scripts on the path


def run_benchmark(name: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Runs a script and returns its report."""
    importlib.import_module(name).main([*arguments, f"--out={tmp_path / 'result.json'}"])
    return json.loads((tmp_path / "result.json").read_text())


def test_specialize(tmp_path: Path) -> None:
    report = run_benchmark("specialize", tmp_path, "--tiny", "--visual=9", "--text=6", "--repeats=3")
    assert list(report["budgets"]) == ["empty", "full"]
    assert report["dynamic_programs_compiled"] == 1, "one program serves every budget"
    for row in report["budgets"].values():
        low, middle, high = row["overhead_quartiles"]
        assert 0 < low <= middle <= high
        assert row["max_difference"] < 1e-4


def test_search(tmp_path: Path) -> None:
    report = run_benchmark("search", tmp_path, "--layers=9", "--questions=2", "--visual=40", "--rounds=2")
    assert (report["blocks"], report["blocks_of_tree"]) == (24, 14)
    assert report["same_viable"] and report["right_answers_differ"] == 0
    assert report["largest_difference_nats"] < 1e-4 and report["times_fewer"] > 1.5
    assert report["llava_ov_0p5b"]["blocks_of_tree"] == 510 and report["llava_ov_0p5b"]["times_fewer"] > 4


@pytest.mark.slow
def test_generate(tmp_path: Path) -> None:
    report = run_benchmark(
        "generate", tmp_path, "--tiny", "--visual=9", "--text=6", "--lengths=4,40", "--repeats=2", "--rows=2"
    )
    assert list(report["budgets"]) == ["empty", "full", "dense"]
    arch = testing.tiny_architecture(4)
    for name, bits in (("empty", (False,)), ("full", (True,))):
        for length, row in report["budgets"][name].items():
            assert row["cache_bytes"] == cache_bytes(arch, bits, 9, 6 + int(length) - 1, 4) <= row["held_bytes"]
            assert 0 < row["tokens_per_second"]["q1"] <= row["tokens_per_second"]["q3"] and row["over_dense"]["q1"] > 0
    assert report["budgets"]["dense"]["40"]["over_dense"] == {"q1": 1, "median": 1, "q3": 1}


@pytest.mark.slow
def test_mixed(tmp_path: Path) -> None:
    report = run_benchmark("mixed", tmp_path, "--tiny", "--rows=4", "--visual=9", "--text=6", "--repeats=2")
    assert list(report["samples_on"]) == ["0", "1", "2", "3", "4"]
    for row in report["samples_on"].values():
        assert list(row) == ["masked", "compacted", "recomputed", "grouped", "any"]
        assert row["grouped"]["over_grouped"] == [1, 1, 1] and all(way["seconds"] > 0 for way in row.values())


def test_contenders_take_turns_after_a_warm_up() -> None:
    harness = importlib.import_module("harness")
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    times = harness.interleaved({name: functools.partial(measure, name) for name in "abc"}, 5)
    assert calls[:3] == ["a", "b", "c"], "the warm-up"
    rounds = [calls[start : start + 3] for start in range(3, 18, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and len({tuple(turn) for turn in rounds}) > 1
    assert times["a"].tolist() == [3 * (i + 1) + turn.index("a") + 1 for i, turn in enumerate(rounds)]
    assert harness.quartiles([1, 2, 3, 4, 5]) == [2, 3, 4]


def test_the_page_of_plans_shows_the_stored_plans_and_the_records() -> None:
    """docs/plan.md holds the tables that `python benchmarks/plan.py --table` prints."""
    module = importlib.import_module("plan")
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    for table in (module.tables(), module.records()):
        assert "\n".join(table) in page, "run `python benchmarks/plan.py --table`"
