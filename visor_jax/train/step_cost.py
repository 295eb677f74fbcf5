"""What the samples of a step contain and cost: counts of tokens and tiles, and the FLOPs that a training step needs.

In: the contents of a batch and a budget. Out: sums over its samples. Padding is not counted, nor are activations that
remat computes again. `docs/metrics.md` has the formula.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits
from visor_jax.cost import decoder_flops, reduction_flops, route_flops, visual_flops
from visor_jax.data.collate import Content
from visor_jax.train.update import State

TOWER = ("vision", "connector", "image_newline")  # the parameters that make visual tokens


def in_decoder(path: str) -> bool:
    """Whether a parameter belongs to the decoder's layers."""
    return path.split("/")[0] not in (*TOWER, "embed_tokens", "routing")


class Work(NamedTuple):
    """Sums over the samples of a step."""

    samples: float
    text_tokens: float
    visual_tokens: float
    tiles: float
    teraflops: float  # 10^12 FLOPs of the whole step


@dataclass(frozen=True)
class StepCost:
    """The FLOPs of a training step on one sample.

    Attributes:
      arch: of the stage.
      passes_tower: how often the vision tower's FLOPs count; 1: forward only, 3: with both gradients.
      passes_decoder: the same of the decoder. Between 2 and 3 if some of its parameters are frozen.
      objective: of the stage; "policy" reads the layers before the first slot only.
    """

    arch: Architecture
    passes_tower: float
    passes_decoder: float
    objective: str = "answer"

    @classmethod
    def of(cls, arch: Architecture, state: State, objective: str) -> StepCost:
        """Returns the cost of a stage that starts from `state`, whose trainable parameters say what is frozen."""
        tower = any(path.split("/")[0] in TOWER for path in state.trainable)
        sizes = {path: x.size for path, x in (state.trainable | state.frozen).items() if in_decoder(path)}
        trained = sum(size for path, size in sizes.items() if path in state.trainable)
        return cls(arch.in_training, 3.0 if tower else 1.0, 2.0 + trained / max(sum(sizes.values()), 1), objective)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one per stage, and the process ends with its stages
    def flops(self, bits: Bits, tiles: int, visual: int, text: int, scales: tuple[int, ...] = ()) -> float:
        """Returns the useful FLOPs of one sample under a budget; `scales`: visual tokens at each further scale."""
        choosing = reduction_flops(self.arch, tiles, visual)  # has no gradient
        tower = self.passes_tower * (visual_flops(self.arch, tiles, visual) - choosing) + choosing
        if self.objective == "policy":
            return tower + self.passes_decoder * route_flops(self.arch, visual, text)
        decoder = sum(decoder_flops(self.arch, bits, n, text, num_logits=text) for n in (visual, *scales))
        return tower + self.passes_decoder * decoder

    def work(self, contents: Sequence[Sequence[Content]], bits: Bits) -> Work:
        """Returns the sums over the samples of a step."""
        samples = [sample for row in contents for sample in row]
        flops = sum(self.flops(bits, x.tiles, x.visual, x.text, tuple(x.scales)) for x in samples)
        text, visual, tiles = (float(sum(getattr(x, name) for x in samples)) for name in ("text", "visual", "tiles"))
        return Work(float(len(samples)), text, visual, tiles, flops / 1e12)
