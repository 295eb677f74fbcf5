"""Search: viable subsets among the evaluated ones, and the choice of subsets to evaluate if there are too many."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.__main__ import main
from visor_jax.adapt.search import Subset, explore, viable
from visor_jax.budget import Bits, all_subsets, parse_bits
from visor_jax.config import as_config
from visor_jax.errors import RequestError
from visor_jax.files.read_write import read_json, write_json
from visor_jax.testing import tiny_config
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import read_viable


@st.composite
def evaluated(draw: st.DrawFn) -> list[Subset]:
    """All subsets of some slots with random figures of few values, so that ties are common."""
    slots = draw(st.integers(1, 4))
    price = draw(st.lists(st.integers(1, 3), min_size=slots, max_size=slots))

    def subset(bits: Bits) -> Subset:
        accuracy, loss = draw(st.integers(0, 5)) / 5, draw(st.integers(0, 3)) / 3
        return Subset(bits, accuracy, loss, 10.0 + sum(p for p, on in zip(price, bits, strict=True) if on), {}, 9)

    return [subset(bits) for bits in all_subsets(slots)]


@given(evaluated())
def test_viable_holds_the_front_and_the_best_of_each_count(candidates: list[Subset]) -> None:
    remaining = viable(candidates)
    assert len({s.bits for s in remaining}) == len(remaining)
    assert {s.count for s in remaining} == {s.count for s in candidates}, (
        "every count, also the empty and the full budget"
    )
    for count in {s.count for s in candidates}:
        best = max(s.accuracy for s in candidates if s.count == count)
        assert any(s.count == count and s.accuracy == best for s in remaining)
    for subset in candidates:
        beaten = any(
            o.flops <= subset.flops
            and o.accuracy >= subset.accuracy
            and (o.flops, o.accuracy) != (subset.flops, subset.accuracy)
            for o in candidates
        )
        reached = any(o.flops <= subset.flops and o.accuracy >= subset.accuracy for o in remaining)
        assert reached, "no dropped subset beats all kept ones"
        if beaten and subset in remaining:
            assert subset.accuracy == max(s.accuracy for s in candidates if s.count == subset.count)


@given(evaluated())
def test_viable_is_sorted_by_cost_and_the_better_first_among_equal_cost(candidates: list[Subset]) -> None:
    remaining = viable(candidates)
    for before, after in itertools.pairwise(remaining):
        assert before.flops <= after.flops
        if before.flops == after.flops:
            assert (before.accuracy, -before.loss) >= (after.accuracy, -after.loss)


class Landscape:
    """Accuracy is the sum of the slots' values; records the requested subsets."""

    def __init__(self, worth: Sequence[float]) -> None:
        self.worth, self.requested = worth, list[Bits]()

    def __call__(self, subsets: Sequence[Bits]) -> list[Subset]:
        self.requested += subsets
        return [
            Subset(bits, sum(w for w, on in zip(self.worth, bits, strict=True) if on), 0.0, float(sum(bits)), {}, 9)
            for bits in subsets
        ]


def test_few_subsets_are_all_evaluated() -> None:
    landscape = Landscape([1, 2, 3])
    assert [s.bits for s in explore(landscape, 3, 8)] == all_subsets(3) == landscape.requested


@given(st.permutations(range(7)), st.integers(90, 120))
def test_best_first_finds_the_best_of_every_count_without_evaluating_all(worth: list[int], most: int) -> None:
    landscape = Landscape(worth)
    candidates = explore(landscape, 7, most)
    assert len(landscape.requested) == len(set(landscape.requested)) == len(candidates) <= most < 2**7
    assert {(False,) * 7, (True,) * 7} <= {s.bits for s in candidates}
    for count in range(8):
        assert max(s.accuracy for s in candidates if s.count == count) == sum(sorted(worth, reverse=True)[:count])


@given(st.integers(2, 12), st.integers(2, 40))
def test_the_limit_holds_whatever_it_is(slots: int, most: int) -> None:
    landscape = Landscape(range(slots))
    candidates = explore(landscape, slots, most)
    assert len(candidates) == len(set(landscape.requested)) == len(landscape.requested) <= most
    if most > slots:
        assert {s.count for s in candidates} == set(range(slots + 1)), "every count is evaluated"


@given(st.integers(1, 8), st.data())
def test_chosen_slots_restrict_the_search(slots: int, data: st.DataObject) -> None:
    """All subsets of the chosen slots and the full budget are evaluated, whatever the order of the slots."""
    chosen = data.draw(st.permutations(range(slots)))[: data.draw(st.integers(1, slots))]
    landscape = Landscape(range(slots))
    found = {s.bits for s in explore(landscape, slots, 2**8 + 1, chosen)}
    assert len(landscape.requested) == len(found)
    full = (True,) * slots
    assert found == {b for b in all_subsets(slots) if not any(b[s] for s in range(slots) if s not in chosen)} | {full}
    assert {s.count for s in viable(explore(Landscape(range(slots)), slots, 2**8 + 1, chosen))} >= {0, slots}


@given(st.permutations(range(7)), st.integers(16, 60))
def test_a_search_that_cannot_try_all_tries_promising_slots_first(worth: list[int], most: int) -> None:
    """With the right order, every count of a short search holds the best subset: the greedy one."""
    order = sorted(range(7), key=lambda slot: -worth[slot])
    landscape = Landscape(worth)
    candidates = explore(landscape, 7, most, order)
    assert len(landscape.requested) == len(set(landscape.requested)) <= most
    for count in range(8):
        assert max(s.accuracy for s in candidates if s.count == count) == sum(sorted(worth, reverse=True)[:count])


@given(st.permutations(range(9)), st.integers(2, 40))
def test_a_restricted_search_keeps_to_its_limit_and_its_slots(order: list[int], most: int) -> None:
    chosen, landscape = order[:6], Landscape(range(9))
    candidates = explore(landscape, 9, most, chosen)
    assert len(candidates) == len(set(landscape.requested)) == len(landscape.requested) <= most
    others = [s for s in range(9) if s not in chosen]
    assert all(not any(c.bits[s] for s in others) or all(c.bits) for c in candidates)


def test_slots_that_do_not_exist_are_refused() -> None:
    assert as_config(tiny_config({"search.slots": (1, 0)})).search.slots == (1, 0)
    for wrong in [(0, 0), (2,), (-1,)]:
        with pytest.raises(RequestError, match=r"search\.slots=.*expected different numbers from 0 to 1"):
            as_config(tiny_config({"search.slots": wrong}))


@pytest.mark.usefixtures("quick")
def test_a_search_of_some_slots(tiny_copy: Path) -> None:
    """Of a run that was started with the field; another run refuses it."""
    shutil.rmtree(tiny_copy / "search")
    assert main(["search", f"--workdir={tiny_copy}", "--config.search.slots=1"]) == 2
    record = read_json(tiny_copy / "config.json")
    record["config"]["search"]["slots"] = [1]
    write_json(tiny_copy / "config.json", record)
    assert main(["search", f"--workdir={tiny_copy}"]) == 0
    saved = read_json(tiny_copy / "search" / "viable.json")
    assert [row["budget"] for row in saved["subsets"]] == ["0b00", "0b01", "0b11"]
    assert saved["viable"] == ["0b00", "0b01", "0b11"]


def test_the_files_of_a_search(tiny_run: Path) -> None:
    saved = read_json(tiny_run / "search" / "viable.json")
    assert saved["num_slots"] == 2
    assert [row["budget"] for row in saved["subsets"]] == ["0b00", "0b01", "0b10", "0b11"]
    assert [row["name"] for row in saved["subsets"]] == ["empty", "0b01", "0b10", "full"]
    row = saved["subsets"][1]
    assert {"easy", "hard", "tasks", "decoder_gflops"} <= row.keys()
    assert 0 <= row["easy"] <= 1 and all(0 <= a <= 1 for a in row["tasks"].values())
    costs = {row["budget"]: row["decoder_gflops"] for row in saved["subsets"]}
    assert costs["0b00"] < costs["0b01"] == costs["0b10"] < costs["0b11"]
    assert saved["viable"][0] == "0b00" and saved["viable"][-1] == "0b11"
    assert sorted(map(costs.__getitem__, saved["viable"])) == list(map(costs.__getitem__, saved["viable"]))
    assert read_viable(Workdir(tiny_run)) == [parse_bits(name) for name in saved["viable"]]
    with (tiny_run / "search" / "subsets.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["budget"] for row in table] == [row["budget"] for row in saved["subsets"]]
    assert float(table[1]["paper"]) == row["tasks"]["paper"]


def test_a_missing_search_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="run the search first"):
        read_viable(Workdir(tmp_path))


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "viable.json").write_text('{"viable": [')
    with pytest.raises(RequestError, match=r"viable\.json.*not valid JSON"):
        read_viable(Workdir(tmp_path))


@pytest.mark.parametrize("viable", ["x", [], ["0b10", "0b1"], ["0b101"], [3], None])
def test_a_result_of_another_content_is_named(tmp_path: Path, viable: object) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "viable.json").write_text(json.dumps({"num_slots": 2, "viable": viable}))
    with pytest.raises(RequestError, match=r"viable\.json: viable=.*expected a list of budgets"):
        read_viable(Workdir(tmp_path))
