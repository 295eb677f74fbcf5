"""Which records of a file a sampling strategy uses.

In: a strategy (`visor_jax.config.sampling`), a seed and the file's name. Out: a function from the number of records to
the indices that are used, ascending. A random subset is a pure function of (seed, name), so that neither other entries
of a mixture nor their order change it, and of two sizes the smaller one is part of the larger one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from visor_jax.config.sampling import parse_sampling
from visor_jax.data.draws import seed_sequence


@dataclass(frozen=True)
class Select:
    """Number of records -> the indices that `strategy` uses; `name` is that of the file or pattern."""

    strategy: str
    seed: int
    name: str

    def __call__(self, count: int) -> Sequence[int]:
        sampling = parse_sampling(self.strategy)
        size = sampling.size(count)
        if size == count:
            return range(count)
        if sampling.kind == "first":
            return range(size)
        if sampling.kind == "end":
            return range(count - size, count)
        key = int.from_bytes(hashlib.sha256(self.name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        # Sorts raw words instead of calling Generator.choice: NumPy keeps the raw words stable across versions.
        words = np.random.PCG64(seed_sequence("subset", self.seed, key)).random_raw(count)
        return np.sort(np.argsort(words, kind="stable")[:size]).tolist()
