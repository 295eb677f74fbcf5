"""The benchmarks' metrics equal their definitions, computed by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.evaluate.metrics import (
    anls,
    multiple_choice,
    normalize_vqa,
    ocrbench,
    pope,
    relaxed_accuracy,
    vqa_accuracy,
)

TEXT = st.text(max_size=30)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Paris", ["paris"], 1.0),
        ("  new   york\n", ["New York"], 1.0),
        ("kitten", ["sitten"], 1 - 1 / 6),
        ("abcd", ["abxx"], 0.5),  # exactly at the threshold counts
        ("abcd", ["axxx"], 0.0),
        ("1,234", ["1234", "12"], 0.8),  # the best reference
        ("", ["x"], 0.0),
        ("", [""], 1.0),
        (" " * 32, ["7"], 0.0),
        ("\n 7" + " " * 32, ["8"], 0.0),
        ("ab   c", ["ab d"], 1 - 1 / 6),  # the distance ignores runs of spaces, the length does not
        ("Straße", "strasse", 1 - 2 / 7),  # a single reference may be a string; "ß" counts as two
    ],
)
def test_anls(prediction: str, answers: list[str] | str, score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=4), TEXT)
def test_anls_is_a_similarity(prediction: str, answers: list[str], other: str) -> None:
    score = anls(prediction, answers)
    assert score == 0 or 0.5 <= score <= 1
    assert anls(prediction, [*answers, prediction]) == 1
    assert anls(prediction, [*answers, other]) >= score


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("105", "100", True),
        ("95.0", "100", True),
        ("105.01", "100", False),
        ("-104", "-100", True),
        ("104", "-100", False),
        ("12%", "0.12", True),
        ("12%", "12", False),
        ("1e2", "100", True),
        ("0", "0", True),
        ("0.0", "0", False),  # a reference of 0 is compared as text
        ("0", "0.0001", False),
        ("Blue", "blue", True),
        ("blue ", "blue\n", True),
        ("ten", "10", False),
        ("1,000", "1000", False),
        ("%", "%", True),
        ("", "", True),
        ("nan", "5", False),
    ],
)
def test_relaxed_accuracy(prediction: str, answer: str, right: bool) -> None:
    assert relaxed_accuracy(prediction, answer) == float(right)


@given(st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-3), st.floats(-0.049, 0.049))
def test_relaxed_accuracy_forgives_five_percent(value: float, error: float) -> None:
    assert relaxed_accuracy(repr(value * (1 + error)), repr(value)) == 1
    assert relaxed_accuracy(repr(value * 1.06), repr(value)) == 0


@pytest.mark.parametrize(
    ("agreeing", "score"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_leaves_out_each_annotator(agreeing: int, score: float) -> None:
    # With k of ten agreeing: k times min(1, (k - 1) / 3) and 10 - k times min(1, k / 3), over ten.
    answers = ["A cat."] * agreeing + ["dog"] * (10 - agreeing)
    assert vqa_accuracy("cat", answers) == pytest.approx(score)


def test_vqa_accuracy_needs_annotators() -> None:
    assert vqa_accuracy("cat", ["cat"]) == 0  # no other answer to agree with
    with pytest.raises(TypeError):
        vqa_accuracy("cat", "cat")
    with pytest.raises(ValueError, match="no reference answer"):
        vqa_accuracy("cat", [])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two  DOGS", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("shouldnt've", "shouldn't've"),
        ("shouldn'tve", "shouldn't've"),
        ("yall'll", "y'all'll"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("the dog's bone", "dog 's bone"),
        ("3.5", "3.5"),
        ("end.", "end"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("well-known", "well known"),
        ("(left)", "left"),
        ("what?", "what"),
        ("a\nb\tan", "b"),
        ("", ""),
    ],
)
def test_evalai_normalization(text: str, normal: str) -> None:
    assert normalize_vqa(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "dataset", "right"),
    [
        ("The sign says STOP here", ["stop"], "", True),
        ("st op", ["stop"], "", False),
        ("first\nsecond", ["first second"], "", True),
        ("\uff21\uff22\u3000\uff11", ["ab 1"], "", True),  # full-width letters, space and digit
        ("abc", ["x", "b"], "", True),
        ("abc", "bc", "", True),
        ("x ^ 2 + Y", ["x^2+Y"], "HME100k", True),
        ("x ^ 2 + y", ["x^2+Y"], "HME100k", False),
        ("x ^ 2 + y", ["x^2+y"], "", False),
    ],
)
def test_ocrbench(prediction: str, answers: list[str] | str, dataset: str, right: bool) -> None:
    assert ocrbench(prediction, answers, dataset=dataset) == float(right)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("B", "B", True),
        ("b", "B", True),
        ("B.", "B", True),
        ("(B)", "B", True),
        ("  B. a tree", "B", True),
        ("B a tree", "B", False),
        ("A. B", "B", False),
        ("the answer is B", "B", False),
        ("b. a tree", "B", False),  # only capital letters name an option
        ("", "B", False),
    ],
)
def test_multiple_choice(prediction: str, answer: str, right: bool) -> None:
    assert multiple_choice(prediction, answer) == float(right)


def test_pope() -> None:
    predictions = ["yes", "Yes ", "no", "NO", "yes", "maybe"]
    wanted = ["yes", "no", "no", "yes", "Yes", "yes"]
    # Hits 2, false alarms 1, misses 1; "maybe" is wrong, but is not "no".
    assert pope(predictions, wanted) == pytest.approx(
        {"accuracy": 3 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 6}
    )
    assert pope(["no", "yes."], ["no", "no"]) == pytest.approx(
        {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}
    )


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", "?"]), st.sampled_from(["yes", "no"])), min_size=1))
def test_pope_stays_in_bounds(pairs: list[tuple[str, str]]) -> None:
    predictions, wanted = zip(*pairs, strict=True)
    scores = pope(predictions, wanted)
    assert all(0 <= value <= 1 for value in scores.values())
    assert min(scores["precision"], scores["recall"]) <= scores["f1"] + 1e-9
    assert scores["f1"] <= max(scores["precision"], scores["recall"]) + 1e-9


@pytest.mark.parametrize(
    ("predictions", "wanted", "message"),
    [
        (["yes"], [], "1 predictions for 0"),
        ([], [], "at least one"),
        (["yes"], ["maybe"], "'maybe'; expected yes or no"),
    ],
)
def test_pope_refuses_what_it_cannot_score(predictions: list[str], wanted: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pope(predictions, wanted)


@pytest.mark.parametrize("metric", [anls, ocrbench])
def test_no_reference_is_a_mistake(metric) -> None:
    with pytest.raises(ValueError, match="no reference answer"):
        metric("x", [])
