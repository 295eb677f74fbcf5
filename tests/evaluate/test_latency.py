"""Times of answers: what is asked, and figures that follow from the answers' own times."""

from __future__ import annotations

import pytest

from visor_jax.budget import Bits
from visor_jax.evaluate.latency import NEW_TOKENS, median_place, time_answers
from visor_jax.generate.answer import Answer


def answer(first: float, last: float, budget: str = "empty") -> Answer:
    return Answer("", budget, 0.0, first, last, 0, 0.0, complete=False, new_tokens=11, seconds_compiling=9.0)


def test_times_are_quartiles_without_the_warm_up() -> None:
    asked: list[Bits | None] = []

    def timed(bits: Bits | None, tokens: int) -> Answer:
        asked.append(bits)
        assert tokens == 11
        number = asked.count(bits) - 1  # 0: the warm-up
        return answer(100.0, 200.0, "full") if number == 0 else answer(float(number), number + 2.0)

    found = time_answers(timed, {"0b01": (False, True), "auto": None}, room=11, rounds=3)
    assert found["rounds"] == 3 and found["new_tokens"] == 11 and found["device"]
    for row in found["budgets"].values():
        assert row == {"route": "full", "seconds_to_first_token": [1.5, 2.0, 2.5], "tokens_per_second": [5.0] * 3}
    assert sorted(map(str, asked)) == ["(False, True)"] * 4 + ["None"] * 4


@pytest.mark.parametrize(("room", "tokens"), [(1, 1), (2, 2), (10**6, NEW_TOKENS)])
def test_tokens_fit_the_models_positions(room: int, tokens: int) -> None:
    found = time_answers(lambda _, count: answer(1.0, float(count)), {"full": (True,)}, room=room, rounds=1)
    assert found["new_tokens"] == tokens
    assert found["budgets"]["full"]["tokens_per_second"] == (None if tokens == 1 else [1.0] * 3)


def test_the_median_is_one_of_the_questions() -> None:
    assert [median_place(sizes) for sizes in ([7], [9, 3], [5, 9, 1], [4, 4, 4, 4])] == [0, 1, 0, 1]
