"""The phases of a training stream: which weights its parts have from which sample on.

In: `train.curriculum` of a stage and its parts. Out: `Phase`s, and `PhasedMixture`, which says for every position of
the stream (a count of samples) which part it comes from and which sample of that part it is. Both are pure functions
of the configuration, so a stage can resume at any step.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from visor_jax.config import TrainConfig
from visor_jax.config.checks import check_part_names
from visor_jax.data.sample import Part

if TYPE_CHECKING:
    import grain

FOREVER = 2**62  # larger lengths overflow inside Grain


@dataclass(frozen=True)
class Phase:
    """Weights that hold from one position of the stream on.

    Attributes:
      start: the first position.
      weights: of the parts, in their order; at least one is above 0.
    """

    start: int
    weights: tuple[float, ...]


def phases_of(settings: TrainConfig, parts: Sequence[Part], name: str = "train.curriculum") -> list[Phase]:
    """Returns the phases of a stage in which every step reads `settings.batch_size` samples.

    Before the first phase of the curriculum, and without one, the parts have their own weights.

    Args:
      name: of the field with the curriculum, for messages.

    Raises:
      RequestError: the curriculum names a part that does not exist.
    """
    check_part_names(name, settings.curriculum, [part.path for part in parts])
    phases = []
    if not settings.curriculum or settings.curriculum[0][0] > 0:
        phases.append(Phase(0, tuple(part.weight for part in parts)))
    for steps, weights in settings.curriculum:
        named = dict(weights)
        phases.append(Phase(steps * settings.batch_size, tuple(named.get(part.path, 0.0) for part in parts)))
    return phases


def phase_number(settings: TrainConfig, step: int) -> int:
    """Returns the number of the phase, from 1, that holds in a step, from 1; 0 without a curriculum.

    Steps before the first phase of the curriculum count as a phase too.
    """
    starts = [steps for steps, _ in settings.curriculum]
    if not starts:
        return 0
    return bisect.bisect_left(starts, step) + (starts[0] > 0)


class PhasedMixture:
    """Position in the stream -> (part, ordinal): the ordinal-th sample that the stream draws from that part.

    In each phase parts are chosen at fixed positions by weight (`grain.MapDataset.mix`). Ordinals of a part go on from
    phase to phase, so that generated parts repeat no sample and stored ones go on through their epochs.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        """
        Args:
          phases: at least one, the first of which starts at 0; starts increase.
        """
        self._starts = [phase.start for phase in phases]
        self._mixtures = [_mixture(phase.weights) for phase in phases]
        drawn = [0] * len(phases[0].weights)  # samples of each part before the phase
        self._drawn = [tuple(drawn)]
        for mixture, start, end in zip(self._mixtures, self._starts, self._starts[1:], strict=False):
            drawn = [before + count for before, count in zip(drawn, _counts(mixture, end - start, drawn), strict=True)]
            self._drawn.append(tuple(drawn))

    def __getitem__(self, position: int) -> tuple[int, int]:
        phase = bisect.bisect_right(self._starts, position) - 1
        pair = self._mixtures[phase][position - self._starts[phase]]
        assert pair is not None  # nothing was filtered out of the mixture
        part, ordinal = pair
        return part, self._drawn[phase][part] + ordinal


def _mixture(weights: Sequence[float]) -> grain.MapDataset[tuple[int, int]]:
    import grain  # imports JAX, which the command line loads late

    used = [part for part, weight in enumerate(weights) if weight]
    ordinals = [grain.MapDataset.range(FOREVER).map(functools.partial(_pair, part)) for part in used]
    return grain.MapDataset.mix(ordinals, weights=[weights[part] for part in used])


def _pair(part: int, ordinal: int) -> tuple[int, int]:
    return part, ordinal


def _counts(mixture: grain.MapDataset[tuple[int, int]], length: int, parts: Sequence[int]) -> list[int]:
    """Returns how many of the first `length` elements of a mixture come from each of the parts."""
    counts = [0] * len(parts)
    for position in range(length - 1, -1, -1):
        pair = mixture[position]
        assert pair is not None
        part, ordinal = pair
        counts[part] = counts[part] or ordinal + 1
        if sum(counts) == length:
            break
    return counts
