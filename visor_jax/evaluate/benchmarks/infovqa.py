"""InfographicVQA: questions about infographics (Mathew et al., 2022); the validation split, which has answers."""

from __future__ import annotations

from visor_jax.evaluate.benchmarks.base import Benchmark, means
from visor_jax.evaluate.benchmarks.docvqa import item, score

BENCHMARKS = (
    Benchmark(
        name="infovqa",
        repo="lmms-lab-encoder/DocVQA",
        split="validation",
        files=("InfographicVQA/validation-*.parquet",),
        columns={"questionId": "text", "question": "text", "answers": "texts", "image": "picture"},
        level="hard",
        max_new_tokens=32,
        item=item,
        score=score,
        report=means("anls"),
        headline="anls",
    ),
)
