"""ShortV's layer contribution: how much an answer changes if one layer leaves the visual tokens as they are.

Definition of the authors' code (arXiv 2504.00502, icip-cas/ShortV, `--cal_lc`): the layer's text still reads V, its
visual tokens keep the values that they had before it; the contribution is KL(frozen || unchanged) of the distribution
of the first answer token. The same over all tokens of the answer is in a column of its own, because the first token of
a long answer says little.
"""

from __future__ import annotations

import numpy as np

from visor_jax.analysis.base import LayerAnalysis, Measures
from visor_jax.analysis.drawing import Curve, layer_curves
from visor_jax.analysis.passes import Probe


def measure(probe: Probe) -> Measures:
    """Returns both columns of a batch."""
    frozen = [probe.effect(frozen=[layer]) for layer in range(probe.num_layers)]
    return {
        "contribution": np.stack([effect.first_divergence for effect in frozen]),
        "answer_contribution": np.stack([effect.divergence for effect in frozen]),
    }


CURVES = [
    Curve("contribution", "Layer contribution (ShortV)", "KL divergence of the first token, nats"),
    Curve("answer_contribution", "The same over the answer", "KL divergence per token, nats"),
]
ANALYSIS = LayerAnalysis(
    name="contribution",
    columns={
        "contribution": "KL divergence of the first answer token if the layer leaves V as it is, nats",
        "answer_contribution": "the same, mean over the answer's tokens, nats",
    },
    measure=measure,
    draw=lambda table: layer_curves(table, CURVES),
)
