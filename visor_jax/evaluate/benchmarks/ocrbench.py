"""OCRBench: a thousand questions about text in pictures of ten kinds (Liu et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.evaluate import metrics
from visor_jax.evaluate.benchmarks.base import Benchmark, Item, Line, Row, checked_parts, grouped, mean, scores_of


def item(row: Row) -> Item:
    """Makes the question of a row, without any suffix."""
    facts = {"dataset": row["dataset"], "question_type": row["question_type"]}
    return Item("", row["question"].strip(), ["image"], checked_parts(row["answer"]), facts)


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer: whether it contains one of the references."""
    return {"contains": metrics.ocrbench(answer, item.reference, dataset=item.facts["dataset"])}


def report(lines: Sequence[Line]) -> dict[str, float]:
    """Returns the accuracy, the final score (right answers; of all questions: of 1000), and the accuracy by type."""
    parts = {kind: mean(scores_of(part, "contains")) for kind, part in grouped(lines, "question_type").items()}
    right = scores_of(lines, "contains")
    return {"ocrbench_accuracy": mean(right), "final_score": sum(right), **parts}


BENCHMARKS = (
    Benchmark(
        name="ocrbench",
        repo="echo840/OCRBench",
        split="test",
        files=("data/test-*.parquet",),
        columns={
            "dataset": "text",
            "question": "text",
            "question_type": "text",
            "answer": "texts",
            "image": "picture",
        },
        level="hard",
        max_new_tokens=128,
        item=item,
        score=score,
        report=report,
        headline="ocrbench_accuracy",
    ),
)
