"""Reads a picture's orientation, and strips the metadata of picture files.

Decoders read metadata with the pixels and fail if it is malformed: a comment with a wrong checksum, a color profile
that unpacks to too much, EXIF that is not TIFF. `without_metadata` returns a file with only the pixels for a second
attempt; damaged pixels stay damaged in it.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import BinaryIO

from PIL import Image

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_KEPT = (b"tRNS", b"eXIf")  # transparency and orientation, if their checksums are right
_MAX_KEPT_BYTES = 1 << 20  # per chunk


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Returns the turn that makes a picture upright, from its EXIF; None if it is upright or EXIF cannot be read."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a malformed block can make the parser raise almost any exception
        return None


def without_metadata(file: BinaryIO) -> BinaryIO | None:
    """Returns a PNG or JPEG without its metadata; None if the file is neither or cannot be split into its parts."""
    try:
        file.seek(0)
        head = file.read(len(_PNG))
        if head == _PNG:
            return _bare_png(file)
        if head[:2] == b"\xff\xd8":
            file.seek(2)
            return _bare_jpeg(file)
    except (OSError, ValueError):  # closed by the decoder, or not seekable
        pass
    return None


def _bare_png(file: BinaryIO) -> BinaryIO:
    """Keeps pixel chunks unchanged, wrong checksums included, and intact chunks of `_PNG_KEPT`; drops all others."""
    bare = io.BytesIO()
    bare.write(_PNG)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in _PNG_PIXELS:
            bare.write(head + file.read(length + 4))
        elif kind in _PNG_KEPT and length <= _MAX_KEPT_BYTES:
            body, checksum = file.read(length), file.read(4)
            if checksum == struct.pack(">I", zlib.crc32(kind + body)):
                bare.write(head + body + checksum)
        else:
            file.seek(length + 4, io.SEEK_CUR)
        if kind == b"IEND":
            break
    bare.seek(0)
    return bare


def _bare_jpeg(file: BinaryIO) -> BinaryIO | None:
    """Drops comments and application segments, except Adobe's, which defines the channels."""
    bare = io.BytesIO()
    bare.write(b"\xff\xd8")
    while len(head := file.read(4)) == 4:
        marker, kind, length = struct.unpack(">BBH", head)
        if marker != 0xFF or length < 2:
            return None
        if kind == 0xDA:  # start of the first scan; the rest is pixels
            bare.write(head + file.read())
            bare.seek(0)
            return bare
        if (0xE0 <= kind <= 0xEF and kind != 0xEE) or kind == 0xFE:
            file.seek(length - 2, io.SEEK_CUR)
        else:
            bare.write(head + file.read(length - 2))
    return None
