"""Goodput: seconds are counted once and add up over restarts."""

from __future__ import annotations

import pytest

from visor_jax.files.read_write import read_json
from visor_jax.workdir.goodput import Goodput


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("visor_jax.workdir.goodput.time.perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_inner_blocks_are_taken_off_the_outer_one(tmp_path, clock):
    goodput = Goodput(tmp_path / "goodput.json")
    with goodput.time("eval"):
        clock(1)
        with goodput.time("compile"):
            clock(5)
        clock(2)
    assert goodput.seconds == {"eval": 3, "compile": 5}


def test_waiting_for_data_is_told_from_using_it(tmp_path, clock):
    def slow():
        for item in range(3):
            clock(2)
            yield item
        clock(1)

    goodput = Goodput(tmp_path / "goodput.json")
    items = []
    for item in goodput.waits("data_wait", slow()):
        items.append(item)
        clock(10)
    assert (items, goodput.seconds) == ([0, 1, 2], {"data_wait": 7})


def test_seconds_add_up_over_restarts_and_survive_a_damaged_file(tmp_path, clock):
    path = tmp_path / "goodput.json"
    for _ in range(2):
        goodput = Goodput(path)
        with goodput.time("step"):
            clock(1.5)
        goodput.add("lost", 1)
        goodput.write()
    assert read_json(path) == {"lost": 2, "step": 3}
    path.write_text("{")
    assert Goodput(path).seconds == {}


def test_an_error_is_counted_and_passed_on(tmp_path, clock):
    goodput = Goodput(tmp_path / "goodput.json")
    with pytest.raises(KeyError), goodput.time("step"):
        clock(1)
        raise KeyError
    assert goodput.seconds == {"step": 1}
