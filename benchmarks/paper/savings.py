"""Savings of decoder FLOPs at the paper's scale, by the formulas of `visor plan --image`; no run is needed.

In: a run and a budget. Out: how many times fewer FLOPs the decoder takes than the dense
one on all visual tokens, for a scanned page and the paper's number of text tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from visor_jax.config import architecture, load_config
from visor_jax.planning.picture import picture_costs

from .base import Cells
from .runs import BASES, RUNS

PAGE = (2200, 1700)  # height and width in pixels: 7,353 visual tokens; the paper's have 7,290
TEXT_TOKENS = 60
TWO_SLOTS = "0b11000000"  # the number of slots at which the paper's saving comes out
COMMAND = (
    "visor plan --config=configs/llava_ov_0p5b.py --image=1700x2200 --text-tokens=60"
    f" --config.model.cross.num_kv_heads={BASES['0.5B'].heads}"
)


@functools.cache
def saving(name: str, budget: str) -> float:
    """Returns the saving of a run of `runs.RUNS` under a budget; a dense one has "dense" and the reduction's name."""
    base, fields = RUNS[name].base, RUNS[name].fields
    overrides = [f"--config.{setting}" for setting in (f"model.cross.num_kv_heads={base.heads}", *fields)]
    costs = picture_costs(architecture(load_config(base.config, overrides)), PAGE, TEXT_TOKENS)["decoder_gflops"]
    reduced = [key for key in costs if key.startswith("dense, ")]
    return costs["dense"] / costs[reduced[0] if budget == "dense" and reduced else budget]


def savings(rows: Mapping[str, tuple[str, str]]) -> Callable[[], Cells]:
    """Returns the formula of a column "saving": row -> (run, budget)."""
    return lambda: {row: {"saving": saving(*of)} for row, of in rows.items()}
