"""Buckets of shapes that generation is compiled for, and the grouping of questions into batches.

A prompt's numbers of tiles, visual positions and text tokens are rounded up to a bucket. Consecutive buckets differ by
at most a quarter (visual positions by an eighth, except for the smallest), so that padding stays small and questions of
different lengths share compiled programs.
"""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.data.collate import RowShape

MAX_ROWS = 8  # of a batch of questions
TILES = (1, 2, 3, 5, 7, 10, 13, 17, 21, 26, 31, 37)  # 1 + rows * columns of AnyRes, thinned out; 37 is its largest
LARGEST_PICTURE = 8832  # visual positions: the largest AnyRes picture has 8,765
MIN_VISUAL, MIN_TEXT, MIN_CAPACITY = 8, 32, 64


def bucket(size: int, unit: int) -> int:
    """Rounds `size` up to a multiple of `unit` up to 16 of them; beyond that, to one of eight steps per doubling."""
    step = unit
    while size > 16 * step:
        step *= 2
    return max(-(-size // step), 1) * step


def row_bucket(size: RowShape) -> RowShape:
    """Returns the bucket that holds one prompt."""
    tiles = next((count for count in TILES if size.tiles <= count), bucket(size.tiles, 8))
    visual = bucket(size.visual, MIN_VISUAL)
    if size.visual <= LARGEST_PICTURE < visual:
        visual = LARGEST_PICTURE
    return RowShape(tiles, visual, bucket(size.text, MIN_TEXT))


def cache_bucket(tokens: int) -> int:
    """Returns the capacity of a text cache for this many tokens, a power of two; a full cache doubles."""
    return max(MIN_CAPACITY, 1 << (tokens - 1).bit_length())


def batch_bucket(count: int) -> int:
    """Returns the number of rows of a batch for this many questions, a power of two."""
    return 1 << (count - 1).bit_length()


def joined(row_shapes: Sequence[RowShape]) -> RowShape:
    """Returns the smallest row shape that holds all of these."""
    return RowShape(
        *(max(getattr(row_shape, name) for row_shape in row_shapes) for name in ("tiles", "visual", "text"))
    )


def batches(row_shapes: Sequence[RowShape]) -> list[list[int]]:
    """Groups prompts, by index, into batches of at most `MAX_ROWS` prompts of similar size.

    The cost of self-attention grows with the square of its tokens, so a row is never widened to more than twice its
    visual positions or text tokens, except in the smallest buckets.
    """
    order = sorted(range(len(row_shapes)), key=lambda i: (row_shapes[i].visual, row_shapes[i].text), reverse=True)
    groups: list[list[int]] = []
    for index in order:
        group = groups[-1] if groups else []
        together = joined([row_shapes[i] for i in (*group, index)])
        if 0 < len(group) < MAX_ROWS and all(_is_near(row_shapes[i], together) for i in (*group, index)):
            group.append(index)
        else:
            groups.append([index])
    return groups


def _is_near(prompt: RowShape, shared: RowShape) -> bool:
    """Returns whether the shared row shape is at most twice as wide as the prompt's."""
    visual, text = 2 * max(prompt.visual, 16 * MIN_VISUAL), 2 * max(prompt.text, 4 * MIN_TEXT)
    return shared.visual <= visual and shared.text <= text
