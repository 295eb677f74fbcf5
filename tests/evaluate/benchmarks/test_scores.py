"""Scores and reported numbers of every benchmark, worked out by hand from the benchmarks' own definitions."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluate.benchmarks import hub_tables
from visor_jax.data.source_kind import LEVELS
from visor_jax.evaluate.benchmarks import MODULES, choices, mmbench, mme, mmmu, named_benchmark, vstar
from visor_jax.evaluate.benchmarks.base import Item, Line
from visor_jax.evaluate.metrics import normalize_vqa

NAMES = sorted(MODULES)
ANSWERS = st.one_of(
    st.text(max_size=30),
    st.text("ABCDE abc.,:()'\n0123%-", max_size=20),
    st.sampled_from(["yes", "No.", "A", "B. tree", "(C)", "the answer is D", "12%", "1e3", "None", "nan", "inf"]),
)


def scores(name: str, answer: str, reference: str | Sequence[str], **facts: Any) -> list[float]:
    return [*named_benchmark(name).score(answer, Item("", "", [], reference, facts)).values()]


def line(name: str, item: Item, answer: str, row: int = 0) -> Line:
    """Returns a prediction as it is written to a file and read again."""
    found = {
        "row": row,
        "id": item.id,
        "answer": answer,
        "reference": item.reference,
        "facts": dict(item.facts),
        "scores": named_benchmark(name).score(answer, item),
    }
    return json.loads(json.dumps(found))


def items_of(name: str, count: int) -> list[Item]:
    return [named_benchmark(name).item(row) for row in hub_tables.rows_of(name, count)]


def right_answer(item: Item) -> str:
    return item.reference if isinstance(item.reference, str) else item.reference[0]


# --- every benchmark --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_complete(name: str) -> None:
    benchmark = named_benchmark(name)
    assert benchmark.name == name and benchmark.level in LEVELS and benchmark.max_new_tokens > 0
    assert set(benchmark.columns) <= set(hub_tables.TABLES[name].columns)


@pytest.mark.parametrize("name", NAMES)
def test_references_are_right_and_reported_as_all(name: str) -> None:
    benchmark, items = named_benchmark(name), items_of(name, 12)
    right = [line(name, item, right_answer(item)) for item in items]
    if name != "textvqa":  # where people disagree, no answer is right to all
        assert all(value == 1 for one in right for value in one["scores"].values())
        assert benchmark.accuracy(benchmark.report(right)) == pytest.approx(0.2 if name == "mme" else 1)
    wrong = [line(name, item, "\u2603") for item in items]
    assert all(value == 0 for one in wrong for value in one["scores"].values())
    assert benchmark.accuracy(benchmark.report(wrong)) == 0


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_scores_are_fractions_of_any_answer(name: str, data: st.DataObject) -> None:
    items = items_of(name, 4)
    lines = [line(name, item, data.draw(ANSWERS)) for item in items]
    for one in lines:
        assert all(0 <= value <= 1 for value in one["scores"].values())
    benchmark = named_benchmark(name)
    reported = benchmark.report(lines)
    assert 0 <= benchmark.accuracy(reported) <= 1 + 1e-9 and all(value >= 0 for value in reported.values())


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_the_headline_is_the_mean_over_groups_of_units(name: str, data: st.DataObject) -> None:
    """Right, wrong and arbitrary answers; also of a part of the questions, as a limit leaves it."""
    benchmark, items, lines = named_benchmark(name), items_of(name, 12), []
    for row, item in enumerate(items[: data.draw(st.integers(1, 12))]):
        lines.append(line(name, item, data.draw(st.one_of(st.just(right_answer(item)), ANSWERS)), row))
    groups: dict[str, list[float]] = {}
    units = benchmark.units(lines)
    for unit in units:
        assert 0 <= unit.value <= 1
        groups.setdefault(unit.group, []).append(unit.value)
    means = [sum(values) / len(values) for values in groups.values()]
    assert benchmark.accuracy(benchmark.report(lines)) == pytest.approx(sum(means) / max(len(means), 1))
    assert len({(unit.group, unit.key) for unit in units}) == len(units), "keys name units"


@given(st.lists(st.sampled_from(["a", "The", "two", "RED", "cat.", "3.5", "1,000", "(left)", "none", "well-known"])))
def test_normalizing_twice_changes_nothing(words: list[str]) -> None:
    """Not for all texts: "whats" becomes "what's", and that "what 's", as EvalAI defines it."""
    once = normalize_vqa(" ".join(words))
    assert normalize_vqa(once) == once


@given(st.one_of(st.floats(-1e6, 1e6), ANSWERS))
def test_normalizing_a_number_twice_changes_nothing(value: float | str) -> None:
    once = mmmu.normalized(str(value))
    if len(once) == 1:
        assert str(mmmu.normalized(str(once[0]))) == str(once)


# --- single answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer", "reference", "score"),
    [
        ("docvqa", "12 march", ["12 March", "March 12"], 1.0),
        ("docvqa", "12 April", ["12 March"], 0.5),  # four of eight letters differ
        ("infovqa", "41%", ["42%"], 1 - 1 / 3),
        ("chartqa", "95", "100", 1.0),
        ("chartqa", "94.9", "100", 0.0),
        ("chartqa", "0.42", "42%", 1.0),
        ("chartqa", "0", "0", 1.0),
        ("chartqa", "0.0", "0", 0.0),  # a target of 0 is compared as text
        ("chartqa", "Blue", "blue", 1.0),
        ("textvqa", "Dakota", ["dakota"] * 10, 1.0),
        ("textvqa", "dakota", ["dakota"] * 2 + ["x"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("ai2d", "B. pupa", "B", 1.0),
        ("ai2d", "b", "B", 1.0),
        ("ai2d", "pupa", "B", 0.0),
        ("ai2d_no_mask", "(B)", "B", 1.0),
        ("gqa", "Yes.", "yes", 1.0),
        ("gqa", "yes, it is", "yes", 0.0),
        ("scienceqa", "b", "B", 1.0),
        ("scienceqa", "B. soft", "B", 1.0),
        ("scienceqa", "b. soft", "B", 0.0),  # only a capital letter names an option with more text
        ("scienceqa", "B soft", "B", 0.0),
        ("scienceqa", "", "B", 0.0),
        ("realworldqa", "The answer is B.", "B", 1.0),
        ("realworldqa", "a", "A", 0.0),  # letters are capital letters
        ("realworldqa", " downhill. ", "Downhill", 1.0),
        ("realworldqa", "0", "0", 1.0),
        ("mmstar", "C", "C", 1.0),
        ("mmstar", "(C) three", "C", 1.0),
        ("mmstar", "none", "C", 0.0),
        ("pope", " Yes ", "yes", 1.0),
        ("pope", "yes.", "yes", 0.0),
        ("mme", "Yes, there is.", "yes", 1.0),
        ("mme", "N", "no", 1.0),
        ("mme", "Not sure", "no", 1.0),  # the first four letters hold "no"
        ("mme", "maybe", "no", 0.0),
        ("seedbench", "A. One", "A", 1.0),
        ("seedbench", " apple", "A", 1.0),  # the first character alone counts
        ("seedbench", "The answer is A", "A", 0.0),
        ("seedbench", "", "A", 0.0),
        ("vstar", "B", "B", 1.0),
        ("vstar", "The answer is (B).", "B", 1.0),
        ("vstar", "", "B", 0.0),
    ],
)
def test_single_answers(name: str, answer: str, reference: str | list[str], score: float) -> None:
    assert scores(name, answer, reference) == [pytest.approx(score)]


@pytest.mark.parametrize(
    ("answer", "dataset", "right"),
    [("the centre", "IIIT5K", True), ("Cen tre", "IIIT5K", False), ("c e n t r e", "HME100k", False)],
)
def test_ocrbench(answer: str, dataset: str, right: bool) -> None:
    assert scores("ocrbench", answer, ["CENTRE"], dataset=dataset) == [float(right)]
    assert scores("ocrbench", "y = x^2+1", ["x ^ 2 + 1"], dataset="HME100k") == [1.0]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. tree", "B"),
        ("(B) or (C)", "C"),  # the last one with the same sign
        ("A or B", "A"),  # the beginning is a surer sign than the end
        ("The answer is C because it is red", "C"),
        ("I think it is D", "D"),
        ("Both B: and C.", "C"),
        ("Bee", "B"),  # no sign at all: a letter anywhere
        ("blue", ""),
        ("", ""),
        (" . ", ""),
        ("'C'", "C"),
        ("E", ""),
    ],
)
def test_named_letter(answer: str, letter: str) -> None:
    assert choices.named_letter(answer, "ABCD") == letter


@given(ANSWERS, st.integers(1, 6))
def test_named_letter_is_an_option_that_occurs(answer: str, count: int) -> None:
    letters = string.ascii_uppercase[:count]
    named = choices.named_letter(answer, letters)
    assert named == "" or (named in letters and named in answer)
    assert (named == "") == (not any(letter in answer for letter in letters))


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. green", "B"),
        ("(C)", "C"),
        ("A red square is here", "A"),  # not the article: the text "red" decides
        ("A green square is here", "B"),
        ("It is blue", "C"),
        ("It is blue or red", ""),  # two texts, no letter
        ("E", "E"),
        ("nothing", ""),
    ],
)
def test_mmbench_options(answer: str, letter: str) -> None:
    options = {"A": "red", "B": "green", "C": "blue", "D": "white"}
    assert mmbench.chosen_option(answer, options) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(A) and then (C)", "C"),
        ("B or C", "C"),
        ("A.;B.;x", "A"),  # of several with a full stop the first letter
        ("The result of the whole computation is $8", "C"),
        ("it is $8", ""),  # texts of options count in long answers only
        ("", ""),  # no draw at random
        ("42", ""),
    ],
)
def test_mmmu_options(answer: str, letter: str) -> None:
    assert mmmu.chosen_option(answer, ["$6", "$7", "$8"]) == letter


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("3.429", "3.43", True),  # after rounding to two decimals
        ("The answer is 24/7.", ["24/7", "3.429"], True),
        ("so the total is 1,200 dollars", "1200", True),
        ("x = 5", "5", True),
        ("x = 5\ny is 6", "6", True),
        ("x = 5\ny is 6", "5", False),  # "=" states a result in the last line only
        ("x = 5\nthen 6", "5", True),  # no line states a result: the whole answer counts
        ("1e3", "1000", True),
        ("Mitosis", "mitosis", True),
        ("Mitosis happens", "mitosis", False),  # "is " in the middle of a word states a result too
        ("cat", "a", False),  # a single letter must stand alone
        ("it is a", "a", True),
        ("a b", "a", True),
        ("", "5", False),
    ],
)
def test_mmmu_open_answers(answer: str, reference: str | list[str], right: bool) -> None:
    assert mmmu.holds_answer(answer, reference) == right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("(C) kevlar", "C"),
        ("Blue", "B"),  # the first letter of a word, as lmms-eval reads it
        ("It is option D", "D"),
        ("see [c]", "C"),
        ("his left hand (b)", "B"),
        ("kevlAr", "A"),  # the only such letter
        ("the fox", ""),
    ],
)
def test_vstar_letters(answer: str, letter: str) -> None:
    assert vstar.named_option(answer) == letter


@given(ANSWERS)
def test_mme_answers_are_yes_or_no_or_neither(answer: str) -> None:
    assert mme.yes_or_no(answer) in ("yes", "no", "")


# --- reported numbers -------------------------------------------------------------------------------------------------


def reported(name: str, items: Sequence[Item], answers: Sequence[str]) -> dict[str, float]:
    lines = [line(name, item, answer) for item, answer in zip(items, answers, strict=True)]
    return named_benchmark(name).report(lines)


def test_chartqa_reports_both_splits() -> None:
    expected = {"relaxed_overall": 0.5, "relaxed_human_split": 1.0, "relaxed_augmented_split": 0.0}
    assert reported("chartqa", items_of("chartqa", 4), ["0", "x", "20", "y"]) == expected


def test_ocrbench_adds_up_right_answers() -> None:
    result = reported("ocrbench", items_of("ocrbench", 3), ["centre", "x", "x^2+1"])
    assert result == {
        "ocrbench_accuracy": pytest.approx(2 / 3),
        "final_score": 2,
        "Regular Text Recognition": 0.5,
        "Handwritten Mathematical Expression Recognition": 1.0,
    }


def test_mme_sums_accuracy_and_accuracy_of_pictures() -> None:
    """Existence: one picture with both right (200); OCR: one of two right (50); code reasoning: none (0)."""
    items = items_of("mme", 6)
    result = reported("mme", items, ["yes", "no", "yes", "yes", "no", "yes"])
    expected = {"existence": 200.0, "OCR": 50.0, "code_reasoning": 0.0}
    assert result == {"mme_perception_score": 250.0, "mme_cognition_score": 0.0, **expected}
    assert named_benchmark("mme").accuracy(result) == 250 / 2000
    cut = reported("mme", items[:3], ["yes", "no", "yes"])
    assert cut["OCR"] == 100.0, "a picture with one question has accuracy 100 and no accuracy of pairs"


def test_mmstar_averages_finer_categories() -> None:
    items = items_of("mmstar", 6)  # B and D: geometry, statistics, geometry; the others: image emotion
    result = reported("mmstar", items, ["A", "B", "x", "x", "x", "x"])
    by_kind = {"image emotion": 1 / 3, "geometry": 1 / 2, "statistical reasoning": 0.0}
    assert result["average"] == pytest.approx(sum(by_kind.values()) / 3)
    assert result["math"] == pytest.approx((1 / 2 + 0) / 2) and result["coarse perception"] == pytest.approx(1 / 3)


def test_pope_by_category() -> None:
    result = reported("pope", items_of("pope", 6), ["yes", "yes", "no", "no", "?", "no"])
    assert result["accuracy"] == pytest.approx(3 / 6) and result["yes_ratio"] == pytest.approx(2 / 6)
    assert result["precision"] == pytest.approx(1 / 2) and result["recall"] == pytest.approx(1 / 2)
    assert result["adversarial_accuracy"] == 1.0 and result["adversarial_f1"] == 1.0


def test_mmbench_counts_a_question_if_all_rotations_are_right() -> None:
    items = items_of("mmbench", 4)
    answers = [right_answer(item) for item in items]
    result = reported("mmbench", items, [*answers[:3], "x"])
    assert result["accuracy"] == 0.5 and result["object_localization"] == 1.0
    assert result["attribute_recognition"] == 0.0 and result["finegrained_perception (instance-level)"] == 0.5
    assert reported("mmbench", items[:3], answers[:3])["accuracy"] == 1.0
    rotation = reported("mmbench", items[1:2], answers[1:2])
    assert rotation == {"accuracy": 0.0}, "a rotation without its question is no question"


def test_mmmu_by_domain() -> None:
    result = reported("mmmu", items_of("mmmu", 4), ["B", "3.43", "A", "no idea"])
    assert result == {"mmmu_acc": 0.5, "Business": 0.5, "Health and Medicine": 0.5}


def test_seedbench_and_vstar_by_kind() -> None:
    result = reported("seedbench", items_of("seedbench", 3), ["A", "B", "A"])
    assert result == {"seed_all": pytest.approx(2 / 3), "seed_image": 0.5, "seed_video": 1.0}
    result = reported("vstar", items_of("vstar", 2), ["B", "A"])
    assert result == {"overall_acc": 0.5, "direct_attributes_acc": 1.0, "relative_position_acc": 0.0}
