"""ChartQA: questions about charts (Masry et al., 2022), asked by people or made from summaries; the test split."""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.evaluate.benchmarks.base import Benchmark, Item, Line, Row, grouped, mean, scores_of
from visor_jax.evaluate.metrics import relaxed_accuracy

SUFFIX = "\nAnswer the question with a single word."
HUMAN, AUGMENTED = "human_test", "augmented_test"


def item(row: Row) -> Item:
    """Makes the question of a row."""
    if row["type"] not in (HUMAN, AUGMENTED):
        raise ValueError(f"type {row['type']!r}; expected {HUMAN} or {AUGMENTED}")
    return Item("", row["question"] + SUFFIX, ["image"], row["answer"], {"type": row["type"]})


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer."""
    assert isinstance(item.reference, str)
    return {"relaxed": relaxed_accuracy(answer, item.reference)}


def report(lines: Sequence[Line]) -> dict[str, float]:
    """Returns the relaxed accuracy over all questions, and over those of people and the augmented ones."""
    names = {HUMAN: "relaxed_human_split", AUGMENTED: "relaxed_augmented_split"}
    parts = {names[kind]: mean(scores_of(part, "relaxed")) for kind, part in grouped(lines, "type").items()}
    return {"relaxed_overall": mean(scores_of(lines, "relaxed")), **parts}


BENCHMARKS = (
    Benchmark(
        name="chartqa",
        repo="lmms-lab-encoder/ChartQA",
        split="test",
        files=("data/test-*.parquet",),
        columns={"type": "text", "question": "text", "answer": "text", "image": "picture"},
        level="hard",
        max_new_tokens=16,
        item=item,
        score=score,
        report=report,
        headline="relaxed_overall",
    ),
)
