"""SEED-Bench: multiple-choice questions about pictures and, as several frames, about videos (Li et al., 2023)."""

from __future__ import annotations

from visor_jax.evaluate.benchmarks.base import (
    LETTER,
    LETTERS,
    Benchmark,
    Item,
    Row,
    accuracies,
    checked_letter,
    options_text,
)

CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def item(row: Row) -> Item:
    """Makes the question of a row."""
    prompt = f"{row['question']}\n{options_text([row[choice] for choice in CHOICES])}{LETTER}"
    reference = checked_letter(row["answer"], LETTERS[: len(CHOICES)])
    return Item("", prompt, ["image"], reference, {"data_type": row["data_type"]})


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer by its first character."""
    return {"accuracy": float(answer.strip()[:1].upper() == item.reference)}


BENCHMARKS = (
    Benchmark(
        name="seedbench",
        repo="lmms-lab-encoder/SEED-Bench",
        split="test",
        files=("data/test-*.parquet",),
        columns={
            "question": "text",
            **dict.fromkeys(CHOICES, "text"),
            "answer": "text",
            "data_type": "text",
            "image": "pictures",
        },
        level="easy",
        max_new_tokens=16,
        item=item,
        score=score,
        report=accuracies("seed_all", by="data_type", name="seed_{}"),
        headline="seed_all",
    ),
)
