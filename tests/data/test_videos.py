"""Videos: which kinds are read, which frames are used, and what is refused under which reason."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visor_jax.data import video_limits, videos
from visor_jax.data.sample import SkipSample
from visor_jax.data.video_limits import VideoLimits
from visor_jax.data.videos import decode_video, open_video_under

FRAMES = 11
GRAY = [20 * number for number in range(FRAMES)]
LIMITS = VideoLimits(max_frames=4)
EVENLY = [0, 60, 120, 200]  # frames 0, 3, 6, 10 of 11


def frame(gray: int, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, (gray, gray, gray))


def animation(kind: str, frames: list[Image.Image]) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=40, **options)
    return buffer.getvalue()


def array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=values.dtype == object)
    return buffer.getvalue()


def video(frames: int = FRAMES, height: int = 6, width: int = 8) -> np.ndarray:
    gray = 20 * np.arange(frames, dtype=np.uint8)
    return np.broadcast_to(gray[:, None, None, None], (frames, height, width, 3))


def reason_of(source: bytes, limits: VideoLimits = LIMITS) -> str:
    with pytest.raises(SkipSample) as caught:
        decode_video(source, limits)
    return f"{caught.value.reason}: {caught.value.detail}"


@pytest.mark.parametrize(
    "most, expected",
    [(1, [0]), (2, [0, 10]), (3, [0, 5, 10]), (4, [0, 3, 6, 10]), (11, list(range(11))), (99, list(range(11)))],
)
def test_frames_are_spaced_evenly_from_the_first_to_the_last(most: int, expected: list[int]) -> None:
    assert VideoLimits(most).numbers(FRAMES, "") == expected


@pytest.mark.parametrize("kind", ["folder", "WEBP", "GIF", "npy"])
def test_every_kind_gives_the_same_frames(kind: str, tmp_path: Path) -> None:
    frames = [frame(gray) for gray in GRAY]
    if kind == "folder":
        (tmp_path / "clip").mkdir()
        for number, picture in enumerate(frames):
            picture.save(tmp_path / "clip" / f"f{number}.png")  # f10 comes after f9, not after f1
        for other in (".hidden.png", "Thumbs.db", "notes.txt"):
            (tmp_path / "clip" / other).write_bytes(b"x")
    else:
        (tmp_path / "clip").write_bytes(array(video()) if kind == "npy" else animation(kind, frames))
    read = open_video_under(tmp_path, "clip", LIMITS)
    assert read.shape == (4, 6, 8, 3) and read.dtype == np.uint8
    np.testing.assert_array_equal(read, np.broadcast_to(np.uint8(EVENLY)[:, None, None, None], read.shape))


def test_an_animation_of_one_frame_is_a_video_of_one_frame() -> None:
    assert decode_video(animation("GIF", [frame(20)]), LIMITS).shape == (1, 6, 8, 3)


PICKLE = b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR."


@pytest.mark.parametrize(
    "source, expected",
    [
        (b"", "video_format: the video is not a folder of frames.*it is empty"),
        (b"text", "video_format"),
        (PICKLE, "video_format: .*pickle, which is never read"),
        (array(np.array([object()])), "video_format: .*holds object"),
        (array(video().astype(np.float32)), r"video_format: .*float32 \(11, 6, 8, 3\).*expected uint8"),
        (array(video()[..., :1]), "video_format"),
        (array(video()[0]), "video_format"),
        (array(np.asfortranarray(video())), "video_format: .*Fortran"),
        (array(video(0)), "broken_video: the video has no frame"),
        (array(video(3, 0)), "broken_video: .*no pixels"),
        (array(video())[:-1], "broken_video: .*cut off"),
        (array(video())[:20], "broken_video"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr': __import__('os').system('touch canary')", "broken_video"),
        (animation("GIF", [frame(gray) for gray in GRAY])[:-40], "broken_video"),
        (animation("WEBP", [frame(gray) for gray in GRAY])[:-40], "broken_video"),
        (b"GIF89a", "broken_video"),
        (b"PK\3\4", "video_format: .*numpy.save"),
        (b"\xff\xd8\xff\xe0", "video_format: .*name it in `image`"),
    ],
)
def test_what_is_no_video_is_refused(
    source: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = reason_of(source)
    assert re.match(expected, found), found
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "npy"])
def test_sizes_are_checked_before_anything_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = array(video()) if kind == "npy" else animation(kind, [frame(gray) for gray in GRAY])
    monkeypatch.setattr(videos, "upright_rgb", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("decoded"))
    assert reason_of(source, VideoLimits(4, max_pixels=47)).startswith("too_many_pixels: the video is 8x6")
    message = reason_of(source, VideoLimits(4, room=4 * 48 - 1))
    assert message.startswith("too_many_pixels") and "4 frames of 8x6" in message and "data.max_frames" in message
    monkeypatch.setattr(video_limits, "MAX_STORED_FRAMES", FRAMES - 1)
    assert reason_of(source).startswith("too_large: the video has 11 frames")


def test_animations_are_bounded_by_all_their_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    source = animation("GIF", [frame(gray) for gray in GRAY])
    monkeypatch.setattr(videos, "_MAX_ANIMATION_PIXELS", FRAMES * 48 - 1)
    assert reason_of(source).startswith("too_many_pixels")
    monkeypatch.setattr(videos, "_MAX_ANIMATION_BYTES", len(source) - 1)
    assert reason_of(source).startswith("too_large")


def test_frames_of_a_folder_stay_inside_and_are_equally_large(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "clip").mkdir(parents=True)
    (root / "empty").mkdir()
    frame(0).save(root / "clip" / "1.png")
    frame(0).save(tmp_path / "outside.png")
    (root / "clip" / "2.png").symlink_to(tmp_path / "outside.png")

    def reason(name: Any, limits: VideoLimits = LIMITS) -> str:
        with pytest.raises(SkipSample) as caught:
            open_video_under(root, name, limits)
        return caught.value.reason

    assert reason("clip") == "unsafe_path"
    assert open_video_under(root, "clip", LIMITS, follow_links=True).shape == (2, 6, 8, 3)
    (root / "clip" / "2.png").unlink()
    frame(0, (8, 7)).save(root / "clip" / "2.png")
    assert reason("clip") == "frame_sizes"
    assert reason("clip", VideoLimits(2, room=2 * 48 - 1)) == "too_many_pixels"
    (root / "clip" / "2.png").write_bytes((root / "clip" / "1.png").read_bytes()[:43])
    assert reason("clip") == "broken_image"
    assert [reason(name) for name in ("empty", "gone", "../x")] == ["broken_video", "missing_file", "unsafe_path"]


HEADS = [
    b"GIF89a",
    b"RIFF\0\1\0\0WEBPVP8X",
    b"\x93NUMPY\1\0",
    b"\0\0\0\x20ftypisom",
    b"\x1a\x45\xdf\xa3",
    b"RIFF\0\1\0\0AVI ",
]
WHOLE = [animation("GIF", [frame(gray) for gray in GRAY]), animation("WEBP", [frame(0), frame(9)]), array(video(3))]


@given(
    st.tuples(st.sampled_from(HEADS), st.binary(max_size=200)).map(b"".join)
    | st.tuples(st.sampled_from(WHOLE), st.integers(0, 400), st.binary(max_size=8)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]) :]
    )
)
def test_any_bytes_are_a_video_or_refused(source: bytes) -> None:
    """No other error is raised, and what is read has its limits."""
    try:
        read = decode_video(source, VideoLimits(4, max_pixels=10_000, room=40_000))
    except SkipSample as why:
        assert why.reason and why.detail
        return
    assert read.dtype == np.uint8 and read.ndim == 4 and read.shape[-1] == 3
    assert 0 < read.shape[0] <= 4 and read.size <= 3 * 40_000


# --- MP4 and its like -------------------------------------------------------------------------------------------------


def test_movies_need_the_extra_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "av", None)
    message = reason_of(b"\0\0\0\x20ftypisom" + bytes(40))
    assert message.startswith("video_decoder: ") and "pip install 'visor_jax[video]'" in message


def movie(kind: str, codec: str, frames: int = 40) -> bytes:
    av = pytest.importorskip("av", reason="the extra [video] is not installed")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 12
        for number in range(frames):
            pixels = np.full((48, 64, 3), 6 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


MOVIES = [("mp4", "mpeg4"), ("mov", "mpeg4"), ("matroska", "libvpx"), ("webm", "libvpx"), ("avi", "mpeg4")]


@pytest.mark.parametrize("kind, codec", [*MOVIES, ("mp4", "libx264"), ("avi", "libx264"), ("matroska", "libx264")])
def test_movies_give_the_frames_at_even_places(kind: str, codec: str) -> None:
    data = movie(kind, codec)
    every = decode_video(data, VideoLimits(40))
    assert every.shape == (40, 48, 64, 3)
    means = every.mean((1, 2, 3))
    assert abs(means - 6 * np.arange(40)).max() < 14
    for most in (1, 2, 5, 13):
        limits = VideoLimits(most)
        np.testing.assert_array_equal(decode_video(data, limits), every[limits.numbers(40, "")])  # with seeking


@pytest.mark.parametrize("kind, codec", MOVIES)
def test_broken_and_large_movies_are_refused(kind: str, codec: str) -> None:
    data = movie(kind, codec)
    assert reason_of(data[: len(data) // 2]).startswith("broken_video")
    assert reason_of(data, VideoLimits(4, max_pixels=64 * 48 - 1)).startswith("too_many_pixels")
    assert reason_of(data, VideoLimits(4, room=4 * 64 * 48 - 1)).startswith("too_many_pixels")
    damaged = bytearray(data)
    damaged[300:-300:7] = bytes(len(damaged[300:-300:7]))
    assert re.match("broken_video|video_format", reason_of(bytes(damaged)))
