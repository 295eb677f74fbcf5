"""What an average sample takes, and how much of a batch is padding.

The sizes are those of LLaVA-OneVision's single-image mixture in `benchmarks/lengths.csv` under the AnyRes settings of
the shipped configurations; a test recomputes them. A packed pool fills to `FILL` of the limit that binds first
(docs/packing.md measures 0.95 to 1.00). No JAX import.
"""

from __future__ import annotations

from dataclasses import dataclass

from visor_jax.config import Config, TrainConfig, stage_config

FILL = 0.97


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


def accumulated_parts(settings: TrainConfig) -> int:
    """Returns the number of parts that a stage's batch is split into; the objective "base" is not accumulated."""
    return 1 if settings.objective == "base" else settings.accumulate


def packed_step(config: Config, stage: str, sizes: Sizes = MIXTURE) -> Packed:
    """Returns the capacity of a stage's step, and the samples that it holds on average."""
    data, settings = config.data, stage_config(config, stage)
    rows = settings.batch_size
    packed = data.pack_window > 0 and settings.objective == "answer"
    tiles = rows // data.pool_rows * data.pool_tiles if packed else rows * data.tiles
    visual, text = rows * data.visual_length, rows * data.text_length
    sizes = cut_to_row(sizes, data.pool_tiles if packed else data.tiles, data.visual_length, data.text_length)
    limits = (tiles / sizes.tiles, visual / sizes.visual, text / sizes.text)
    return Packed(rows, tiles, visual, text, FILL * min(limits) if packed else float(rows), sizes)
