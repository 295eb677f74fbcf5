"""GQA: questions about the objects of photos and their relations (Hudson and Manning, 2019); balanced testdev."""

from __future__ import annotations

from visor_jax.evaluate.benchmarks.base import SHORT_ANSWER, Benchmark, Item, PictureTable, Row, means
from visor_jax.evaluate.metrics import exact_match


def item(row: Row) -> Item:
    """Makes the question of a row."""
    return Item(row["id"], row["question"] + SHORT_ANSWER, ["image"], row["answer"])


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer."""
    assert isinstance(item.reference, str)
    return {"exact_match": exact_match(answer, item.reference)}


BENCHMARKS = (
    Benchmark(
        name="gqa",
        repo="lmms-lab-encoder/GQA",
        split="testdev",
        files=("testdev_balanced_instructions/testdev-*.parquet",),
        columns={"id": "text", "imageId": "text", "question": "text", "answer": "text"},
        level="easy",
        max_new_tokens=16,
        item=item,
        score=score,
        report=means("exact_match"),
        headline="exact_match",
        questions_per_id=1,
        images=PictureTable(("testdev_balanced_images/testdev-*.parquet",), "id", "image", "imageId"),
    ),
)
