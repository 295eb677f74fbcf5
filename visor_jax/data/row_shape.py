"""The shape of a row, and of the arrays of a batch of such rows.

In: numbers of tiles, visual positions and text tokens, and an `Architecture`. Out: shapes and dtypes by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.data.anyres import most_visual_tokens
from visor_jax.data.candidates import candidate_arrays
from visor_jax.data.tiles import tile_shapes

TEXT_BUCKET = 8
VISUAL_BUCKET = 128  # a multiple of the attention kernels' blocks


@dataclass(frozen=True)
class RowShape:
    """Capacity of one row of a batch: tiles, visual positions (Nv) and text tokens (Nt)."""

    tiles: int
    visual: int
    text: int

    def holds(self, size: RowShape) -> bool:
        """Whether `size` is within all three limits."""
        return size.tiles <= self.tiles and size.visual <= self.visual and size.text <= self.text

    def __add__(self, other: RowShape) -> RowShape:
        return RowShape(self.tiles + other.tiles, self.visual + other.visual, self.text + other.text)

    def __str__(self) -> str:
        return f"{self.tiles} tiles, {self.visual} visual positions, {self.text} text tokens"


def batch_shapes(
    num_rows: int,
    num_pools: int,
    row_shape: RowShape,
    taps: int,
    architecture: Architecture,
    *,
    independent_turns: bool = False,
    scales: Sequence[tuple[int, int]] = (),
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Returns shape and dtype of every array of a batch; `taps` is the K of `visual_gather`.

    `scales`: visual positions and K at each further scale (`visor_jax.data.scales`).
    """
    of_tiles = tile_shapes(row_shape.tiles, architecture)
    visual, text = (num_rows, row_shape.visual), (num_rows, row_shape.text)
    candidates = (num_rows, architecture.reduction.candidates(row_shape.visual))
    return {
        **{name: ((num_pools, *shape), dtype) for name, (shape, dtype) in of_tiles.items()},
        "visual_gather": ((*candidates, taps), np.int32),
        "visual_weights": ((*candidates, taps), np.float32),
        **dict.fromkeys(candidate_arrays(architecture), (candidates, np.int32)),
        "visual_positions": (visual, np.int32),
        "visual_segments": (visual, np.int32),
        "text_tokens": (text, np.int32),
        "text_positions": (text, np.int32),
        "text_segments": (text, np.int32),
        "loss_mask": (text, np.bool_),
        "turn_index": (text, np.int32),
        **({"text_turns": (text, np.int32)} if independent_turns else {}),
        **{
            at_scale(number, name): array
            for number, (positions, of_scale) in enumerate(scales)
            for name, array in {
                "visual_gather": ((num_rows, positions, of_scale), np.int32),
                "visual_weights": ((num_rows, positions, of_scale), np.float32),
                "visual_positions": ((num_rows, positions), np.int32),
                "visual_segments": ((num_rows, positions), np.int32),
                "text_positions": (text, np.int32),
            }.items()
        },
    }


def question_visual_length(visual_length: int, arch: Architecture, num_images: int = 1) -> int:
    """Returns the visual positions of a row that holds one question about `num_images` pictures of any sizes.

    Args:
      visual_length: of the rows that the configuration sets, which is the most.
    """
    return min(visual_length, visual_bucket(most_visual_tokens(arch, max(num_images, 1))))


def visual_bucket(length: int) -> int:
    """Returns the visual positions of a batch whose questions have at most `length` of them."""
    return -(-length // VISUAL_BUCKET) * VISUAL_BUCKET


def text_bucket(length: int) -> int:
    """Returns the text length of a batch whose questions have at most `length` tokens."""
    return -(-length // TEXT_BUCKET) * TEXT_BUCKET


def at_scale(number: int, name: str) -> str:
    """Returns the name of the array of a batch that takes the place of `name` at a further scale."""
    return f"scale_{number}/{name}"
