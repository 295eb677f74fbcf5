"""DocVQA: questions about scanned pages (Mathew et al., 2021); the validation split, whose answers are public."""

from __future__ import annotations

from visor_jax.evaluate.benchmarks.base import SHORT_ANSWER, Benchmark, Item, Row, means
from visor_jax.evaluate.metrics import anls


def item(row: Row) -> Item:
    """Makes the question of a row."""
    return Item(row["questionId"], row["question"] + SHORT_ANSWER, ["image"], row["answers"])


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer."""
    return {"anls": anls(answer, item.reference)}


BENCHMARKS = (
    Benchmark(
        name="docvqa",
        repo="lmms-lab-encoder/DocVQA",
        split="validation",
        files=("DocVQA/validation-*.parquet",),
        columns={"questionId": "text", "question": "text", "answers": "texts", "image": "picture"},
        level="hard",
        max_new_tokens=32,
        item=item,
        score=score,
        report=means("anls"),
        headline="anls",
        questions_per_id=1,
    ),
)
