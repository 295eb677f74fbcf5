"""InfographicVQA: questions about infographics (Mathew et al., 2022); the validation split, which has answers."""

from __future__ import annotations

from dataclasses import replace

from visor_jax.evaluate.benchmarks import docvqa

BENCHMARKS = tuple(
    replace(benchmark, name="infovqa", files=("InfographicVQA/validation-*.parquet",))
    for benchmark in docvqa.BENCHMARKS
)
