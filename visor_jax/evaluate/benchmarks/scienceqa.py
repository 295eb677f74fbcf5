"""ScienceQA: multiple-choice questions of school science (Lu et al., 2022); those of the test split with a picture."""

from __future__ import annotations

from visor_jax.evaluate.benchmarks.base import LETTER, Benchmark, Item, Row, letter_of, means, options_text


def item(row: Row) -> Item:
    """Makes the question of a row, after its context if it has one."""
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    prompt = f"{context}{row['question']}\n{options_text(row['choices'])}{LETTER}"
    return Item("", prompt, ["image"], letter_of(row["answer"], row["choices"]))


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer: the letter alone, or at the beginning as a capital with a full stop."""
    text = answer.strip()
    chosen = text[0] if len(text) > 1 and text[0].isupper() and text[1] == "." else text
    return {"exact_match": float(chosen.upper() == item.reference)}


BENCHMARKS = (
    Benchmark(
        name="scienceqa",
        repo="lmms-lab-encoder/ScienceQA",
        split="test",
        files=("ScienceQA-IMG/test-*.parquet",),
        columns={"question": "text", "choices": "texts", "answer": "number", "hint": "text", "image": "picture"},
        level="easy",
        max_new_tokens=16,
        item=item,
        score=score,
        report=means("exact_match"),
        headline="exact_match",
        optional=("hint",),
    ),
)
