"""The few shapes that generation is compiled for, and which questions may share a batch.

In: how many tiles, visual positions and text tokens a prompt has. Out: the bucket that holds it. Buckets of one kind
lie at most a quarter apart (visual positions an eighth, but for the smallest), so that padding stays small and a
question of another length finds its programs compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.data.collate import RowShape

MAX_ROWS = 8  # of a batch of questions
TILES = (1, 2, 3, 5, 7, 10, 13, 17, 21, 26, 31, 37)  # 1 + rows * columns of AnyRes, thinned out; 37 is its largest
LARGEST_PICTURE = 8832  # visual positions: the largest AnyRes picture has 8,765
LEAST_VISUAL, LEAST_TEXT, LEAST_CAPACITY = 8, 32, 64


def bucket(size: int, least: int) -> int:
    """The smallest of least * 1, 2, ... 16, and from there of eight steps to each doubling, that holds `size`."""
    step = least
    while size > 16 * step:
        step *= 2
    return max(-(-size // step), 1) * step


def row_bucket(size: RowShape) -> RowShape:
    """Returns the bucket that holds one prompt."""
    tiles = next((held for held in TILES if size.tiles <= held), bucket(size.tiles, 8))
    visual = bucket(size.visual, LEAST_VISUAL)
    if size.visual <= LARGEST_PICTURE < visual:
        visual = LARGEST_PICTURE
    return RowShape(tiles, visual, bucket(size.text, LEAST_TEXT))


def cache_bucket(tokens: int) -> int:
    """Room of a text cache for so many tokens, a power of two: it doubles when it is full."""
    return max(LEAST_CAPACITY, 1 << (tokens - 1).bit_length())


def batch_bucket(count: int) -> int:
    """Rows of a batch for so many questions, a power of two."""
    return 1 << (count - 1).bit_length()


def joined(row_shapes: Sequence[RowShape]) -> RowShape:
    """The smallest row shape that holds all of them."""
    return RowShape(
        *(max(getattr(row_shape, name) for row_shape in row_shapes) for name in ("tiles", "visual", "text"))
    )


def batches(row_shapes: Sequence[RowShape]) -> list[list[int]]:
    """Which prompts, by index, are answered together: at most `MAX_ROWS`, of alike size.

    Self-attention costs as the square of its tokens, so a row is never widened to more than twice its visual positions
    or text tokens, the smallest buckets aside.
    """
    order = sorted(range(len(row_shapes)), key=lambda i: (row_shapes[i].visual, row_shapes[i].text), reverse=True)
    found: list[list[int]] = []
    for index in order:
        group = found[-1] if found else []
        together = joined([row_shapes[i] for i in (*group, index)])
        if 0 < len(group) < MAX_ROWS and all(_is_near(row_shapes[i], together) for i in (*group, index)):
            group.append(index)
        else:
            found.append([index])
    return found


def _is_near(own: RowShape, shared: RowShape) -> bool:
    visual, text = 2 * max(own.visual, 16 * LEAST_VISUAL), 2 * max(own.text, 4 * LEAST_TEXT)
    return shared.visual <= visual and shared.text <= text
