"""POPE: whether an object is in a photo, with three ways to choose absent objects (Li et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.evaluate import metrics
from visor_jax.evaluate.benchmarks.base import SHORT_ANSWER, Benchmark, Item, Line, Row, grouped


def item(row: Row) -> Item:
    """Makes the question of a row."""
    reference = row["answer"].lower().strip()
    if reference not in ("yes", "no"):
        raise ValueError(f"answer {row['answer']!r}; expected yes or no")
    return Item("", row["question"].strip() + SHORT_ANSWER, ["image"], reference, {"category": row["category"]})


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer: whether it is the right word and nothing else."""
    return {"accuracy": float(answer.lower().strip() == item.reference)}


def measured(lines: Sequence[Line]) -> dict[str, float]:
    """Returns accuracy, precision, recall, F1 and the fraction of answers that are yes."""
    return metrics.pope([line["answer"] for line in lines], [line["reference"] for line in lines])


def report(lines: Sequence[Line]) -> dict[str, float]:
    """Returns the metrics over all questions, and accuracy and F1 of each category."""
    parts = {
        f"{category}_{metric}": value
        for category, part in grouped(lines, "category").items()
        for metric, value in measured(part).items()
        if metric in ("accuracy", "f1")
    }
    return {**measured(lines), **parts}


BENCHMARKS = (
    Benchmark(
        name="pope",
        repo="lmms-lab-encoder/POPE",
        split="test",
        files=("data/test-*.parquet",),
        columns={"question": "text", "answer": "text", "category": "text", "image": "picture"},
        level="easy",
        max_new_tokens=128,
        item=item,
        score=score,
        report=report,
        headline="accuracy",
    ),
)
