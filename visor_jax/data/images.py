"""Picture files from outside, opened with suspicion.

In: a folder and a name from a data set, or a file that the user named. Out: uint8 [H, W, 3] RGB, or `SkipSample`.

A name must stay inside its folder and lead to a regular file; nothing else is ever opened. The content, not the name,
must be JPEG, PNG or WebP; the size in pixels is checked before anything is decoded; a file that ends early is broken,
never half grey. Of an animation the first frame counts.

What the pixels are, next to transformers 5.23: EXIF rotation is applied, as by its `load_image` (its image processors,
given an opened picture, do not look at EXIF); transparency is laid over white, as by its image processors (`load_image`
drops it); 16-bit grey is scaled to 8 bits, where transformers clips almost all of it to white.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from visor_jax.config_schema import MOST_PIXELS
from visor_jax.data.sample import SkipSample

FORMATS = ("JPEG", "PNG", "WEBP")

# Pillow warns of large pictures on its own, and opens none of more than `MOST_PIXELS`; below that the limit that the
# caller gives decides.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.IGNORECASE)


def open_under(root: Path, name: str, max_pixels: int) -> np.ndarray:
    """The picture that `name` means under `root`.

    Args:
        root: the folder that no name may leave.
        name: relative, parts separated by "/".
        max_pixels: the most that height times width may be.

    Returns:
        uint8 [H, W, 3].

    Raises:
        SkipSample: "unsafe_path", "missing_file", or one of `read_image`'s reasons.
    """
    return read_image(resolve_under(root, name), max_pixels, shown=name)


def resolve_under(root: Path, name: str) -> Path:
    """The real path of a file under `root`; the file is not opened.

    Raises:
        SkipSample: "unsafe_path" (absolute, "..", "~", a URL, NUL, a link that leaves `root`), "missing_file".
    """
    parts = PurePosixPath(name).parts
    if name.startswith(("/", "~")) or ".." in parts or "\0" in name or _SCHEME.match(name):
        raise SkipSample("unsafe_path", f"{name[:200]!r} is not a plain path under the data folder")
    try:
        base = root.resolve(strict=True)
        path = base.joinpath(name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # missing, too long, not encodable, a loop of links
        raise SkipSample("missing_file", f"{name[:200]!r}: {_cause(error)}") from None
    if not path.is_relative_to(base):
        raise SkipSample("unsafe_path", f"{name!r} leads out of the data folder through a link")
    return path


def read_image(path: Path, max_pixels: int, shown: str = "") -> np.ndarray:
    """The picture in a file, as uint8 [H, W, 3]; `shown` is what messages call it.

    Raises:
        SkipSample: "missing_file", "unsafe_path" (not a regular file), "image_format", "too_many_pixels",
            "broken_image".
    """
    shown = repr(shown or str(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # asked before opening: opening a FIFO would wait for a writer
            raise SkipSample("unsafe_path", f"{shown} is not a regular file")
        # NONBLOCK and a second look, should the file have been exchanged in between.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise SkipSample("missing_file", f"{shown}: {_cause(error)}") from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SkipSample("unsafe_path", f"{shown} is not a regular file")
        return decode_image(file, max_pixels, shown)


def decode_image(file: BinaryIO, max_pixels: int, shown: str = "the picture") -> np.ndarray:
    """Decodes an open JPEG, PNG or WebP file to uint8 [H, W, 3]; raises `SkipSample` as `read_image`."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise SkipSample("image_format", f"{shown} is not a {', '.join(FORMATS)} file") from None
    except Image.DecompressionBombError:
        what = f"{shown} has more than {MOST_PIXELS} pixels; at most {max_pixels} are allowed"
        raise SkipSample("too_many_pixels", what) from None
    except Exception as error:  # a hostile file can make a decoder raise nearly anything
        raise _broken(shown, error) from None
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise SkipSample("too_many_pixels", f"{shown} is {width}x{height}; at most {max_pixels} pixels are allowed")
        try:
            image.load()
            return np.asarray(upright_rgb(image))
        except Exception as error:  # as above
            raise _broken(shown, error) from None


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _broken(shown: str, error: Exception) -> SkipSample:
    return SkipSample("broken_image", f"{shown}: {type(error).__name__}: {error}")


def upright_rgb(image: Image.Image) -> Image.Image:
    """RGB of a decoded picture of any mode: turned as EXIF says, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        high_byte = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
