"""MP4, MOV, Matroska, WebM and AVI files, decoded by PyAV (FFmpeg), which the extra `video` installs.

In: an open file whose first bytes are those of a kind in `MOVIE_KINDS`, and limits. Out: uint8 [F, H, W, 3], or
`SkipSample`. FFmpeg gets the open file and the kind, never a name: it opens no other file and no address. It runs in
one thread, since the data pipeline has its own workers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from visor_jax.data.sample import SkipSample
from visor_jax.data.video_limits import VideoLimits

# How such files begin, as regular expressions, and FFmpeg's name of the kind.
MOVIE_KINDS = (
    (rb".{4}(ftyp|moov|mdat|free|wide|skip)", "mp4"),
    (rb"\x1a\x45\xdf\xa3", "matroska"),
    (rb"RIFF.{4}AVI ", "avi"),
)
_SEGMENT = b"\x18\x53\x80\x67"  # Matroska's element that holds everything after the header
_HEAD_BYTES = 128
EXTRA = "pip install 'visor_jax[video]'"


def read_movie(file: BinaryIO, kind: str, limits: VideoLimits, shown: str) -> np.ndarray:
    """Decodes the frames that are used; errors of FFmpeg are raised as they are.

    Args:
        file: at its start.
        kind: FFmpeg's name of it, from `MOVIE_KINDS`.
        limits: of frames and pixels.
        shown: the file's name in messages.

    Raises:
        SkipSample: "video_decoder" (PyAV is not installed), "video_format", "too_large", "too_many_pixels",
            "broken_video".
    """
    if importlib.util.find_spec("av") is None:
        raise SkipSample("video_decoder", f"{shown} needs the package av, which is not installed: {EXTRA}")
    av: Any = importlib.import_module("av")

    _check_whole(file, kind, shown)
    with av.open(file, format=kind, metadata_errors="ignore") as container:
        stream = next(iter(container.streams.video), None)
        if stream is None:
            raise SkipSample("video_format", f"{shown} holds no video, perhaps sound only")
        limits.check(1, stream.height, stream.width, shown)
        times, key_times = _packet_times(container, stream, trusted=kind != "avi")
        if stream.frames > len(times):
            raise SkipSample("broken_video", f"{shown} is cut off after {len(times)} of {stream.frames} frames")
        numbers = limits.numbers(len(times), shown)
        limits.check(len(numbers), stream.height, stream.width, shown)
        # Errors are raised where FFmpeg would paint over them; frames larger than announced are not allocated.
        stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(limits.max_pixels)}
        stream.codec_context.thread_count = 1
        container.seek(0, stream=stream)
        frames = [_upright(frame) for frame in _frames_at(container, stream, [times[n] for n in numbers], key_times)]
    if len(frames) < len(numbers):
        raise SkipSample("broken_video", f"{shown}: only {len(frames)} of {len(numbers)} frames can be decoded")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise SkipSample("frame_sizes", f"{shown}: its frames are not equally large")
    return np.stack(frames)


def _check_whole(file: BinaryIO, kind: str, shown: str) -> None:
    """Refuses a Matroska or AVI file that ends early: FFmpeg takes the rest as a shorter video. Goes back to the start.

    Raises:
        SkipSample: "broken_video".
    """
    head = file.read(_HEAD_BYTES)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if kind == "avi":
        expected = int.from_bytes(head[4:8], "little") + 8
    else:
        segment = head.find(_SEGMENT) if kind == "matroska" else -1
        if segment < 0:
            return
        start = segment + len(_SEGMENT)
        length = 9 - head[start].bit_length() if head[start] else 0  # bytes of the number that follows
        bits = 7 * length
        payload = int.from_bytes(head[start : start + length], "big") & ((1 << bits) - 1)
        if not length or payload == (1 << bits) - 1:  # of unknown size, as a stream is
            return
        expected = start + length + payload
    if size < expected:
        raise SkipSample("broken_video", f"{shown} is cut off: it has {size} of {expected} bytes")


def _packet_times(container: Any, stream: Any, trusted: bool) -> tuple[list[int], list[int]]:
    """Presentation times of all frames and of those that decoding can start at, sorted; nothing is decoded.

    Where a file has no presentation times, or none to be trusted, frames are numbered, and the first is the only one
    to start at.
    """
    packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
    if not trusted or any(time is None for time, _ in packets):
        return list(range(len(packets))), [0]
    return sorted(time for time, _ in packets), sorted(time for time, is_key in packets if is_key)


def _frames_at(container: Any, stream: Any, wanted: Sequence[int], key_times: Sequence[int]) -> Iterator[Any]:
    """Yields the frames shown at the `wanted` times, which ascend; seeks where that saves decoding."""
    frames, reached, number = container.decode(stream), -1, 0
    seekable = len(key_times) > 1
    for time in wanted:
        key = key_times[max(bisect_right(key_times, time) - 1, 0)]
        if seekable and key > reached >= 0:
            container.seek(key, stream=stream, backward=True)
            frames = container.decode(stream)
        for frame in frames:
            reached = frame.pts if seekable and frame.pts is not None else number
            number += 1
            if frame.is_corrupt:
                return
            if reached >= time:
                yield frame
                break


def _upright(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3], turned as the file says."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
