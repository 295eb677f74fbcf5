"""AI2D: multiple-choice questions about diagrams of school science (Kembhavi et al., 2016); the test split.

In the pictures of `ai2d` letters cover the labels that the options name; in those of `ai2d_no_mask` the labels show.
The two are different benchmarks, with about 10 points between them.
"""

from __future__ import annotations

from dataclasses import replace

from visor_jax.evaluate.benchmarks.base import LETTER, Benchmark, Item, Row, letter_of, means, options_text
from visor_jax.evaluate.metrics import multiple_choice


def item(row: Row) -> Item:
    """Makes the question of a row."""
    prompt = f"{row['question']}\n{options_text(row['options'])}{LETTER}"
    return Item("", prompt, ["image"], letter_of(row["answer"], row["options"]))


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer."""
    assert isinstance(item.reference, str)
    return {"exact_match": multiple_choice(answer, item.reference)}


WITH_MASK = Benchmark(
    name="ai2d",
    repo="lmms-lab-encoder/ai2d",
    split="test",
    files=("data/test-*.parquet",),
    columns={"question": "text", "options": "texts", "answer": "number", "image": "picture"},
    level="hard",
    max_new_tokens=16,
    item=item,
    score=score,
    report=means("exact_match"),
    headline="exact_match",
)
BENCHMARKS = (WITH_MASK, replace(WITH_MASK, name="ai2d_no_mask", repo="Efficient-Large-Model/ai2d-no-mask"))
