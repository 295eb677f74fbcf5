"""Orders the optional slots of an adaptive model by what their layers do in the dense model that it starts from.

A slot lets its layer refine visual tokens. What that is worth in the dense model is ShortV's layer contribution; where
that was not measured, the rise of the loss if the layer's text sees no picture. `search.slots` takes the order
(docs/analyze.md).
"""

from __future__ import annotations

from visor_jax.analysis.base import LayerTable, Row
from visor_jax.architecture import Architecture
from visor_jax.budget import Plan

WORTH = ("contribution", "loss_increase")  # the first that was measured decides


def slot_rows(table: LayerTable, arch: Architecture) -> list[Row]:
    """Returns one row per slot, the most promising first; none if the plan has no slots or neither was measured.

    Args:
      table: of a dense model.
      arch: of the adaptive model, with as many layers.
    """
    means = {column: table.mean(column) for column in WORTH if column in table.measures}
    if not means or not arch.num_slots:
        return []
    layers = Plan.of(arch).slots
    worth = next(iter(means.values()))
    order = sorted(range(len(layers)), key=lambda slot: (-worth[layers[slot]], slot))
    return [
        {
            "rank": rank,
            "slot": slot,
            "layer": layers[slot],
            **{column: float(values[layers[slot]]) for column, values in means.items()},
        }
        for rank, slot in enumerate(order)
    ]
