"""Opens and decodes untrusted picture files.

In: a folder and a name from a data set, a file that the user named, encoded bytes, or an opened PIL image. Out: uint8
[H, W, 3] RGB, or `SkipSample`. All pictures are decoded by `decode_image`.

A name must stay inside its folder and lead to a regular file of bounded size; no other file is opened. The content,
not the name, must be JPEG, PNG, WebP or GIF. The size in pixels is checked before decoding. A truncated file is broken,
never half gray. From an animation the first frame is read. Metadata that cannot be read is ignored: a picture with
intact pixels is never skipped for it.

Pixels compared with transformers 5.23: EXIF rotation is applied, as in its `load_image` (its image processors ignore
the EXIF of an opened picture). Transparency is composited over white, as in its image processors (`load_image` drops
it). 16-bit gray is scaled to 8 bits by the bits that the picture uses (12 bits of an X-ray in a 16-bit file become 0 to
255); transformers clips almost all of it to white.
"""

from __future__ import annotations

import errno
import io
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from visor_jax.config.data_fields import PILLOW_MAX_PIXELS
from visor_jax.data import image_metadata
from visor_jax.data.picture_paths import resolve_under
from visor_jax.data.sample import SkipSample
from visor_jax.files.read_write import open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")

# Beginnings of other files that often have a picture's name, and the message for each.
_FOREIGN = (
    (rb"version https://git-lfs", "it is a Git LFS pointer: fetch the file itself, with `git lfs pull`"),
    (rb"\s*<(!doctype|html)", "it is an HTML page, perhaps an error page that was downloaded: download it again"),
    (rb"\s*<(\?xml|svg)", "it is XML, perhaps SVG: convert it"),
    (rb"BM|II\*\0|MM\0\*|\0\0\0.JXL |\0\0\0\x0cjP|.{4}ftyp", "it is a picture or video of another kind: convert it"),
    (rb"%PDF", "it is a PDF file: convert it"),
    (rb"\x1f\x8b|PK\x03\x04", "it is a compressed archive: unpack it"),
)

# A file may have `_FREE_BYTES`, or `_BYTES_PER_PIXEL` for each allowed pixel if that is more.
_FREE_BYTES = 64 << 20
_BYTES_PER_PIXEL = 4

# Pillow warns about large pictures and refuses those above `PILLOW_MAX_PIXELS`; below that the caller's limit applies.
# It also warns about metadata that it cannot read.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_under(root: Path, name: str, max_pixels: int, follow_links: bool = False, reduce_to: int = 0) -> np.ndarray:
    """Returns the picture that `name` names under `root`.

    Args:
        root: the folder that no name may leave.
        name: as for `picture_paths.resolve_under`.
        max_pixels: limit of height times width.
        follow_links: whether links inside `root` may lead out of it.
        reduce_to: as for `decode_image`.

    Returns:
        uint8 [H, W, 3].

    Raises:
        SkipSample: "unsafe_path", "missing_file", or one of `read_image`'s reasons.
    """
    return read_image(resolve_under(root, name, follow_links), max_pixels, name, reduce_to)


def read_image(path: Path, max_pixels: int, shown: str = "", reduce_to: int = 0) -> np.ndarray:
    """Returns the picture in a file, as uint8 [H, W, 3]; `shown` names it in messages, `decode_image` has `reduce_to`.

    Raises:
        SkipSample: "missing_file", "unsafe_path" (not a regular file), "too_large" (in bytes), "image_format",
            "too_many_pixels", "broken_image".
    """
    shown = repr((shown or str(path))[:200])
    most = byte_limit(max_pixels)
    try:
        file = open_regular(path, most)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.EINVAL, errno.EISDIR, errno.ENXIO):
            raise SkipSample("unsafe_path", f"{shown} is not a regular file") from None
        if number == errno.EFBIG:
            raise SkipSample("too_large", f"{shown} has more than {most} bytes") from None
        raise SkipSample("missing_file", f"{shown}: {getattr(error, 'strerror', None) or error}") from None
    with file:
        return decode_image(file, max_pixels, shown, reduce_to)


def byte_limit(max_pixels: int) -> int:
    """Returns how many bytes a file may have whose picture may have `max_pixels` pixels."""
    return max(_FREE_BYTES, _BYTES_PER_PIXEL * max_pixels)


def decode_embedded(data: bytes, max_pixels: int, name: str = "", reduce_to: int = 0) -> np.ndarray:
    """Decodes a picture that a record holds to uint8 [H, W, 3]; `name` is for messages, `decode_image` has `reduce_to`.

    Raises:
        SkipSample: "too_large" (in bytes), or one of `decode_image`'s reasons.
    """
    shown = repr(name[:200]) if name else "the record's picture"
    if len(data) > byte_limit(max_pixels):
        raise SkipSample("too_large", f"{shown} has more than {byte_limit(max_pixels)} bytes")
    return decode_image(data, max_pixels, shown, reduce_to)


def decode_image(
    source: BinaryIO | bytes | bytearray | memoryview | Image.Image,
    max_pixels: int,
    shown: str = "the picture",
    reduce_to: int = 0,
) -> np.ndarray:
    """Decodes a picture to uint8 [H, W, 3].

    Args:
        source: an open file of one of `FORMATS`, or its bytes; or an opened PIL image of any format, decoded or not.
        max_pixels: limit of height times width.
        shown: names the picture in messages.
        reduce_to: a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size while both sides stay at least this long. This
            is several times faster, and the pixels differ from those of a full decoding; 0 always decodes in full.

    Raises:
        SkipSample: "image_format", "too_many_pixels", "broken_image".
    """
    if isinstance(source, Image.Image):
        _check_pixels(source, max_pixels, shown)
        return _pixels(source, shown)
    file = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
    try:
        return _decode_file(file, max_pixels, shown, reduce_to)
    except SkipSample as why:
        if why.reason == "too_many_pixels":
            raise
        bare = image_metadata.without_metadata(file)
        if bare is None:
            raise
        return _decode_file(bare, max_pixels, shown, reduce_to)


def _decode_file(file: BinaryIO, max_pixels: int, shown: str, reduce_to: int) -> np.ndarray:
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise SkipSample("image_format", f"{shown} is not a {', '.join(FORMATS)} file{_kind(file)}") from None
    except Image.DecompressionBombError:
        detail = f"{shown} has more than {PILLOW_MAX_PIXELS} pixels; at most {max_pixels} are allowed"
        raise SkipSample("too_many_pixels", detail) from None
    except Exception as error:  # a hostile file can make a decoder raise almost any exception
        raise _broken(shown, error) from None
    with image:
        _check_pixels(image, max_pixels, shown)
        if reduce_to:
            image.draft(image.mode, (reduce_to, reduce_to))  # has an effect on JPEG only
        return _pixels(image, shown)


def _kind(file: BinaryIO) -> str:
    """Returns a message about a file that is not of `FORMATS`; "" if its beginning is unknown."""
    try:
        file.seek(0)
        head = file.read(64)
    except (OSError, ValueError):
        return ""
    if not head:
        return "; it is empty"
    flags = re.IGNORECASE | re.DOTALL
    return next((f"; {message}" for start, message in _FOREIGN if re.match(start, head, flags)), "")


def _check_pixels(image: Image.Image, max_pixels: int, shown: str) -> None:
    width, height = image.size
    if not width or not height:
        raise SkipSample("broken_image", f"{shown} is {width}x{height}: it has no pixels")
    if width * height > max_pixels:
        raise SkipSample("too_many_pixels", f"{shown} is {width}x{height}; at most {max_pixels} pixels are allowed")


def _pixels(image: Image.Image, shown: str) -> np.ndarray:
    if image.mode == "F":  # the file does not say whether values go up to 1 or to 255
        raise SkipSample("image_format", f"{shown} has floating-point pixels (mode F); convert it to 8 bits")
    try:
        image.load()
        return np.asarray(upright_rgb(image))
    except Exception as error:  # as above
        raise _broken(shown, error) from None


def _broken(shown: str, error: Exception) -> SkipSample:
    return SkipSample("broken_image", f"{shown}: {type(error).__name__}: {error}")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Returns a decoded picture of any mode as RGB, rotated as EXIF says, transparency over white."""
    turn = image_metadata.turn_of(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Converts 16-bit gray to uint8: the upper 8 of the bits that the picture uses, at least its lowest 8."""
    values = values.astype(np.int64).clip(0, 0xFFFF)
    used = max(int(values.max(initial=0)).bit_length(), 8)
    return (values >> (used - 8)).astype(np.uint8)
