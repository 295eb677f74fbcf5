"""MMStar: multiple-choice questions that cannot be answered without their picture (Chen et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.evaluate.benchmarks.base import (
    LETTER,
    Benchmark,
    Item,
    Line,
    Row,
    Unit,
    checked_letter,
    grouped,
    mean,
    only_score,
    scores_of,
)
from visor_jax.evaluate.benchmarks.choices import named_letter

OPTIONS = "ABCD"


def item(row: Row) -> Item:
    """Makes the question of a row, which holds its options; the suffix has no full stop."""
    facts = {"category": row["category"], "l2_category": row["l2_category"]}
    prompt = row["question"].strip() + LETTER.rstrip(".")
    return Item("", prompt, ["image"], checked_letter(row["answer"], OPTIONS), facts)


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer."""
    return {"accuracy": float(named_letter(answer, OPTIONS) == item.reference)}


def mean_of_kinds(lines: Sequence[Line]) -> float:
    """Returns the mean over the finer categories of the accuracy in each."""
    return mean(mean(scores_of(part, "accuracy")) for part in grouped(lines, "l2_category").values())


def report(lines: Sequence[Line]) -> dict[str, float]:
    """Returns the average over all finer categories, and over those of each of the six categories."""
    parts = {category: mean_of_kinds(part) for category, part in grouped(lines, "category").items()}
    return {"average": mean_of_kinds(lines), **parts}


def units(lines: Sequence[Line]) -> list[Unit]:
    """Returns a unit for each question, grouped by finer category."""
    return [Unit(str(line["row"]), line["facts"]["l2_category"], only_score(line)) for line in lines]


BENCHMARKS = (
    Benchmark(
        name="mmstar",
        repo="Lin-Chen/MMStar",
        split="val",
        files=("mmstar.parquet", "data/val-*.parquet"),
        columns={
            "question": "text",
            "answer": "text",
            "category": "text",
            "l2_category": "text",
            "image": "picture",
        },
        level="easy",
        max_new_tokens=128,
        item=item,
        score=score,
        report=report,
        headline="average",
        units=units,
    ),
)
