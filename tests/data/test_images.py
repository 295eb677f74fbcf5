"""Opening pictures: refusals with their reasons, and the pixels of each kind of file."""

import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visor_jax.data.images import decode_image, open_under, read_image
from visor_jax.data.sample import SkipSample

LIMIT = 1_000_000


def picture(height: int = 40, width: int = 60) -> Image.Image:
    """A smooth picture, so that JPEG changes little."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([4 * x, 5 * y, x + y], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reason_of(root: Path, name: str, max_pixels: int = LIMIT) -> str:
    with pytest.raises(SkipSample) as caught:
        open_under(root, name, max_pixels)
    return caught.value.reason


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """tmp/data with a valid picture in a folder, and a secret file outside of it."""
    (tmp_path / "data" / "folder").mkdir(parents=True)
    picture().save(tmp_path / "data" / "folder" / "good.png")
    picture().save(tmp_path / "secret.png")
    return tmp_path / "data"


def test_reads_what_is_there(root: Path) -> None:
    pixels = open_under(root, "folder/good.png", LIMIT)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(picture()))
    np.testing.assert_array_equal(read_image(root / "folder" / "good.png", LIMIT), pixels)


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "folder/../../secret.png", "/etc/passwd", "~/x.png", "~root/x.png",
     "file:///etc/passwd", "https://example.org/a.png", "data:image/png;base64,AAAA", "folder/good.png\0.jpg", "",
     "folder"],
)  # fmt: skip
def test_paths_that_are_refused(root: Path, name: str) -> None:
    assert reason_of(root, name) == "unsafe_path"


@pytest.mark.parametrize("name", ["nothing.png", "folder/good.png/x.png", "x" * 5000 + ".png", "\ud800.png"])
def test_missing_files(root: Path, name: str) -> None:
    assert reason_of(root, name) == "missing_file"


def test_links_may_not_leave_the_root(root: Path) -> None:
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "outer").symlink_to(root.parent)
    (root / "in.png").symlink_to(root / "folder" / "good.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    assert reason_of(root, "out.png") == reason_of(root, "outer/secret.png") == "unsafe_path"
    assert reason_of(root, "loop.png") == "missing_file"
    assert open_under(root, "in.png", LIMIT).shape == (40, 60, 3)


def test_a_root_that_is_itself_a_link_is_fine(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    assert open_under(root.parent / "alias", "folder/good.png", LIMIT).shape == (40, 60, 3)


def test_a_fifo_is_refused_without_waiting_for_a_writer(root: Path) -> None:
    os.mkfifo(root / "pipe.png")
    reasons: list[str] = []
    thread = threading.Thread(target=lambda: reasons.append(reason_of(root, "pipe.png")), daemon=True)
    thread.start()
    thread.join(5)
    assert reasons == ["unsafe_path"]
    with pytest.raises(SkipSample, match="not a regular file"):
        read_image(Path("/dev/zero"), LIMIT)


@pytest.mark.parametrize("format", ["TIFF", "BMP", "PPM"])
def test_the_content_decides_not_the_name(root: Path, format: str) -> None:
    (root / "named.jpg").write_bytes(encoded(picture(), format))
    assert reason_of(root, "named.jpg") == "image_format"


@pytest.mark.parametrize("content", [b"", b"<svg/>", b"%PDF-1.7", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", bytes(range(64))])
def test_no_picture_at_all(root: Path, content: bytes) -> None:
    (root / "x.png").write_bytes(content)
    assert reason_of(root, "x.png") in ("image_format", "broken_image")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML page.* download it again"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "convert it"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "of another kind: convert it"),
        (b"BM" + bytes(99), "of another kind: convert it"),
        (b"II*\0" + bytes(99), "of another kind: convert it"),
        (b"%PDF-1.7", "PDF"),
        (b"\x1f\x8b" + bytes(99), "unpack it"),
        (b"nothing that is known", "GIF file$"),
    ],
)
def test_what_is_no_picture_is_named(root: Path, content: bytes, message: str) -> None:
    (root / "x.jpg").write_bytes(content)
    with pytest.raises(SkipSample, match=message) as caught:
        read_image(root / "x.jpg", LIMIT)
    assert caught.value.reason == "image_format"


def png_bomb(width: int, height: int) -> bytes:
    """Returns a PNG of a few bytes that declares a large picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1001, 1000), (10_000, 10_000), (60_000, 60_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_pixel_limit_holds_before_decoding(
    root: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "bomb.png").write_bytes(png_bomb(*size))

    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    assert reason_of(root, "bomb.png") == "too_many_pixels"


def test_a_picture_exactly_at_the_limit_is_read(root: Path) -> None:
    assert open_under(root, "folder/good.png", 40 * 60).shape == (40, 60, 3)
    assert reason_of(root, "folder/good.png", 40 * 60 - 1) == "too_many_pixels"


@pytest.mark.parametrize("format, options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})])
def test_a_file_that_ends_early_is_broken_never_half_a_picture(format: str, options: dict[str, object]) -> None:
    whole = encoded(picture(300, 200), format, **options)
    expected = decode_image(io.BytesIO(whole), LIMIT)
    refused = 0
    for length in np.linspace(0, len(whole) - 1, 120).astype(int):
        try:
            pixels = decode_image(io.BytesIO(whole[:length]), LIMIT)
        except SkipSample:
            refused += 1
        else:  # only the end marker is missing
            np.testing.assert_array_equal(pixels, expected, err_msg=str(length))
    assert refused >= 117


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees
    pixels = decode_image(io.BytesIO(encoded(picture(), "PNG", exif=exif)), LIMIT)
    np.testing.assert_array_equal(pixels, np.rot90(np.asarray(picture()), -1))


def test_every_mode_becomes_rgb() -> None:
    red_half = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    clear_palette = Image.new("P", (2, 1), 1)
    clear_palette.putpalette([0, 0, 0, 10, 20, 30])
    cases = {
        "L": (Image.new("L", (2, 1), 77), {}, (77, 77, 77)),
        "1": (Image.new("1", (2, 1), 1), {}, (255, 255, 255)),
        "P": (clear_palette, {}, (10, 20, 30)),
        "P with a transparent color": (clear_palette, {"transparency": 1}, (255, 255, 255)),
        "RGB with a transparent color": (
            Image.new("RGB", (2, 1), (1, 2, 3)),
            {"transparency": (1, 2, 3)},
            (255, 255, 255),
        ),
        "RGBA": (red_half, {}, (255, 127, 127)),
        "LA": (Image.new("LA", (2, 1), (0, 0)), {}, (255, 255, 255)),
        "I;16": (Image.fromarray(np.full((1, 2), 0x8040, np.uint16)), {}, (0x80, 0x80, 0x80)),
    }
    for name, (image, options, expected) in cases.items():
        pixels = decode_image(io.BytesIO(encoded(image, "PNG", **options)), LIMIT)
        assert pixels.shape == (1, 2, 3) and pixels.dtype == np.uint8, name
        assert pixels[0, 0].tolist() == list(expected), name


def test_cmyk_jpeg() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    red = decode_image(io.BytesIO(encoded(cmyk, "JPEG", quality=95)), LIMIT)[8, 8]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("blue", "red")]
    for format in ("PNG", "WEBP"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert decode_image(io.BytesIO(data), LIMIT)[4, 4].tolist() == [0, 0, 255]


def test_odd_metadata_does_no_harm() -> None:
    expected = decode_image(encoded(picture(), "JPEG"), LIMIT)
    for options in ({"icc_profile": b"nonsense"}, {"exif": b"Exif\0\0" + b"\xff" * 60_000}):
        np.testing.assert_array_equal(decode_image(encoded(picture(), "JPEG", **options), LIMIT), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    pixels = decode_image(io.BytesIO(encoded(Image.new("RGB", size, "white"), "PNG")), LIMIT)
    assert pixels.shape == (size[1], size[0], 3)


# --- metadata ---------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes, right: bool = True) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ (not right))


def png_with(*chunks: bytes, at: int = 33) -> bytes:
    """Returns the PNG with chunks inserted after its header, or before its end (`at=-12`)."""
    whole = encoded(picture(), "PNG")
    return whole[:at] + b"".join(chunks) + whole[at:]


def exif_block(orientation: int, *entries: bytes) -> bytes:
    """Returns a TIFF block with one directory: the orientation and other entries of 12 bytes."""
    first = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 1 + len(entries)) + first + b"".join(entries) + bytes(4)


HUGE = zlib.compress(bytes(70 << 20), 1)
BAD_OFFSET = struct.pack("<HHII", 0x0132, 2, 20, 0xFFFFFF00)  # a date far outside the block
BAD_KIND = struct.pack("<HHII", 0x013B, 99, 7, 7)
WITH_METADATA = {
    "large profile": png_with(chunk(b"iCCP", b"icc\0\0" + HUGE)),
    "large comment": png_with(chunk(b"zTXt", b"Comment\0\0" + HUGE)),
    "large comment behind": png_with(chunk(b"zTXt", b"Comment\0\0" + HUGE), at=-12),
    "broken comment": png_with(chunk(b"zTXt", b"Comment\0\0nonsense")),
    "wrong checksum": png_with(chunk(b"tEXt", b"Comment\0abc", right=False)),
    "wrong checksum behind": png_with(chunk(b"tEXt", b"Comment\0abc", right=False), at=-12),
    "wrong checksum of transparency": png_with(chunk(b"tRNS", bytes(6), right=False)),
    "invalid EXIF, PNG": png_with(chunk(b"eXIf", b"garbage")),
    "invalid EXIF, WebP": encoded(picture(), "WEBP", lossless=True, exif=b"garbage"),
}


@pytest.mark.parametrize("name", WITH_METADATA)
def test_metadata_costs_no_picture_whose_pixels_are_whole(name: str) -> None:
    pixels = decode_image(io.BytesIO(WITH_METADATA[name]), LIMIT)
    np.testing.assert_array_equal(pixels, np.asarray(picture()))


@pytest.mark.parametrize("entries", [(), (BAD_OFFSET,), (BAD_KIND,), (BAD_OFFSET, BAD_KIND)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_holds_whatever_else_is_wrong(format: str, entries: tuple[bytes, ...]) -> None:
    block = exif_block(6, *entries)
    plain = decode_image(encoded(picture(), format), LIMIT)
    data = (
        png_with(chunk(b"eXIf", block), chunk(b"tEXt", b"a", right=False))
        if format == "PNG"
        else encoded(picture(), format, exif=b"Exif\0\0" + block)
    )
    np.testing.assert_array_equal(decode_image(data, LIMIT), np.rot90(plain, -1))


def test_a_jpeg_is_read_without_its_metadata_where_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in CMYK, where an Adobe segment defines the channels."""
    from PIL import JpegImagePlugin

    def broken(*_: object) -> None:
        raise KeyError("malformed")

    for image in (picture(), picture().convert("CMYK")):
        data = encoded(image, "JPEG", comment=b"hello", exif=b"Exif\0\0" + exif_block(1))
        expected = decode_image(data, LIMIT)
        with monkeypatch.context() as patch:
            patch.setitem(JpegImagePlugin.MARKER, 0xFFE1, ("APP1", "", broken))
            patch.setitem(JpegImagePlugin.MARKER, 0xFFFE, ("COM", "", broken))
            np.testing.assert_array_equal(decode_image(data, LIMIT), expected)


@pytest.mark.parametrize("name", ["wrong checksum", "large comment", "invalid EXIF, PNG"])
def test_a_second_attempt_makes_no_broken_picture_whole(name: str) -> None:
    whole = WITH_METADATA[name]
    data = bytearray(whole[: len(whole) - 40])
    with pytest.raises(SkipSample) as caught:
        decode_image(bytes(data), LIMIT)
    assert caught.value.reason == "broken_image"
    with pytest.raises(SkipSample, match="60x40"):
        decode_image(whole, 40 * 60 - 1)


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_gifs_are_read_by_content(root: Path) -> None:
    frames = [Image.new("P", (9, 7), shade) for shade in (3, 1)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 255, 0, 0, 9, 9, 9, 10, 20, 30])
    (root / "cover.jpg").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    pixels = open_under(root, "cover.jpg", LIMIT)
    assert pixels.shape == (7, 9, 3) and (pixels == (10, 20, 30)).all()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80), np.uint8))
    whole = encoded(noise, "GIF")
    with pytest.raises(SkipSample) as caught:
        decode_image(whole[: len(whole) // 2], LIMIT)
    assert caught.value.reason == "broken_image"


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 0x0FFF], [0, 255]),  # 12 bits
        ([0, 0x0010, 0x0800], [0, 1, 128]),
        ([0, 0x03FF], [0, 255]),  # 10 bits
        ([0, 200], [0, 200]),  # 8 bits in a 16-bit file
        ([0, 3], [0, 3]),  # darker values stay dark
        ([0x1000, 0xFFFF], [0x10, 255]),
    ],
)
def test_deep_gray_is_scaled_by_the_bits_it_uses(values: list[int], expected: list[int]) -> None:
    data = encoded(Image.fromarray(np.array([values], np.uint16)), "PNG")
    assert decode_image(data, LIMIT)[0, :, 0].tolist() == expected


# --- pictures that are not files --------------------------------------------------------------------------------------


def test_files_bytes_and_opened_pictures_are_read_alike() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0" + exif_block(3))
    expected = decode_image(io.BytesIO(data), LIMIT)
    for source in (data, bytearray(data), memoryview(data), Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(decode_image(source, LIMIT), expected)
    deep = Image.new("I", (2, 2), 7)  # not a format that is read from files
    assert decode_image(deep, LIMIT).tolist() == [[[7, 7, 7]] * 2] * 2
    with pytest.raises(SkipSample, match=r"floating-point pixels.*convert it to 8 bits"):  # range 1 or 255?
        decode_image(Image.fromarray(np.full((2, 2), 0.5, np.float32)), LIMIT)
    with pytest.raises(SkipSample, match="has no pixels"):
        decode_image(Image.new("RGB", (0, 2)), LIMIT)
    for source in (data[:700], Image.open(io.BytesIO(data[:700]))):
        with pytest.raises(SkipSample) as caught:
            decode_image(source, LIMIT)
        assert caught.value.reason == "broken_image"
    with pytest.raises(SkipSample, match="60x40"):
        decode_image(Image.open(io.BytesIO(data)), 40)


@pytest.mark.parametrize(
    "start", [b"RIFF\xff\xff\xff\x7fWEBPVP8 ", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a"]
)
def test_a_sparse_giant_is_refused_by_its_size(root: Path, start: bytes) -> None:
    with (root / "giant.png").open("wb") as file:
        file.write(start)
        file.truncate(3 << 30)

    assert reason_of(root, "giant.png") == "too_large"


def test_a_large_jpeg_may_be_decoded_at_a_fraction_of_its_size(root: Path) -> None:
    """The reason why `data.reduced_jpeg` is off: shape and look stay, and tiles differ from those of the whole."""
    smooth = picture(20, 30).resize((600, 400), Image.Resampling.BICUBIC)
    (root / "large.jpg").write_bytes(encoded(smooth, "JPEG", quality=95))
    shapes = [open_under(root, "large.jpg", 10**6, reduce_to=side).shape[:2] for side in (0, 401, 399, 200, 100, 1)]
    assert shapes == [(400, 600), (400, 600), (400, 600), (200, 300), (100, 150), (50, 75)]
    whole, half = (open_under(root, "large.jpg", 10**6, reduce_to=side) for side in (0, 200))
    tiles = [np.asarray(Image.fromarray(x).resize((96, 96), Image.Resampling.BICUBIC), int) for x in (whole, half)]
    difference = np.abs(tiles[0] - tiles[1])
    assert difference.max() > 0 and difference.mean() < 4
    (root / "large.png").write_bytes(encoded(smooth, "PNG"))
    assert open_under(root, "large.png", 10**6, reduce_to=100).shape[:2] == (400, 600)
