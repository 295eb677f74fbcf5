"""The table of public benchmarks: `--benchmark` names a row, or a file of the user's (docs/add_a_benchmark.md).

Adding one to the package is one file and one line here. In: a name or a file. Out: its `Benchmark`.
docs/benchmarks.md lists columns, prompts and metrics.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re

from visor_jax.config.config_file import refuse_unsafe, run_file
from visor_jax.data.source_kind import LEVELS
from visor_jax.errors import RequestError
from visor_jax.evaluate.benchmarks.base import Benchmark
from visor_jax.files.read_write import as_path

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


def is_file(name: str) -> bool:
    """Returns whether `--benchmark=name` means a Python file that defines benchmarks."""
    return name.endswith(".py")


def benchmarks_of(name: str, workdir: str = "") -> tuple[Benchmark, ...]:
    """Returns the benchmarks of a row of the table, or of a Python file, which is executed.

    Args:
      name: of a row, or the path of a file that defines `BENCHMARKS` as the modules of the table do.
      workdir: of the command; no file below it is executed.

    Raises:
      RequestError: the file cannot be executed, or defines no benchmarks that can be used.
    """
    if not is_file(name):
        return (named_benchmark(name),)
    where, file = f"--benchmark={name}", as_path(name)
    refuse_unsafe(file, name, workdir, "--benchmark")
    source = run_file(file, where, "BENCHMARKS")
    found = getattr(source, "BENCHMARKS", None)
    if not isinstance(found, tuple | list) or not found or not all(isinstance(one, Benchmark) for one in found):
        raise RequestError(f"{where}: expected BENCHMARKS = (Benchmark(...), ...), a tuple of one or more")
    names = [one.name for one in found]
    for one in names:
        if one in MODULES or names.count(one) > 1 or not re.fullmatch(r"[a-z0-9_]+", one):
            raise RequestError(
                f"{where}: a benchmark named {one!r}; expected a-z, 0-9 and _, a name that no other one has"
            )
    for one in found:
        if one.level not in LEVELS:
            raise RequestError(f"{where}: {one.name}: level={one.level!r}; expected one of {', '.join(LEVELS)}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return tuple(dataclasses.replace(one, source=digest, file=file.name) for one in found)
