"""What surrounds a picture's pixels: its orientation, and files with everything but their pixels taken out.

Decoders read metadata with the pixels and give up where it is malformed: a comment with a wrong checksum, a color
profile that unpacks to too much, EXIF that is no TIFF. `without_metadata` makes a file of the pixels alone, for a
second attempt; what is wrong with the pixels themselves stays wrong in it.
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
_MOST_KEPT = 1 << 20  # bytes of either


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How a picture must be turned to stand upright, as its EXIF says; None if it stands, or EXIF cannot be read."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever a malformed block makes the parser raise
        return None


def without_metadata(file: BinaryIO) -> BinaryIO | None:
    """The same PNG or JPEG without metadata; None where the file is neither or cannot be taken apart."""
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
    """Pixel chunks as they are, wrong checksums included; others only if they bear on the pixels and are sound."""
    bare = io.BytesIO()
    bare.write(_PNG)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in _PNG_PIXELS:
            bare.write(head + file.read(length + 4))
        elif kind in _PNG_KEPT and length <= _MOST_KEPT:
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
    """All segments but comments and applications' own; Adobe's stays, which says what the channels are."""
    bare = io.BytesIO()
    bare.write(b"\xff\xd8")
    while len(head := file.read(4)) == 4:
        marker, kind, length = struct.unpack(">BBH", head)
        if marker != 0xFF or length < 2:
            return None
        if kind == 0xDA:  # from the first scan on there are pixels
            bare.write(head + file.read())
            bare.seek(0)
            return bare
        if (0xE0 <= kind <= 0xEF and kind != 0xEE) or kind == 0xFE:
            file.seek(length - 2, io.SEEK_CUR)
        else:
            bare.write(head + file.read(length - 2))
    return None
