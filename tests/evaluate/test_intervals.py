"""Intervals of accuracies, against SciPy and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from visor_jax.evaluate.intervals import (
    PairedDifference,
    bootstrap_means,
    budget_intervals,
    interval_of_mean,
    interval_of_values,
    percentiles,
    shown_interval,
    wilson,
)


@given(st.integers(1, 2000), st.data())
def test_wilsons_interval_is_that_of_scipy(count: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, count))
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.floats(0, 1), st.integers(1, 500))
def test_half_a_width_is_shown_only_where_it_hardly_leaves_the_possible(accuracy: float, count: int) -> None:
    low, high = wilson(accuracy, count)
    shown = shown_interval(accuracy, (low, high))
    if shown.startswith("±"):
        half, most = float(shown[1:]) / 100, (high - low) / 6 + 1e-3
        assert -most < accuracy - half and accuracy + half < 1 + most
    else:
        assert shown == f"({100 * low:.1f} to {100 * high:.1f})"


def test_an_interval_is_shown_in_the_unit_of_its_value() -> None:
    assert shown_interval(0.5, (0.4, 0.6)) == "±10.0" and shown_interval(0.0, (0.0, 0.1)) == "(0.0 to 10.0)"
    assert shown_interval(0.5, (0.4, 0.6), 3, 1) == "±0.100" and shown_interval(0.5, (0.4, 0.6), 1, 2000) == "±200.0"


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


# --- resampling -------------------------------------------------------------------------------------------------------


def test_the_bootstrap_has_the_standard_error_of_the_mean() -> None:
    values = np.random.default_rng(0).random(400)
    samples = bootstrap_means(values.tolist(), "docvqa")
    assert samples.mean() == pytest.approx(values.mean(), abs=2e-3)
    assert samples.std() == pytest.approx(values.std() / 20, rel=0.06)
    np.testing.assert_array_equal(samples, bootstrap_means(values.tolist(), "docvqa"))
    assert (samples != bootstrap_means(values.tolist(), "infovqa")).any()


def test_right_and_wrong_have_wilsons_interval_and_graded_values_a_bootstrap() -> None:
    assert interval_of_values({"": [1.0] * 30 + [0.0] * 10}) == pytest.approx(wilson(0.75, 40))
    graded = [0.5, 0.9, 1.0, 0.0] * 50
    low, high = interval_of_values({"": graded})
    assert low < 0.6 < high and high - low == pytest.approx(2 * 1.96 * np.std(graded) / 200**0.5, rel=0.1)
    parts = interval_of_values({"a": [1.0] * 100, "b": [0.0, 1.0] * 50})  # groups count equally
    assert parts[0] < 0.75 < parts[1] and parts[1] - parts[0] == pytest.approx(1.96 * 0.05, rel=0.1)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_values_leave_uncertainty(value: float) -> None:
    """A bootstrap would resample the same values again and again."""
    low, high = interval_of_values({"": [value] * 10})
    assert low <= value <= high and high - low > 0.2
    if value != 0.5:
        assert (low, high) == pytest.approx(wilson(value, 10))
    two = interval_of_values({"a": [value] * 10, "b": [value] * 10})
    assert 0 <= two[0] <= value <= two[1] <= 1 and two[1] - two[0] == pytest.approx((high - low) / 2**0.5, rel=0.1)


def test_groups_without_a_wrong_answer_widen_the_interval() -> None:
    graded = [0.25, 1.0, 0.0, 0.25] * 5
    alone = interval_of_values({"graded": graded})
    low, high = interval_of_values({"graded": graded, "right": [1.0] * 4})
    assert high - low > (alone[1] - alone[0]) / 2
    half = (0.6875 - low) ** 2 - (np.mean(graded) - alone[0]) ** 2 / 4
    assert half == pytest.approx(((1 - wilson(1.0, 4)[0]) / 2) ** 2)


def test_the_mean_over_small_groups_lies_in_its_interval_95_times_of_100() -> None:
    """Such as MMStar's finer categories: in most samples some group has no wrong answer."""
    rng, truth, count = np.random.default_rng(0), np.array([0.98, 0.95, 0.9, 0.5]), 20
    covered = 0
    for _ in range(1000):
        groups = {str(group): (rng.random(count) < right).astype(float) for group, right in enumerate(truth)}
        low, high = interval_of_values({name: values.tolist() for name, values in groups.items()})
        covered += low <= truth.mean() <= high
    assert 930 <= covered <= 985


@given(
    st.dictionaries(st.text(max_size=3), st.lists(st.floats(0, 1), min_size=1, max_size=8), min_size=1, max_size=4),
)
def test_the_interval_holds_the_mean_and_stays_among_fractions(groups: dict[str, list[float]]) -> None:
    low, high = interval_of_values(groups)
    mean = np.mean([np.mean(values) for values in groups.values()])
    assert -1e-6 <= low <= mean + 1e-6 and mean - 1e-6 <= high <= 1 + 1e-6


@given(better=st.integers(0, 12), worse=st.integers(0, 12), same=st.integers(1, 40))
def test_p_is_that_of_the_exact_test_of_pairs(better: int, worse: int, same: int) -> None:
    """McNemar's, of which of two models is right where they differ."""
    first, second = [1.0] * better + [0.0] * (worse + same), [0.0] * better + [1.0] * worse + [0.0] * same
    found = PairedDifference.of(first, second, "x").figures()
    exact = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert found["p"] == pytest.approx(exact, abs=0.025)
    assert found["difference"] == pytest.approx((better - worse) / len(first))
    assert found["low"] <= found["difference"] + 1e-6 and found["difference"] - 1e-6 <= found["high"]


def test_pairing_shrinks_the_interval() -> None:
    rng = np.random.default_rng(0)
    first = (rng.random(500) < 0.6).astype(float)
    second = np.where(rng.random(500) < 0.05, 1 - first, first)
    found = PairedDifference.of(first.tolist(), second.tolist(), "x").figures()
    apart = np.diff(percentiles(bootstrap_means(first, "a") - bootstrap_means(second, "b")))[0]
    assert found["high"] - found["low"] < apart / 2


@pytest.mark.parametrize(("first", "second"), [(1.0, 1.0), (0.0, 0.0), (0.25, 0.25), (1.0, 0.0), (0.0, 1.0)])
def test_equal_differences_are_not_certain(first: float, second: float) -> None:
    """Two models that agree on ten questions may differ on others; on a thousand, less. One that differs is no leap."""
    widths = []
    for count in (10, 1000):
        found = PairedDifference.of([first] * count, [second] * count, "x").figures()
        assert found["low"] <= first - second <= found["high"]
        widths.append(found["high"] - found["low"])
        assert 1 / count < widths[-1] < 6 / count  # the score interval of a difference of 0 has 7.7 / (count + 3.8)
    one_better = PairedDifference.of([first] * 999 + [1.0], [second] * 999 + [0.0], "x").figures()
    assert (
        one_better["low"] < one_better["difference"] - 0.5 / 1000
        and widths[1] / 2 < one_better["high"] - one_better["low"]
    )


@pytest.mark.parametrize(("common", "other"), [(0.0, 0.6), (1.0, 0.9), (0.5, 0.4)])
def test_one_graded_answer_does_not_make_the_others_certain(common: float, other: float) -> None:
    equal = interval_of_values({"": [common] * 50})
    nearly = interval_of_values({"": [common] * 49 + [other]})
    assert nearly[1] - nearly[0] > 0.7 * (equal[1] - equal[0]) > 0.03
    assert nearly[0] <= common + (other - common) / 50 <= nearly[1]


def test_the_mean_of_parts_counts_each_equally() -> None:
    large, small = ([1.0] * 300, [0.0] * 300), ([0.0] * 10, [0.0] * 10)
    parts = [PairedDifference.of(*large, "large"), PairedDifference.of(*small, "small")]
    found = PairedDifference.mean(parts).figures()
    assert (found["accuracy"], found["other"], found["difference"], found["questions"]) == (0.5, 0.0, 0.5, 310)
    assert found["p"] < 0.001 and PairedDifference.mean(parts[1:]).figures()["p"] == 1
