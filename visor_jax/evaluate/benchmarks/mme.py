"""MME: two yes-or-no questions about each picture, in fourteen categories (Fu et al., 2023).

A category's score is the accuracy over its questions plus the accuracy over its pictures, both of whose answers must be
right ("accuracy plus"), in percent; at most 200. The scores of ten categories add up to "perception", at most 2000,
those of the other four to "cognition", at most 800.
"""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.evaluate.benchmarks.base import SHORT_ANSWER, Benchmark, Item, Line, Row, Unit, grouped, mean

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
OWN_SUFFIX = " Please answer yes or no."
QUESTIONS_PER_PICTURE = 2


def item(row: Row) -> Item:
    """Makes the question of a row; the suffix of short answers replaces its own."""
    reference, category = row["answer"].lower().strip().replace(".", ""), row["category"]
    if reference not in ("yes", "no"):
        raise ValueError(f"answer {row['answer']!r}; expected Yes or No")
    if category not in PERCEPTION + COGNITION:
        raise ValueError(f"category {category!r}; expected one of {', '.join(PERCEPTION + COGNITION)}")
    prompt = row["question"].strip().replace(OWN_SUFFIX, "") + SHORT_ANSWER
    return Item(row["question_id"], prompt, ["image"], reference, {"category": category})


def yes_or_no(answer: str) -> str:
    """Returns "yes" or "no" for an answer that is or begins with it; "" for any other."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "")
    return next((word for word in ("yes", "no") if word in text[:4]), "")


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer."""
    return {"accuracy": float(yes_or_no(answer) == item.reference)}


def category_score(lines: Sequence[Line]) -> float:
    """Returns accuracy plus "accuracy plus" of one category, a mean over its pictures, in percent.

    A picture without both of its questions, as a limit may leave one, cannot have both right.
    """
    return 200 * mean(picture_values(lines).values())


def picture_values(lines: Sequence[Line]) -> dict[str, float]:
    """Returns what each picture contributes to the score of its category, in [0, 1]: 1 with both answers right."""
    by_picture: dict[str, list[float]] = {}
    for line in lines:
        by_picture.setdefault(line["id"], []).append(line["scores"]["accuracy"])
    return {id: (mean(right) + float(sum(right) == QUESTIONS_PER_PICTURE)) / 2 for id, right in by_picture.items()}


def units(lines: Sequence[Line]) -> list[Unit]:
    """Returns a unit for each picture of the perception categories, grouped by category.

    A category that a limit has left out counts as 0, as in the sum.
    """
    parts = {name: part for name, part in grouped(lines, "category").items() if name in PERCEPTION}
    share = len(parts) / len(PERCEPTION)
    return [
        Unit(f"{name}/{id}", name, share * value)
        for name, part in parts.items()
        for id, value in picture_values(part).items()
    ]


def report(lines: Sequence[Line]) -> dict[str, float]:
    """Returns the two sums, and the score of each category."""
    scores = {category: category_score(part) for category, part in grouped(lines, "category").items()}
    perception = sum(scores.get(category, 0.0) for category in PERCEPTION)
    cognition = sum(scores.get(category, 0.0) for category in COGNITION)
    return {"mme_perception_score": perception, "mme_cognition_score": cognition, **scores}


BENCHMARKS = (
    Benchmark(
        name="mme",
        repo="lmms-lab-encoder/MME",
        split="test",
        files=("data/test-*.parquet",),
        columns={
            "question_id": "text",
            "question": "text",
            "answer": "text",
            "category": "text",
            "image": "picture",
        },
        level="easy",
        max_new_tokens=16,
        item=item,
        score=score,
        report=report,
        headline="mme_perception_score",
        headline_max=200.0 * len(PERCEPTION),
        units=units,
        questions_per_id=QUESTIONS_PER_PICTURE,
    ),
)
