"""The small pictures on cards: emoji and flags (pictures.npz, see `build_pictures`)."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from visor_jax.data.almanac.words import PICTURES

EMOJI_SIDE = 30  # pixels
FLAG_HEIGHT, FLAG_WIDTH = 24, 32


@functools.cache
def emoji() -> dict[str, np.ndarray]:
    """Returns for each name an emoji, float32 [EMOJI_SIDE, EMOJI_SIDE, 4]: color up to 255, coverage up to 1."""
    return dict(zip(PICTURES, _scaled("emoji"), strict=True))


@functools.cache
def flags() -> dict[str, np.ndarray]:
    """Returns for each country its flag, float32 [FLAG_HEIGHT, FLAG_WIDTH, 4], as `emoji`."""
    return dict(zip(map(str, _arrays()["countries"]), _scaled("flags"), strict=True))


def _scaled(name: str) -> np.ndarray:
    return _arrays()[name].astype(np.float32) / np.array((1, 1, 1, 255), np.float32)


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_name("pictures.npz"), allow_pickle=False) as arrays:
        return dict(arrays)
