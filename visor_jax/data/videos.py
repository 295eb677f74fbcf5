"""Videos from outside, sampled evenly to a bounded number of frames.

In: the name of a video below a folder, or a video's bytes. Out: uint8 [F, H, W, 3] RGB, or `SkipSample`.

What is read: a folder of picture files, in natural order ("frame2" before "frame10"); a list of picture files; an
animated WebP or GIF; an array of uint8 [F, H, W, 3] in NumPy's format (`.npy`; nothing is unpickled); MP4, MOV,
Matroska, WebM and AVI where the extra `video` is installed (`visor_jax.data.movies`). The content decides, not the
name. Sizes are checked before frames are decoded, and only the frames that are used are converted to RGB. The frames
of a video are equally large. A video that ends early is broken: it never becomes a shorter one.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image

from visor_jax.data.images import open_under, read_image, upright_rgb
from visor_jax.data.movies import MOVIE_KINDS, read_movie
from visor_jax.data.picture_paths import resolve_under
from visor_jax.data.sample import SkipSample
from visor_jax.data.video_limits import VideoLimits
from visor_jax.files.read_write import open_regular

_MAX_ANIMATION_PIXELS = 1 << 34  # of all frames: reading one frame of an animation decodes those before it
_MAX_ANIMATION_BYTES = 256 << 20  # Pillow holds the file in memory
_FRAME_FILE = re.compile(r".*\.(jpe?g|png|webp|gif)", re.IGNORECASE | re.DOTALL)
_HEAD_BYTES = 64

FrameT = TypeVar("FrameT")


def open_video_under(root: Path, name: str, limits: VideoLimits, follow_links: bool = False) -> np.ndarray:
    """Reads the video that `name` means under `root`.

    Args:
        root: the folder that no name may leave.
        name: a file or a folder, as `picture_paths.resolve_under` takes it.
        limits: of frames and pixels.
        follow_links: whether links inside `root` may lead out of it.

    Returns:
        uint8 [F, H, W, 3].

    Raises:
        SkipSample: "unsafe_path", "missing_file", "too_large", "too_many_pixels", "video_format", "video_decoder" (the
            extra is not installed), "broken_video", "frame_sizes", or a reason of `images.open_under` for a frame.
    """
    path = resolve_under(root, name, follow_links)
    if path.is_dir():
        files = [f"{name.rstrip('/')}/{file}" for file in frame_files(path)]
        return stack_frames(
            files, lambda file: open_under(root, file, limits.max_pixels, follow_links), limits, repr(name[:200])
        )
    return read_video_file(path, limits, shown=name)


def read_video(path: Path, limits: VideoLimits, shown: str = "") -> np.ndarray:
    """Reads a video from a file, or from a folder of frames, that the user named: uint8 [F, H, W, 3].

    Raises:
        SkipSample: as `open_video_under`.
    """
    if not path.is_dir():
        return read_video_file(path, limits, shown)
    files = [path / file for file in frame_files(path)]
    return stack_frames(files, lambda file: read_image(file, limits.max_pixels), limits, repr(shown or str(path)))


def read_video_file(path: Path, limits: VideoLimits, shown: str = "") -> np.ndarray:
    """Reads a video from one file, as uint8 [F, H, W, 3]; `shown` is its name in messages.

    Raises:
        SkipSample: as `open_video_under`.
    """
    shown = repr((shown or str(path))[:200])
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.EINVAL, errno.EISDIR, errno.ENXIO):
            raise SkipSample("unsafe_path", f"{shown} is not a regular file") from None
        raise SkipSample("missing_file", f"{shown}: {getattr(error, 'strerror', None) or error}") from None
    with file:
        return decode_video(file, limits, shown)


def decode_video(source: BinaryIO | bytes, limits: VideoLimits, shown: str = "the video") -> np.ndarray:
    """Decodes a video in one file, or its bytes, to uint8 [F, H, W, 3]; `shown` is its name in messages.

    Raises:
        SkipSample: "too_large", "too_many_pixels", "video_format", "video_decoder", "broken_video".
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        head = file.read(_HEAD_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if head.startswith(b"\x93NUMPY"):
            return _read_array(file, size, limits, shown)
        if head.startswith(b"GIF8") or (head.startswith(b"RIFF") and head[8:12] == b"WEBP"):
            return _read_animation(file, size, limits, shown)
        kind = next((kind for start, kind in MOVIE_KINDS if re.match(start, head, re.DOTALL)), None)
        if kind is not None:
            return read_movie(file, kind, limits, shown)
    except SkipSample:
        raise
    except Exception as error:  # a hostile file can make a decoder raise nearly anything
        raise SkipSample("broken_video", f"{shown}: {type(error).__name__}: {error}") from None
    raise SkipSample("video_format", f"{shown} is not {_EXPECTED}{_kind(head)}")


_EXPECTED = "a folder of frames, an animated WebP or GIF, an .npy array, or an MP4, MOV, Matroska, WebM or AVI file"
_FOREIGN = (
    (b"\xff\xd8\xff", "it is a JPEG picture: name it in `image`"),
    (b"\x89PNG", "it is a PNG picture: name it in `image`"),
    (b"PK\3\4", "it is a zip archive, perhaps .npz: store the array with numpy.save"),
    (b"\x80", "perhaps it is a pickle, which is never read: store the array with numpy.save"),
    (b"version https://git-lfs", "it is a Git LFS pointer: fetch the file itself, with `git lfs pull`"),
)


def _kind(head: bytes) -> str:
    if not head:
        return "; it is empty"
    return next((f"; {what}" for start, what in _FOREIGN if head.startswith(start)), "")


# --- pictures as frames -----------------------------------------------------------------------------------------------


def frame_files(folder: Path) -> list[str]:
    """Returns the names of the picture files in a folder, in natural order; hidden and other files are left out.

    Raises:
        SkipSample: "missing_file", "broken_video" (there is none).
    """
    try:
        names = [name for name in os.listdir(folder) if _FRAME_FILE.fullmatch(name) and not name.startswith(".")]
    except OSError as error:
        raise SkipSample("missing_file", f"{folder.name!r}: {error.strerror or error}") from None
    if not names:
        raise SkipSample("broken_video", f"the folder {folder.name!r} holds no JPEG, PNG, WebP or GIF file")
    return sorted(names, key=_natural)


def _natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts the numbers in names by their values."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def stack_frames(
    frames: Sequence[FrameT], decode: Callable[[FrameT], np.ndarray], limits: VideoLimits, shown: str
) -> np.ndarray:
    """Decodes the frames that are used and stacks them to uint8 [F, H, W, 3].

    Args:
        frames: all frames of the video, in order, as `decode` takes them.
        decode: frame -> uint8 [H, W, 3]; may raise `SkipSample`.
        limits: of frames and pixels.
        shown: the video's name in messages.

    Raises:
        SkipSample: as `decode`; "broken_video", "too_large", "too_long", "too_many_pixels", "frame_sizes".
    """
    decoded: list[np.ndarray] = []
    numbers = limits.numbers(len(frames), shown)
    for number in numbers:
        pixels = decode(frames[number])
        if not decoded:
            limits.check(len(numbers), pixels.shape[0], pixels.shape[1], shown)
        elif pixels.shape != decoded[0].shape:
            (height, width), (first_height, first_width) = pixels.shape[:2], decoded[0].shape[:2]
            raise SkipSample(
                "frame_sizes",
                f"{shown}: frame {number} is {width}x{height}, the first frame {first_width}x{first_height};"
                " expected frames of one size",
            )
        decoded.append(pixels)
    return np.stack(decoded)


# --- single files -----------------------------------------------------------------------------------------------------


def _read_array(file: BinaryIO, size: int, limits: VideoLimits, shown: str) -> np.ndarray:
    """Reads the frames that are used out of an `.npy` file; the others are skipped on disk."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise SkipSample("video_format", f"{shown} has version {version} of NumPy's format; expected 1.0 or 2.0")
    shape, fortran_order, dtype = readers[version](file)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran_order:
        order = " in Fortran's order" if fortran_order else ""
        raise SkipSample("video_format", f"{shown} holds {dtype} {shape}{order}; expected uint8 (frames, H, W, 3)")
    numbers = limits.numbers(shape[0], shown)
    limits.check(len(numbers), shape[1], shape[2], shown)
    start, frame_bytes = file.tell(), shape[1] * shape[2] * 3
    if start + shape[0] * frame_bytes > size:
        raise SkipSample("broken_video", f"{shown} is cut off: {size} bytes hold no array {shape}")
    video = np.empty((len(numbers), *shape[1:]), np.uint8)
    for place, number in enumerate(numbers):
        file.seek(start + number * frame_bytes)
        video[place] = np.frombuffer(file.read(frame_bytes), np.uint8).reshape(shape[1:])
    return video


def _read_animation(file: BinaryIO, size: int, limits: VideoLimits, shown: str) -> np.ndarray:
    if size > _MAX_ANIMATION_BYTES:
        raise SkipSample("too_large", f"{shown} has more than {_MAX_ANIMATION_BYTES} bytes")
    if not _ends_as_gif(file):
        raise SkipSample("broken_video", f"{shown} is cut off")
    try:
        image = Image.open(file, formats=("GIF", "WEBP"))
    except Image.DecompressionBombError:
        raise SkipSample("too_many_pixels", f"{shown}: at most {limits.max_pixels} pixels are allowed") from None
    with image:
        width, height = image.size
        limits.check(1, height, width, shown)
        stored = getattr(image, "n_frames", 1)
        numbers = limits.numbers(stored, shown)
        limits.check(len(numbers), height, width, shown)
        if stored * height * width > _MAX_ANIMATION_PIXELS:
            raise SkipSample("too_many_pixels", f"{shown}: {stored} frames of {width}x{height}; store them as a folder")
        frames = []
        for number in numbers:
            image.seek(number)
            image.load()
            frames.append(np.asarray(upright_rgb(image)))
        return np.stack(frames)


def _ends_as_gif(file: BinaryIO) -> bool:
    """Returns whether a GIF has all its blocks, and True for another format; goes back to the start.

    Pillow takes a GIF that is cut off between two frames, or inside one, as a shorter animation.
    """
    head = file.read(13)
    if head.startswith(b"GIF8") and len(head) == 13:
        _skip_colors(file, head[10])
        while (block := file.read(1)) == b"\x2c" or block == b"\x21":
            if block == b"\x2c":  # a frame: its place, its colors, the width of its codes
                _skip_colors(file, (file.read(9) or b"\0")[-1])
            file.read(1)
            while length := file.read(1)[:1]:
                if length == b"\0":
                    break
                file.seek(length[0], os.SEEK_CUR)
        file.seek(0)
        return block == b"\x3b"
    file.seek(0)
    return not head.startswith(b"GIF8")


def _skip_colors(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << ((flags & 7) + 1), os.SEEK_CUR)
