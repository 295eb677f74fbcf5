"""Pictures as normalized tiles, as transformers' PIL backend of LLaVA-OneVision makes them, without torchvision.

In: PIL pictures, paths, URLs, encoded bytes, base64 text or uint8 arrays. Out: float tiles [n, 3, S, S] for each
picture of one prompt.
This file travels inside every export; it needs numpy, Pillow and transformers only.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_utils import load_image

from .configuration_visor import VisorConfig
from .vision_visor import Size, best_pinpoint

ORIENTATION = 0x0112  # of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Tiler:
    """Cuts the pictures of one model."""

    def __init__(self, config: VisorConfig, image_mean: Sequence[float], image_std: Sequence[float]):
        self.config, self.image_mean, self.image_std = config, tuple(image_mean), tuple(image_std)

    def __call__(self, pictures: Sequence[Image.Image], dtype: np.dtype) -> list[np.ndarray]:
        """Normalized tiles [n, 3, S, S] of each of one prompt's pictures, which are RGB and upright.

        Only the picture of a prompt that has no other is cut into several.
        """
        tile = self.config.tile_size
        cut = []
        for picture in pictures:
            if self.config.image_grid_pinpoints and len(pictures) == 1:
                cut.append([_resized(picture, (tile, tile)), *self._crops(picture)])
            elif self.config.image_grid_pinpoints:
                cut.append([_resized(self._squared(picture), (tile, tile))])
            else:
                cut.append([_resized(picture, (tile, tile))])
        return [self._normalized(own, dtype) for own in cut]

    def _normalized(self, tiles: Sequence[Image.Image], dtype: np.dtype) -> np.ndarray:
        values = np.stack([np.asarray(tile) for tile in tiles]).astype(dtype) / 255
        mean, std = (np.asarray(channels, dtype) for channels in (self.image_mean, self.image_std))
        return ((values - mean) / std).transpose(0, 3, 1, 2)

    def _crops(self, picture: Image.Image) -> list[Image.Image]:
        """The picture resized into its best grid, centered on black and cut row by row."""
        tile, size = self.config.tile_size, (picture.height, picture.width)
        height, width = best_pinpoint(size, self.config.image_grid_pinpoints)
        by_height, by_width = height / size[0], width / size[1]
        if by_width < by_height:
            new = min(math.ceil(size[0] * by_width), height), width
        else:
            new = height, min(math.ceil(size[1] * by_height), width)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(_resized(picture, new), ((width - new[1]) // 2, (height - new[0]) // 2))
        corners = [(left, top) for top in range(0, height, tile) for left in range(0, width, tile)]
        return [canvas.crop((left, top, left + tile, top + tile)) for left, top in corners]

    def _squared(self, picture: Image.Image) -> Image.Image:
        """The picture centered on a square in the mean color."""
        side = max(picture.size)
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        canvas = Image.new("RGB", (side, side), (red, green, blue))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return canvas


def is_picture(value: Any) -> bool:
    """A single picture, rather than a list of them."""
    return isinstance(value, Image.Image | np.ndarray | str | Path | bytes | bytearray) or hasattr(value, "read")


def open_picture(source: Any) -> Image.Image:
    """An upright RGB picture: of a PIL picture, a path, a URL, encoded bytes, base64 text, or uint8 [H, W, 3].

    A picture behind a URL comes through transformers' `load_image`, which drops transparency instead of laying it over
    white.

    Raises:
        TypeError: none of these.
        ValueError: a text is no file, no URL and no picture in base64.
        OSError: a file or bytes hold no picture.
    """
    if isinstance(source, Image.Image):
        return upright_rgb(source)
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3:
        return Image.fromarray(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return upright_rgb(load_image(source))
    if isinstance(source, str | Path):
        path = os.path.expanduser(source)
        file: Any = path if os.path.isfile(path) else io.BytesIO(_decoded(str(source)))
    elif isinstance(source, bytes | bytearray):
        file = io.BytesIO(source)
    elif is_picture(source) and not isinstance(source, np.ndarray):
        file = source
    else:
        raise TypeError(
            f"images: got {type(source).__name__}; expected PIL pictures, paths, URLs, encoded bytes or uint8 arrays"
            " [H, W, 3]"
        )
    with Image.open(file) as picture:
        return upright_rgb(picture)


def _decoded(text: str) -> bytes:
    """The bytes of base64 text, with or without `data:image/...;base64,` before it."""
    try:
        found = base64.b64decode(re.sub(r"\s", "", text[text.find(",") + 1 :]), validate=True)
        Image.open(io.BytesIO(found)).close()
    except (ValueError, OSError) as error:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise ValueError(f"images: {shown!r} is no file, no URL and no picture in base64") from error
    return found


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Turned as EXIF says, 16 bits scaled to 8, transparency over white: as pictures were read in training."""
    picture.load()
    try:
        turn = TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever malformed metadata make the parser raise; the pixels are whole
        turn = None
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        gray = np.asarray(picture).astype(np.int64).clip(0, 0xFFFF)
        used = max(int(gray.max(initial=0)).bit_length(), 8)  # 12 bits of an X-ray in a 16-bit file fill the range
        return Image.fromarray((gray >> (used - 8)).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def _resized(picture: Image.Image, size: Size) -> Image.Image:
    """Pillow's bicubic resize to (height, width)."""
    return picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
