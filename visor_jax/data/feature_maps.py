"""Maps of features as gather and weights: packing of neighbors, bilinear shrinking, and joining.

In: gather and weights, each [h, w, K]: which features make each position of a map, and their shares. Out: those of a
smaller map, or of positions in a row. `visor_jax.data.anyres` makes layouts of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from visor_jax.architecture import AnyResArchitecture

Size = tuple[int, int]  # (height, width)
PACKED = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # `anyres.packing` -> rows and columns of features per visual position


def packed_size(size: Size, anyres: AnyResArchitecture) -> Size:
    """Returns rows and columns of a map of features after packing."""
    rows, columns = PACKED[anyres.packing]
    return -(-size[0] // rows), -(-size[1] // columns)


def packed(gather: np.ndarray, weights: np.ndarray, anyres: AnyResArchitecture) -> tuple[np.ndarray, np.ndarray]:
    """Packs neighboring features of a map [h, w, k]: [ceil(h / rows), ceil(w / columns), k * rows * columns]."""
    rows, columns = PACKED[anyres.packing]
    height, width = packed_size((gather.shape[0], gather.shape[1]), anyres)
    if anyres.packing_kind == "bilinear":
        return _interpolated(gather, weights, (height, width), (rows, columns))
    edge = ((0, height * rows - gather.shape[0]), (0, width * columns - gather.shape[1]), (0, 0))
    taps = gather.shape[2]

    def blocks(values: np.ndarray) -> np.ndarray:
        filled = np.pad(values, edge).reshape(height, rows, width, columns, taps)
        # Layouts are padded with taps at the end: "shuffle" has the first taps of all neighbors first.
        order = (0, 2, 4, 1, 3) if anyres.packing_kind == "shuffle" else (0, 2, 1, 3, 4)
        return filled.transpose(order).reshape(height, width, rows * columns * taps)

    weights = blocks(weights)
    total = rows * columns if anyres.packing_kind == "shuffle" else weights.sum(-1, keepdims=True)
    return blocks(gather), weights / total


def _interpolated(
    gather: np.ndarray, weights: np.ndarray, size: Size, packed: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Shrinks a map [h, w, k] bilinearly to `size`, along the axes on which several neighbors are packed."""
    axes = [
        bilinear_taps(length, out) if several > 1 else (np.arange(length)[:, None], np.ones((length, 1), np.float32))
        for length, out, several in zip(gather.shape[:2], size, packed, strict=True)
    ]
    (y, row_weight), (x, column_weight) = axes
    y, x = y[:, None, :, None], x[None, :, None, :]  # [h, 1, kh, 1] and [1, w, 1, kw]
    share = row_weight[:, None, :, None, None] * column_weight[None, :, None, :, None]
    return gather[y, x].reshape(*size, -1), (weights[y, x] * share).reshape(*size, -1)


def flattened(gather: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flattens a map [h, w, K] row by row to [h * w, K]."""
    return gather.reshape(-1, gather.shape[-1]), weights.reshape(-1, weights.shape[-1])


def joined(pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates the positions of several pieces, padded to the largest K with taps of weight zero."""
    width = max(gather.shape[1] for gather, _ in pieces)

    def column(arrays: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays])

    return column(gather for gather, _ in pieces), column(weights for _, weights in pieces)


def bilinear_taps(size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices and weights, each [out_size, 2], of `torch.nn.functional.interpolate(mode="bilinear", size=...)`.

    That means align_corners=False without antialiasing. Torch computes the scale size / out_size in float32 and
    multiplies and subtracts with one rounding (a fused multiply-add); float64 and one cast reproduce it on any machine.
    """
    scale = float(np.float32(size) / np.float32(out_size))
    position = np.maximum(scale * (np.arange(out_size) + 0.5) - 0.5, 0).astype(np.float32)
    low = np.minimum(position.astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)
    weight = np.clip(position - low.astype(np.float32), 0, 1).astype(np.float32)
    return np.stack([low, high], axis=1), np.stack([1 - weight, weight], axis=1)
