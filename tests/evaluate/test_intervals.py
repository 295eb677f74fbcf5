"""Intervals of accuracies, against SciPy and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from visor_jax.evaluate.intervals import budget_intervals, interval_of_mean, wilson


@given(st.integers(1, 2000), st.data())
def test_wilsons_interval_is_that_of_scipy(count: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, count))
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_nothing_is_known_without_answers() -> None:
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_the_mean_over_tasks_lies_in_its_interval_95_times_of_100() -> None:
    rng, truth, counts = np.random.default_rng(0), np.array([0.5, 0.9, 0.99]), np.array([40, 40, 80])
    covered = 0
    for _ in range(1000):
        accuracies = (rng.binomial(counts, truth) / counts).tolist()
        limits = [wilson(a, int(n)) for a, n in zip(accuracies, counts, strict=True)]
        low, high = interval_of_mean(accuracies, limits)
        covered += low <= truth.mean() <= high
    assert 930 <= covered <= 975


def test_a_budget_has_intervals_of_tasks_and_levels() -> None:
    row = {"tasks": {"a": 1.0, "b": 0.5, "c": 0.25}}
    found = budget_intervals(row, ["a"] * 10 + ["b"] * 20 + ["c"] * 4, {"a": "easy", "b": "middle", "c": "middle"})
    assert found.keys() == {"tasks", "easy", "middle"}
    assert found["tasks"]["b"] == list(wilson(0.5, 20)) and found["easy"] == pytest.approx(wilson(1.0, 10))
    low, high = found["middle"]
    assert low < 0.375 < high
