"""V*: multiple-choice questions about small details of large photos (Wu and Xie, 2024)."""

from __future__ import annotations

import re

from visor_jax.evaluate.benchmarks.base import LETTER, Benchmark, Item, Row, accuracies, checked_letter, options_text

LETTERS = "ABCD"
OPTION = re.compile(r"\([A-D]\)\s*([^()]+?)(?=\s*\([A-D]\)|$)")
# Where an answer in capital letters names its option, the surest place first.
PLACES = (
    re.compile(r"^([A-D])"),
    re.compile(r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])"),
    re.compile(r"\(([A-D])\)"),
    re.compile(r"([A-D])\s*[.)\]]"),
    re.compile(r"(?:^|\s)([A-D])(?:\s|$)"),
)


def item(row: Row) -> Item:
    """Makes the question of a row; its options "(A) ..." become lines "A. ..."."""
    question = row["text"]
    if options := OPTION.findall(question)[: len(LETTERS)]:
        question = f"{question.partition('(A)')[0].strip()}\n{options_text([option.strip() for option in options])}"
    label = checked_letter(row["label"], LETTERS[: len(options) or None], "label")
    return Item("", question + LETTER, ["image"], label, {"category": row["category"]})


def named_option(answer: str) -> str:
    """Returns the letter that an answer names; "" if it names none.

    As lmms-eval defines it: an answer that begins with A, B, C or D names that option, even as the first letter of a
    word.
    """
    text = answer.strip().upper()
    for place in PLACES:
        if found := place.search(text):
            return found[1]
    letters = [letter for letter in text if letter in LETTERS]
    return letters[0] if len(letters) == 1 else ""


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer."""
    return {"accuracy": float(named_option(answer) == item.reference)}


BENCHMARKS = (
    Benchmark(
        name="vstar",
        repo="lmms-lab-encoder/vstar-bench",
        split="test",
        files=("data/test-*.parquet",),
        columns={"text": "text", "label": "text", "category": "text", "image": "picture"},
        level="hard",
        max_new_tokens=16,
        item=item,
        score=score,
        report=accuracies("overall_acc", by="category", name="{}_acc"),  # lmms-eval gives percent
        headline="overall_acc",
    ),
)
