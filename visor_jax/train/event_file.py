"""TensorBoard event files with scalars, written without TensorFlow or torch (`tensorboardX` imports torch).

In: (step, {tag: number}). Out: `events.out.tfevents.*`: records framed as TFRecord (length, its checksum, bytes, their
checksum), each one `tensorflow.Event` message, of which scalars need six fields, encoded here by hand.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

FLUSH_SECONDS = 30.0
_SESSION_START = 1


class EventFile:
    """Scalars of one run in one new file. `first_step` tells TensorBoard to forget later points of earlier files."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._flushed = time.monotonic()
        self._put(_event(now, text_field(3, b"brain.Event:2")))
        self._put(_event(now, varint_field(2, first_step) + text_field(7, varint_field(1, _SESSION_START))))
        self._file.flush()

    def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one point per tag; written to the disk every half minute and on `flush`.

        A tag with half a surrogate pair in it, which no encoding has, is written with its escape.
        """
        values = b"".join(
            text_field(
                1, text_field(1, tag.encode("utf-8", "backslashreplace")) + b"\x15" + struct.pack("<f", _float32(value))
            )
            for tag, value in scalars.items()
        )
        self._put(_event(time.time(), varint_field(2, step) + text_field(5, values)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def _put(self, message: bytes) -> None:
        length = struct.pack("<Q", len(message))
        frame = struct.pack("<I", masked_crc(length)), message, struct.pack("<I", masked_crc(message))
        self._file.write(length + b"".join(frame))


def _event(wall_time: float, rest: bytes) -> bytes:
    return b"\x09" + struct.pack("<d", wall_time) + rest


def _float32(value: float) -> float:
    """Numbers past float32's range become infinite instead of an error."""
    return math.copysign(math.inf, value) if abs(value) > 3.4028234e38 else value


def varint_field(number: int, value: int) -> bytes:
    """A protobuf integer field; `value` is 0 or more."""
    return _varint(number << 3) + _varint(value)


def text_field(number: int, data: bytes) -> bytes:
    """A protobuf field of bytes, text or a nested message."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _crc_table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        return value

    return tuple(entry(byte) for byte in range(256))


_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and offset as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
