"""RealWorldQA: questions about scenes from vehicles and everyday life (xAI, 2024)."""

from __future__ import annotations

from visor_jax.evaluate.benchmarks.base import Benchmark, Item, Row, means
from visor_jax.evaluate.benchmarks.choices import named_letter

LETTERS = "ABCD"


def item(row: Row) -> Item:
    """Makes the question of a row, which ends with a suffix of its own."""
    return Item("", row["question"].strip(), ["image"], row["answer"].strip())


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer: the letter that it names, or for other references its text without case and full stop."""
    assert isinstance(item.reference, str)
    if item.reference.upper() in [*LETTERS]:
        return {"exact_match": float(named_letter(answer, LETTERS) == item.reference.upper())}
    return {"exact_match": float(answer.lower().strip().rstrip(".") == item.reference.lower())}


BENCHMARKS = (
    Benchmark(
        name="realworldqa",
        repo="lmms-lab-encoder/RealWorldQA",
        split="test",
        files=("data/test-*.parquet",),
        columns={"question": "text", "answer": "text", "image": "picture"},
        level="easy",
        max_new_tokens=16,
        item=item,
        score=score,
        report=means("exact_match"),
        headline="exact_match",
    ),
)
