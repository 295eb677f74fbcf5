"""What an average sample takes, and how much of a batch is padding.

The sizes are those of LLaVA-OneVision's single-image mixture in `benchmarks/lengths.csv` under the AnyRes settings of
the shipped configurations; a test recomputes them. Packed and reduced visual tokens are a share of them. How many
samples a packed pool holds is counted: training's own packing (`visor_jax.data.packing`) fills pools with samples of
these sizes. No JAX import.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, replace

from visor_jax.architecture import Architecture, ReductionArchitecture
from visor_jax.config import Config, as_config, stage_config
from visor_jax.data.collate import RowShape
from visor_jax.data.packing import PoolShape, fill_pool
from visor_jax.data.scales import room_at_scale
from visor_jax.planning.samples import SAMPLES

WINDOW = 64  # more do not fill pools better: 256 did not in 1,000 pools
EPOCHS = 5  # of the samples that fill pools; in the first of them large ones still gather, and it does not count


@dataclass(frozen=True)
class Sizes:
    """Means over samples: tiles, visual positions v, text tokens t, (v + t)^2 / 2, t^2 / 2, t v."""

    tiles: float
    visual: float
    text: float
    joint_pairs: float
    text_pairs: float
    cross_pairs: float


MIXTURE = Sizes(6.2871, 3140.4, 286.84, 8_431_726, 87_235, 647_218)


@dataclass(frozen=True)
class Packed:
    """One step of a stage: capacity over all devices, the samples in it, and their sizes."""

    rows: int
    tiles: int
    visual: int
    text: int
    samples: float
    sizes: Sizes = MIXTURE

    def used(self, what: str) -> float:
        """Returns the share of "tiles", "visual" positions or "text" positions that is not padding."""
        return min(self.samples * getattr(self.sizes, what) / getattr(self, what), 1.0)


def with_visual_share(sizes: Sizes, share: float) -> Sizes:
    """Returns `sizes` with this share of the visual positions."""
    visual_pairs = sizes.joint_pairs - sizes.text_pairs - sizes.cross_pairs  # v^2 / 2
    return replace(
        sizes,
        visual=share * sizes.visual,
        joint_pairs=share**2 * visual_pairs + share * sizes.cross_pairs + sizes.text_pairs,
        cross_pairs=share * sizes.cross_pairs,
    )


def cut_to_row(sizes: Sizes, tiles: int, visual: int, text: int) -> Sizes:
    """Returns `sizes` with means no larger than those of samples that fill a row: small models have short rows."""
    return Sizes(
        min(sizes.tiles, tiles),
        min(sizes.visual, visual),
        min(sizes.text, text),
        min(sizes.joint_pairs, (visual + text) ** 2 / 2),
        min(sizes.text_pairs, text**2 / 2),
        min(sizes.cross_pairs, text * visual),
    )


def packed_step(config: Config, stage: str, sizes: Sizes = MIXTURE) -> Packed:
    """Returns the capacity of a stage's step, and the samples that it holds on average."""
    data, settings = config.data, stage_config(config, stage)
    rows = settings.batch_size
    packed = data.pack_window > 0 and settings.objective == "answer"
    tiles = rows // data.pool_rows * data.pool_tiles if packed else rows * data.tiles
    visual, text = rows * data.visual_length, rows * data.text_length
    model = as_config(config).model
    share = ReductionArchitecture(**vars(model.reduction)).share / model.anyres.packing
    sizes = with_visual_share(sizes, share)
    sizes = cut_to_row(sizes, data.pool_tiles if packed else data.tiles, data.visual_length, data.text_length)
    if not packed:
        return Packed(rows, tiles, visual, text, float(rows), sizes)
    shape = PoolShape(data.pool_rows, data.pool_tiles, data.visual_length, data.text_length)
    samples = rows / data.pool_rows * samples_of_pool(shape, data.pack_window, share)
    return Packed(rows, tiles, visual, text, samples, sizes)


def packed_at_scale(packed: Packed, visual_length: int, arch: Architecture, other: Architecture) -> Packed:
    """Returns `packed`, whose rows have `visual_length` visual positions, at a further scale of its architecture."""
    visual = packed.visual // visual_length * room_at_scale(visual_length, arch, other)
    share = other.reduction.share / arch.reduction.share
    return replace(packed, visual=visual, sizes=with_visual_share(packed.sizes, share))


@functools.lru_cache(maxsize=64)
def samples_of_pool(shape: PoolShape, window: int, share: float = 1.0) -> float:
    """Returns the mean number of samples in a pool that chooses among `window` waiting ones, of `WINDOW` at most.

    Of the samples' visual positions `share` are used. Samples that are larger than the pool are cut to it. Counted is
    what fills the visual positions: the samples that still wait at the end are larger than the average, so that those
    that were taken are not an average.
    """
    most = (shape.tiles, shape.visual, shape.text)
    sizes = [RowShape(*map(min, (tiles, math.ceil(share * visual), text), most)) for tiles, visual, text in SAMPLES]
    window, order = min(window, WINDOW), random.Random(0)
    stream = [size for _ in range(EPOCHS) for size in order.sample(sizes, len(sizes))]
    waiting: list[RowShape] = []
    filled: list[int] = []
    drawn = first = 0
    while drawn + window < len(stream):
        more = window - len(waiting)
        waiting += stream[drawn : drawn + more]
        drawn += more
        taken = {index for row in fill_pool(waiting, shape) for index in row}
        filled.append(sum(waiting[index].visual for index in taken))
        waiting = [size for index, size in enumerate(waiting) if index not in taken]
        first = len(filled) if drawn < len(sizes) else first
    return sum(filled[first:]) / len(filled[first:]) / (sum(size.visual for size in sizes) / len(sizes))
