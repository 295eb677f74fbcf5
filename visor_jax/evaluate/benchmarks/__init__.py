"""The table of public benchmarks: `--benchmark` names a row. Adding one is one file and one line here.

In: a name. Out: its `Benchmark`. docs/benchmarks.md lists columns, prompts and metrics.
"""

from __future__ import annotations

import importlib

from visor_jax.evaluate.benchmarks.base import Benchmark

# name -> the module beside this one whose `BENCHMARKS` has it; imported on first use
MODULES: dict[str, str] = {
    "docvqa": "docvqa",
    "infovqa": "infovqa",
    "chartqa": "chartqa",
    "textvqa": "textvqa",
    "ocrbench": "ocrbench",
    "ai2d": "ai2d",
    "ai2d_no_mask": "ai2d",
    "vstar": "vstar",
    "mme": "mme",
    "mmstar": "mmstar",
    "pope": "pope",
    "gqa": "gqa",
    "scienceqa": "scienceqa",
    "realworldqa": "realworldqa",
    "mmbench": "mmbench",
    "mmmu": "mmmu",
    "seedbench": "seedbench",
}


def named_benchmark(name: str) -> Benchmark:
    """Returns the benchmark of one row of the table."""
    module = importlib.import_module(f"visor_jax.evaluate.benchmarks.{MODULES[name]}")
    return next(benchmark for benchmark in module.BENCHMARKS if benchmark.name == name)
