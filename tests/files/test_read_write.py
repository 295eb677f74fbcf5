"""Files are written completely or not at all, and read only if regular and of bounded size."""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from visor_jax.errors import RequestError, from_os_error
from visor_jax.files.read_write import open_regular, parse_json, read_json, read_regular, write_bytes, write_json

# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_with_its_folders(tmp_path):
    write_bytes(tmp_path / "a" / "b", b"one")
    write_bytes(tmp_path / "a" / "b", b"two")
    assert (tmp_path / "a" / "b").read_bytes() == b"two"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("act", ["os.fsync", "pathlib.Path.replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, act):
    write_bytes(tmp_path / "f", b"old")

    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(act, no_space)
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "f", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", b"old")]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null"), Path.mkdir])
def test_what_is_no_file_is_never_replaced_by_one(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """Replacing /dev/full, as root with --list=/dev/full, would turn the device into a file."""
    make(tmp_path / "x")
    before = (tmp_path / "x").lstat()
    with pytest.raises(OSError, match=r"Not a regular file|Is a directory") as error:
        write_bytes(tmp_path / "x", b"new")
    assert error.value.filename == str(tmp_path / "x") and type(from_os_error(error.value)) is RequestError
    assert (tmp_path / "x").lstat() == before and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_json_has_no_names_for_nan_and_knows_numpy(tmp_path):
    write_json(
        tmp_path / "x.json", {"a": (math.nan, np.float32(0.5)), "b": {1: np.int64(3)}, "c": -math.inf, "d": True}
    )
    assert read_json(tmp_path / "x.json") == {"a": [None, 0.5], "b": {"1": 3}, "c": None, "d": True}


@pytest.mark.parametrize("content", [b"{", b"\xff", b""])
def test_a_damaged_json_file_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RequestError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(RequestError, match="no such file"):
        read_json(tmp_path / "y.json")


# --- reading ----------------------------------------------------------------------------------------------------------


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NOT_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (os.mkfifo, "Not a regular file"),
    "a device that never ends": (lambda path: path.symlink_to("/dev/zero"), "Not a regular file"),
    "a socket": (bind_socket, "No such device"),
    "a folder": (Path.mkdir, "Is a directory"),
    "a sparse giant": (sparse, "File too large: 1,099,511,627,776 bytes, expected at most 16,777,216"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels"),
    "nested lists": (lambda path: path.write_text("[" * 100_000), "not valid JSON: nested too deeply"),
    "nested objects": (lambda path: path.write_text('{"a":' * 100_000), "not valid JSON: nested too deeply"),
    "a number of 5000 digits": (lambda path: path.write_text('{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
}


@pytest.mark.parametrize("name", NOT_FILES)
def test_what_is_no_file_of_json_is_refused_at_once(tmp_path, name):
    make, message = NOT_FILES[name]
    make(tmp_path / "x.json")
    with pytest.raises(RequestError, match=r"x\.json: ") as error:
        read_json(tmp_path / "x.json")
    assert message in str(error.value)


def test_a_file_in_proc_larger_than_its_size_is_refused():
    assert Path("/proc/self/status").stat().st_size == 0
    with pytest.raises(OSError, match="too large") as error:
        read_regular("/proc/self/status", 16)
    assert error.value.errno == errno.EFBIG


def test_the_limit_is_the_callers(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "x.json", max_bytes=8) == {"a": 1}
    with pytest.raises(RequestError, match="File too large: 8 bytes, expected at most 7"):
        read_json(tmp_path / "x.json", max_bytes=7)


def test_a_regular_file_is_opened_through_a_link(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with open_regular(tmp_path / "link", 3) as file:
        assert file.read() == b"abc"


def test_refusing_leaves_no_file_open(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(OSError, match="Not a regular file"):
            open_regular(tmp_path / "fifo")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_byte_order_mark_is_no_part_of_the_json():
    assert parse_json(b"\xef\xbb\xbf{}") == {}
