"""Losses at every scale of "m3": the tower runs once, the decoder once per scale (Matryoshka's training).

In: parameters and a batch with the arrays of all scales (`visor_jax.data.scales`). Out: losses of every prediction at
each scale, and `loss/ratio=R` fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float

from visor_jax.architecture import Architecture
from visor_jax.data.row_shape import at_scale
from visor_jax.model.decoder import Budget
from visor_jax.model.layers import Params
from visor_jax.model.likelihood import answer_tokens
from visor_jax.model.remat import Remat
from visor_jax.model.visor import Batch, patch_tokens, stitched


def tokens_at_scales(
    params: Params, batch: Batch, budget: Budget, arch: Architecture, *, remat: Remat, tower_remat: Remat
) -> tuple[list[Float[Array, "B T"]], Bool[Array, "B T"], Float[Array, "B T"]]:
    """Losses of every prediction at `reduction.ratio` and at each further scale; correctness at that ratio; weights."""
    patches = patch_tokens(params, batch, arch, remat=tower_remat)
    of_scales = []
    for of_scale in (batch, *(batch_at_scale(batch, number) for number in range(len(arch.other_scales)))):
        visual = stitched(params, patches, of_scale)
        of_scales.append(answer_tokens(params, visual, of_scale, budget, arch, remat=remat))
    _, correct, weights = of_scales[0]
    return [losses for losses, _, _ in of_scales], correct, weights


def batch_at_scale(batch: Batch, number: int) -> dict[str, Any]:
    """The batch with the arrays of a further scale in place of those at `reduction.ratio`."""
    prefix = at_scale(number, "")
    return {**batch, **{name.removeprefix(prefix): x for name, x in batch.items() if name.startswith(prefix)}}


def fields_by_scale(arch: Architecture, metrics: Mapping[str, Any]) -> dict[str, float]:
    """`loss/ratio=R` of each scale, from the metrics of a step on the host; nothing with a single scale."""
    if not arch.other_scales:
        return {}
    ratios = [arch.reduction.ratio, *(other.reduction.ratio for other in arch.other_scales)]
    means = np.asarray(metrics["scale_sums"], np.float64) / max(float(metrics["target_tokens"]), 1.0)
    return {f"loss/ratio={ratio:g}": float(mean) for ratio, mean in zip(ratios, means, strict=True)}
