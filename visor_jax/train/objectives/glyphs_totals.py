"""The weights that the means in the loss of the stage "base" divide by, of a batch or of a part of one.

Each mean has weights of its own: patches with a glyph, patches with a relation, tokens before an answer. A batch that
is worked on in parts (`train.accumulate`) therefore hands each part the sums of weights of the whole batch.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from visor_jax.model.visor import Batch

TOTAL = "total/"  # prefix, in a part of a batch, of sums over the whole batch
Total = Float[Array, ""] | None
ROWS = "rows"  # metric: the number of grids of a batch
# Relations that a patch encodes, each with the names of its classes. Labels: int32 [B, P], 0 for "nothing", else 1 +
# index of the name.
RELATIONS = {"above": "digit", "two_above": "digit", "colour_above": "colour", "reached": "digit"}
ACCURACIES = ("named", "colour_named", "still_named", "still_colour_named", "words_kept", "asked", *RELATIONS)


def related_patches(
    labels: Int[Array, "B P"], counts: Float[Array, "B P"]
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Weights of the patches with a relation, and of those without one, where `counts` is not 0."""
    return (labels > 0) * counts, (labels == 0) * counts


def masked_mean(x: Shaped[Array, "..."], mask: Shaped[Array, "..."], total: Total = None) -> Float[Array, ""]:
    """The mean of `x` weighted by `mask`; 0 where the weights sum to 0.

    `total`: the sum of the weights, if it is not that of `mask`.
    """
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0) if total is None else jnp.sum(x * mask) / total


def whole_totals(batch: Batch, count: int) -> dict[str, Float[Array, ""]]:
    """The sums of weights that `base_loss` divides by, of a whole batch and divided by its number of parts.

    With them the mean of the parts' losses is the loss of the whole batch.
    """
    masks = {"glyph": batch["glyph"] > 0, "asked": batch["asked"] > 0, "targets": batch["reading_targets"][:, 1:]}
    for relation in RELATIONS:
        related, others = related_patches(batch[relation], relation_counts(batch, relation))
        masks |= {relation: related, f"{relation}/others": others}
    sums = {name: jnp.sum(mask.astype(jnp.float32)) for name, mask in masks.items()}
    return {f"{TOTAL}{name}": jnp.maximum(total, 1.0) / count for name, total in sums.items()}


def relation_counts(batch: Batch, relation: str) -> Float[Array, "B P"]:
    """1 at the patches that the loss of a relation counts: "reached" belongs to arrows only."""
    arrow = batch["arrow"].astype(jnp.float32)
    return arrow if relation == "reached" else jnp.ones_like(arrow)
