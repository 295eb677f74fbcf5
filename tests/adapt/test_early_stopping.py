"""Early stopping: the bets are sound, a race keeps the best subsets, and a search finds the same viable budgets."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapt import wanted_scores
from tests.adapt.wanted_scores import as_wanted
from tests.faults.whole_run import environment
from visor_jax.adapt import early_stopping
from visor_jax.adapt.early_stopping import PairedBets, Race
from visor_jax.adapt.search import search_stage
from visor_jax.budget import Bits, all_subsets, bit_string
from visor_jax.config import as_config
from visor_jax.data.questions import Place
from visor_jax.errors import RequestError
from visor_jax.evaluate import scoring
from visor_jax.evaluate.chunks import ChunkScores
from visor_jax.files.read_write import read_json, write_json
from visor_jax.loading import load_stage
from visor_jax.testing import tiny_config
from visor_jax.testing.processes import Processes
from visor_jax.workdir.folder import Workdir

# --- the bets ---------------------------------------------------------------------------------------------------------


def wealth(right: np.ndarray, weights: np.ndarray) -> float:
    """The largest wealth of the bets that the first subset is better, on questions in this order: right [N, 2]."""
    bets = PairedBets(2, weights)
    for question in right:
        bets.add(question)
    return float(bets.wealth[0, 1])


ANSWERS = st.sampled_from([(True, False), (False, True), (True, True)])


@settings(max_examples=25)
@given(st.lists(st.tuples(ANSWERS, st.sampled_from([1.0, 1.0, 3.0])), min_size=2, max_size=5))
def test_over_all_orders_wrong_bets_win_as_seldom_as_stated(population: list[tuple[tuple[bool, bool], float]]) -> None:
    """Exactly: every order of a few questions. Of two subsets one is no more accurate than the other."""
    right, weights = np.array([answer for answer, _ in population]), np.array([weight for _, weight in population])
    if weights @ right[:, 0] > weights @ right[:, 1]:
        right = right[:, ::-1]
    orders = itertools.permutations(range(len(weights)))
    reached = np.array([wealth(right[list(order)], weights[list(order)]) for order in orders])
    for level in (1.05, 1.2, 1.5, 2, 3, 5, 10):
        assert np.mean(reached >= level) <= 1 / level + 1e-9


def test_wealth_is_that_of_a_reference_computation() -> None:
    """Bet by bet in plain Python, with unequal weights; the mean of the remaining differences from its definition."""
    rng = np.random.default_rng(0)
    weights, right = rng.choice([1.0, 2.5], 30), rng.random((30, 2)) < [0.8, 0.4]
    weights = weights / weights.mean()
    bets, largest, lead = [1.0] * len(early_stopping.BETS), 1.0, 0.0
    for index, (weight, (a, b)) in enumerate(zip(weights, right, strict=True)):
        expected, difference = (0 - lead) / (30 - index), weight * (int(a) - int(b))
        share = (difference - expected) / (expected + max(weights[index:]))
        bets = [money * (1 + bet * share) for money, bet in zip(bets, early_stopping.BETS, strict=True)]
        lead += difference
        largest = max(largest, sum(bets) / len(bets))
        if lead > sum(weights[index + 1 :]) + 1e-9:
            largest = float("inf")
            break
    assert largest > 20
    assert wealth(right, weights) == pytest.approx(largest)


@pytest.mark.parametrize("lead", [5, 6])
def test_a_lead_that_cannot_be_made_up_is_certain(lead: int) -> None:
    bets = PairedBets(2, np.ones(10))
    for _ in range(lead):
        bets.add(np.array([True, False]))
    assert (bets.wealth[0, 1] == np.inf) == (lead > 10 - lead)
    assert bets.wealth[1, 0] == 1


# --- the race ---------------------------------------------------------------------------------------------------------


def chunk(places: Sequence[Place], right: np.ndarray) -> ChunkScores:
    """Scores of a chunk: right [budgets, n]."""
    likelihood, sizes = np.where(right, -0.1, -2.0).astype(np.float32), np.ones((len(places), 4), np.int64)
    return ChunkScores(right, likelihood, None, sizes, [p.id for p in places], ["" for _ in places], [])


def run(race: Race, right: dict[Bits, np.ndarray], size: int) -> None:
    """Asks all questions in chunks of `size`."""
    for start in range(0, len(right[race.asked[0]]), size):
        part = [Place(i, 0) for i in range(start, min(start + size, len(right[race.asked[0]])))]
        race.add(part, chunk(part, np.array([right[bits][start : start + size] for bits in race.asked])))


@pytest.mark.parametrize("survivors", [1, 3])
def test_the_best_subsets_are_lost_less_often_than_stated(survivors: int) -> None:
    """Equally good subsets are the hardest case: whichever is the best, any other may look better for a while."""
    subsets, lost, error, runs = [b for b in all_subsets(5) if sum(b) == 2], 0, 0.3, 150
    rng = np.random.default_rng(0)
    for _ in range(runs):
        right = np.array([rng.permutation(60) < 30 for _ in subsets])
        best = set(subsets[:survivors])
        right[:survivors, np.flatnonzero(~right[:survivors].all(axis=0))[:1]] = True  # more accurate by a question
        order = rng.permutation(60)
        race = Race(subsets, {Place(i, 0): "" for i in range(60)}, error=error, survivors=survivors)
        run(race, {bits: row[order] for bits, row in zip(subsets, right, strict=True)}, 10)
        lost += not best <= set(race.asked)
    assert lost <= error * runs


def test_worse_subsets_are_stopped_and_the_better_one_is_named() -> None:
    rng, subsets = np.random.default_rng(1), all_subsets(3)
    chance = {bits: (0.2, 0.9)[bits[0]] for bits in subsets}
    right = {bits: rng.random(256) < chance[bits] for bits in subsets}
    race = Race(subsets, {Place(i, 0): f"task {i % 3}" for i in range(256)}, error=0.01, chunks_per_look=2)
    run(race, right, 16)
    stopped = {one.bits: one for one in race.stopped}
    assert {(False, True, False), (False, False, True), (False, True, True)} <= stopped.keys()
    assert set(race.asked) | stopped.keys() == set(subsets)
    for bits, one in stopped.items():
        assert sum(one.better) == sum(bits) and right[one.better].mean() > right[bits].mean()
        assert len(one.chunks) % 2 == 0 and len(one.chunks) < 16, "only at a look"
        joined = np.concatenate([part.correct[0] for part in one.chunks])
        np.testing.assert_array_equal(joined, right[bits][: len(joined)])


def test_enough_subsets_remain_of_each_count() -> None:
    subsets = [bits for bits in all_subsets(4) if sum(bits) == 2]
    right = {bits: np.arange(200) < 30 * rank for rank, bits in enumerate(subsets, start=1)}
    order = np.random.default_rng(0).permutation(200)
    for survivors in (1, 2, 4, 9):
        race = Race(subsets, {Place(i, 0): "" for i in range(200)}, error=0.4, survivors=survivors)
        run(race, {bits: x[order] for bits, x in right.items()}, 20)
        assert set(race.asked) == set(subsets[-survivors:])


def test_unusable_questions_count_as_equal_and_later_ones_stop_nothing() -> None:
    subsets = [(True, False), (False, True)]
    places = [Place(i, 0) for i in range(8)]
    race = Race(subsets, dict.fromkeys(places, ""), error=0.5)
    race.add(places, chunk(places[:0], np.zeros((2, 0), bool)))
    assert race.asked == subsets
    later = [Place(i, 0) for i in range(8, 200)]
    race.add(later, chunk(later, np.array([[True], [False]]).repeat(192, axis=1)))
    assert race.asked == subsets, "they are not among the questions that the bets are about"


def test_all_processes_stop_what_the_first_one_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    subsets = [(True, False), (False, True)]
    right = {subsets[0]: np.ones(64, bool), subsets[1]: np.zeros(64, bool)}

    def of_first(texts: list[bytes]) -> list[list[bytes]]:
        return [[b"[]"], texts]

    monkeypatch.setattr(early_stopping, "gathered", of_first)
    race = Race(subsets, {Place(i, 0): "" for i in range(64)}, error=0.1)
    run(race, right, 8)
    assert race.asked == subsets


# --- the search -------------------------------------------------------------------------------------------------------

FIELDS = {
    "search.samples": 48,
    "search.early_stopping": 0.2,
    "search.look_every": 8,
    "evaluate.batch_size": 4,
}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """Makes slot 0 much better than slot 1; lists what is scored: the budgets and the number of questions."""
    seen = list[tuple[list[str], int]]()
    score = as_wanted(
        scoring.Scorer.score, lambda budgets, count: seen.append(([bit_string(bits) for bits in budgets], count))
    )
    monkeypatch.setattr(scoring.Scorer, "score", score)
    return seen


def start_again(run: Path, fields: dict[str, Any]) -> None:
    """Makes a run that has not searched and was started with these fields."""
    record = read_json(run / "config.json")
    for name, value in fields.items():
        section, field = name.split(".")
        record["config"][section][field] = value
    write_json(run / "config.json", record)
    (run / "search" / "viable.json").unlink(missing_ok=True)


def search(run: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Searches as a run that was started with these fields."""
    start_again(run, fields)
    search_stage(tiny_config(fields), Workdir(run), load_stage(Workdir(run), "full"))
    return read_json(run / "search" / "viable.json")


@pytest.mark.usefixtures("quick")
def test_an_early_stopped_search_finds_the_same_and_says_what_it_stopped(
    tiny_copy: Path, scored: list[tuple[list[str], int]]
) -> None:
    everything = search(tiny_copy, {**FIELDS, "search.early_stopping": 0.0})
    asked = sum(len(budgets) * count for budgets, count in scored)
    assert asked == 4 * 48
    assert all(row["questions"] == 48 and row["better"] is None for row in everything["subsets"])
    scored.clear()
    early = search(tiny_copy, FIELDS)
    assert early["viable"] == everything["viable"] == ["0b00", "0b10", "0b11"]
    before = {row["budget"]: row for row in everything["subsets"]}
    for row in early["subsets"]:
        if row["budget"] == "0b01":
            assert row["better"] == "0b10" and row["questions"] < 48 and row["questions"] % 8 == 0
        else:
            assert (
                row["better"] is None
                and row["questions"] == 48
                and row["accuracy"] == before[row["budget"]]["accuracy"]
            )
        assert row["decoder_gflops"] == pytest.approx(before[row["budget"]]["decoder_gflops"])
    stopped = next(row["questions"] for row in early["subsets"] if row["budget"] == "0b01")
    assert sum(len(budgets) * count for budgets, count in scored) == 3 * 48 + stopped
    table = (tiny_copy / "search" / "subsets.csv").read_text().splitlines()
    assert {"questions", "better"} <= set(table[0].split(",")) and len(table) == 5


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("chunk_number", [1, 7])
def test_a_killed_search_goes_on(
    tiny_copy: Path, scored: list[tuple[list[str], int]], monkeypatch: pytest.MonkeyPatch, chunk_number: int
) -> None:
    whole = search(tiny_copy, FIELDS)
    of_whole = scored.copy()
    assert len({tuple(budgets) for budgets, _ in of_whole}) == 2, "one subset was stopped on the way"
    scored.clear()

    def kill(name: str, number: int = 0) -> None:
        if name == "chunk" and number == chunk_number:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(scoring, "fault_point", kill)
        search(tiny_copy, FIELDS)
    assert scored == of_whole[: chunk_number + 1]
    assert search(tiny_copy, FIELDS) == whole
    assert scored == of_whole, "what was scored before is not scored again"


@pytest.mark.slow
def test_two_processes_stop_what_one_stops(tiny_copy: Path, compiled: str) -> None:
    start_again(tiny_copy, FIELDS)
    shutil.copytree(tiny_copy, tiny_copy.with_name("two"))
    found = []
    for name, count in (("run", 1), ("two", 2)):
        run = tiny_copy.with_name(name)
        with Processes(
            ["search", f"--workdir={run}"],
            count=count,
            environment=environment(compiled),
            program=[wanted_scores.__file__],
        ) as processes:
            ended = processes.wait(600)
        assert [process.status for process in ended] == [0] * count, ended
        found.append(read_json(run / "search" / "viable.json"))
    one, two = found
    assert one["viable"] == two["viable"] == ["0b00", "0b10", "0b11"]
    for row, other in zip(one["subsets"], two["subsets"], strict=True):
        assert (row["budget"] == "0b01") == (row["questions"] < 48)
        assert {**row, "loss": None} == {**other, "loss": None}
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("early_stopping", -0.1), ("early_stopping", 0.6), ("early_stopping", True), ("look_every", 0)],
)
def test_wrong_settings_are_refused(field: str, value: Callable[..., Any]) -> None:
    with pytest.raises(RequestError, match=rf"search\.{field}"):
        as_config(tiny_config({f"search.{field}": value}))
