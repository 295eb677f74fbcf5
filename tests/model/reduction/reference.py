"""The published algorithms in plain NumPy, for one tile or one picture at a time, loops and all.

Written from the authors' repositories: vbdi/divprune, Theia-4869/VisPruner, dvlab-research/VisionZip, hasanar1f/HiRED.
Where the package differs, docs/reduction.md says so, and so do the comments here.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def share_of(total: int, ratio: float) -> int:
    """Returns what is kept of a group: the share, rounded up."""
    return math.ceil(total * Fraction(ratio).limit_denominator(10_000))


def similarities(x: np.ndarray) -> np.ndarray:
    """Returns the cosine of every two rows."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit @ unit.T


def divprune(tokens: np.ndarray, count: int) -> list[int]:
    """Returns the sorted tokens that are chosen one after the other, each the farthest from those before."""
    distance = 1 - similarities(tokens)
    np.fill_diagonal(distance, np.inf)
    chosen: list[int] = []
    for _ in range(count):
        to_chosen = distance.min(axis=0) if not chosen else distance[chosen].min(axis=0)
        to_chosen[chosen] = -np.inf  # the authors' code may choose a token again
        chosen.append(int(np.argmax(to_chosen)))
    return sorted(chosen)


def vispruner(features: np.ndarray, scores: np.ndarray, count: int, important_ratio: float) -> list[int]:
    """Returns the sorted patches of a tile that remain: the most attended, and others without their duplicates."""
    by_score = np.argsort(-scores, kind="stable").tolist()
    important = int(count * important_ratio)
    residual, diverse = by_score[important:], count - important
    cosine = similarities(features)
    while diverse and len(residual) > diverse:
        a, b = residual[::2], residual[1::2]
        r = min(8, len(residual) - diverse, len(a))
        duplicate = np.array([max((cosine[i, j] for j in b), default=-np.inf) for i in a])
        residual = [a[i] for i in np.argsort(-duplicate, kind="stable")[r:]] + b
    return sorted(by_score[:important] + (residual if diverse else []))


def visionzip(
    features: np.ndarray, keys: np.ndarray, scores: np.ndarray, dominant: int, contextual: int
) -> tuple[list[int], list[int], np.ndarray]:
    """Returns the dominant patches of a tile, the centers, and the features of both in this order."""
    top = sorted(np.argsort(-scores, kind="stable")[:dominant].tolist())
    rest = [i for i in range(len(scores)) if i not in top]
    step = max(1, len(rest) // max(contextual, 1))
    centers = rest[::step][:contextual]
    cosine = similarities(keys)
    members: dict[int, list[int]] = {center: [] for center in centers}
    for i in rest:
        if i not in centers and centers:
            members[centers[int(np.argmax(cosine[i, centers]))]].append(i)
    merged = [features[c] + (features[members[c]].mean(axis=0) if members[c] else 0) for c in centers]
    return top, centers, np.array([*features[top], *merged]).reshape(-1, features.shape[1])


def hired(
    last: list[np.ndarray], first: np.ndarray, crop_of_patch: np.ndarray, count: int, alpha: float
) -> list[list[int]]:
    """Returns the sorted patches of each tile that remain; the first tile is the base.

    Args:
        last: attention in the last layer of each tile's patches, those of a crop that show the picture.
        first: attention in the first layer of the base tile's patches.
        crop_of_patch: for which crop, from 0, each patch of the base tile counts.
    """
    crops = last[1:]
    in_crops = sum(map(len, crops))
    base = count if not in_crops else max(int(count * alpha), count - in_crops)
    base = min(base, len(last[0]))
    order = [np.argsort(-scores, kind="stable").tolist() for scores in last]
    chosen = [order[0][:base]]
    marked = np.argsort(-first, kind="stable")[: int(len(first) * (1 - alpha))]
    marks = np.bincount(crop_of_patch[marked], minlength=len(crops)) if crops else np.zeros(0)
    for number in range(len(crops)):
        budget = int((count - base) * marks[number] // max(marks.sum(), 1))
        chosen.append(order[number + 1][: min(budget, len(crops[number]))])
    # The authors' code leaves what rounding down leaves; the package gives it to the most attended patches not chosen.
    left = [
        (-crops[number][patch], number, patch)
        for number in range(len(crops))
        for patch in range(len(crops[number]))
        if patch not in chosen[number + 1]
    ]
    for _, number, patch in sorted(left)[: count - sum(map(len, chosen))]:
        chosen[number + 1].append(patch)
    return [sorted(patches) for patches in chosen]
