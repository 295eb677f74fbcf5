"""Cuts pictures into normalized tiles, like transformers' PIL backend of LLaVA-OneVision, without torchvision.

In: PIL pictures, paths, URLs, encoded bytes, base64 text or uint8 arrays. Out: float tiles [n, 3, S, S] of each picture
of one prompt.
Every export contains this file; it needs numpy, Pillow and transformers only.
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

ORIENTATION = 0x0112  # EXIF tag
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
    """Cuts pictures into the tiles of one model.

    With `standardize`, a picture's pixels are standardized by mean and deviation of its first tile, instead of per
    channel by `image_mean` and `image_std`.
    """

    def __init__(
        self, config: VisorConfig, image_mean: Sequence[float], image_std: Sequence[float], standardize: bool = False
    ):
        self.config, self.image_mean, self.image_std = config, tuple(image_mean), tuple(image_std)
        self.standardize = standardize

    def __call__(self, pictures: Sequence[Image.Image], dtype: np.dtype) -> list[np.ndarray]:
        """Returns the normalized tiles [n, 3, S, S] of each picture of one prompt.

        Only a prompt's single picture is cut into several tiles.

        Args:
            pictures: upright RGB pictures.
            dtype: of the tiles.
        """
        tile = self.config.tile_size
        tiles = []
        for picture in pictures:
            if self.config.image_grid_pinpoints and len(pictures) == 1:
                tiles.append([_resized(picture, (tile, tile)), *self._crops(picture)])
            elif self.config.image_grid_pinpoints:
                tiles.append([_resized(self._squared(picture), (tile, tile))])
            else:
                tiles.append([_resized(picture, (tile, tile))])
        return [self._normalized(of_picture, dtype) for of_picture in tiles]

    def _normalized(self, tiles: Sequence[Image.Image], dtype: np.dtype) -> np.ndarray:
        pixels = np.stack([np.asarray(tile) for tile in tiles])
        if self.standardize:
            mean, scale = (np.float32(value) for value in statistics(pixels[0]))
            return ((pixels.astype(dtype) - mean) * scale).transpose(0, 3, 1, 2)
        mean, std = (np.asarray(channels, dtype) for channels in (self.image_mean, self.image_std))
        return ((pixels.astype(dtype) / 255 - mean) / std).transpose(0, 3, 1, 2)

    def _crops(self, picture: Image.Image) -> list[Image.Image]:
        """Resizes a picture into its best grid, centers it on black and returns the grid's tiles row by row."""
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
        """Centers a picture on a square of the mean color."""
        side = max(picture.size)
        red, green, blue = (int(mean * 255) for mean in self.image_mean)
        canvas = Image.new("RGB", (side, side), (red, green, blue))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return canvas


def statistics(pixels: np.ndarray) -> tuple[float, float]:
    """Returns mean and inverse deviation over all values of a tile, uint8; computed from exact sums.

    The deviation is at least 1 / sqrt(number of values), in units of pixel values (0..255).
    """
    values = pixels.reshape(-1).astype(np.float64)
    count, total, squares = values.size, int(values.sum()), int(values @ values)
    deviation = math.sqrt(count * squares - total * total) / count
    return total / count, 1 / max(deviation, 1 / math.sqrt(count))


def is_picture(value: Any) -> bool:
    """Returns whether `value` is one picture, not a list of pictures."""
    return isinstance(value, Image.Image | np.ndarray | str | Path | bytes | bytearray) or hasattr(value, "read")


def open_picture(source: Any) -> Image.Image:
    """Returns an upright RGB picture from a PIL picture, path, URL, encoded bytes, base64 text or uint8 [H, W, 3].

    URLs are read by transformers' `load_image`, which drops transparency; other pictures are composited over white.

    Raises:
        TypeError: the source has another type.
        ValueError: a text is not a file, a URL or a picture in base64.
        OSError: a file or bytes do not hold a picture.
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
    """Returns the picture's bytes from base64 text, with or without the prefix `data:image/...;base64,`."""
    try:
        content = base64.b64decode(re.sub(r"\s", "", text[text.find(",") + 1 :]), validate=True)
        Image.open(io.BytesIO(content)).close()
    except (ValueError, OSError) as error:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise ValueError(f"images: {shown!r} is not a file, a URL or a picture in base64") from error
    return content


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Returns a picture as training reads it: rotated by EXIF, 16 bits scaled to 8, composited over white, RGB."""
    picture.load()
    try:
        turn = TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # malformed metadata make the parser raise many errors; the pixels are intact
        turn = None
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        gray = np.asarray(picture).astype(np.int64).clip(0, 0xFFFF)
        used = max(int(gray.max(initial=0)).bit_length(), 8)  # 12-bit X-rays in 16-bit files get the full range
        return Image.fromarray((gray >> (used - 8)).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def _resized(picture: Image.Image, size: Size) -> Image.Image:
    """Resizes bicubically with Pillow to (height, width)."""
    return picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
