"""TextVQA: questions about text in photos, answered by ten people each (Singh et al., 2019); the validation split."""

from __future__ import annotations

from visor_jax.evaluate.benchmarks.base import SHORT_ANSWER, Benchmark, Item, Row, means
from visor_jax.evaluate.metrics import vqa_accuracy


def item(row: Row) -> Item:
    """Makes the question of a row: its first letter large, all others small."""
    return Item(str(row["question_id"]), row["question"].capitalize() + SHORT_ANSWER, ["image"], row["answers"])


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer by the people who gave it, after EvalAI's normalization."""
    return {"exact_match": vqa_accuracy(answer, item.reference)}


BENCHMARKS = (
    Benchmark(
        name="textvqa",
        repo="lmms-lab-encoder/textvqa",
        split="validation",
        files=("data/validation-*.parquet",),
        columns={"question_id": "number", "question": "text", "answers": "texts", "image": "picture"},
        level="hard",
        max_new_tokens=32,
        item=item,
        score=score,
        report=means("exact_match"),
        headline="exact_match",
        questions_per_id=1,
    ),
)
