"""Failures of a run's environment: full disks, missing permissions, impossible names.

The error is one line with the path; the exit status is 2 if the request can never succeed, 1 if a resource ran out
while running. No file is written partially.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from visor_jax.__main__ import main
from visor_jax.errors import RequestError, RunError, from_os_error, unwritable

pytestmark = pytest.mark.usefixtures("quick")


# --- permissions and limits of this process ---------------------------------------------------------------------------


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


OVERRIDE = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root bypasses file permissions


@contextlib.contextmanager
def ordinary_rights() -> Iterator[None]:
    """Makes file permissions apply to this thread inside the block, also for root."""
    libc, header, sets = ctypes.CDLL(None, use_errno=True), _Header(0x20080522, 0), (_Sets * 2)()
    if os.geteuid() != 0:
        yield
        return
    assert libc.capget(ctypes.byref(header), sets) == 0, os.strerror(ctypes.get_errno())
    before = sets[0].effective
    sets[0].effective = before & ~OVERRIDE
    assert libc.capset(ctypes.byref(header), sets) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        sets[0].effective = before
        libc.capset(ctypes.byref(header), sets)


@contextlib.contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        with ordinary_rights():
            yield
    finally:
        path.chmod(before)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Simulates a disk that is full after `size` bytes of each file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rights_hold_in_these_tests(tmp_path: Path) -> None:
    with mode(tmp_path, 0), pytest.raises(PermissionError):
        (tmp_path / "a").write_text("")
    (tmp_path / "a").write_text("")


# --- the table --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Runs `command` on a copy of a run; `around` prepares the environment from the run and an empty folder."""

    command: str
    around: Callable[[Path, Path], Any]
    status: int
    message: str


def without(*names: str) -> Callable[[Path], None]:
    def remove(run: Path) -> None:
        for name in names:
            shutil.rmtree(run / name, ignore_errors=True)

    return remove


def rights(name: str, bits: int, *removed: str) -> Callable[[Path, Path], Any]:
    def around(run: Path, tmp: Path) -> Any:
        without(*removed)(run)
        return mode(run / name, bits)

    return around


def full(size: int, *removed: str) -> Callable[[Path, Path], Any]:
    def around(run: Path, tmp: Path) -> Any:
        without(*removed)(run)
        return largest_file(size)

    return around


def lock(content: str | None) -> Callable[[Path, Path], Any]:
    def around(run: Path, tmp: Path) -> Any:
        if content is None:
            (run / "lock.json").mkdir()
        else:
            (run / "lock.json").write_text(content)
        return contextlib.nullcontext()

    return around


def as_it_is(run: Path, tmp: Path) -> Any:
    return contextlib.nullcontext()


def own_data(run: Path, tmp: Path) -> Any:
    """Writes a data set in a folder without permission to enter it."""
    (tmp / "data").mkdir()
    (tmp / "data" / "train.json").write_text("[]")
    return mode(tmp / "data", 0)


HERE = "--workdir={run}"
BASE = "train --config={tmp}/tiny.py --config.stage=base --workdir="
TRAIN = f"train {HERE} --config.stage=policy"
ASK = f"generate {HERE} --image={{tmp}}/red.png --question=What? --max-new-tokens=1"
LOCK = {"host": "x", "pid": -1, "token": "t"}
CASES = {
    # The disk is full.
    "claim": Case(TRAIN, full(1000), 1, "config.json: File too large"),
    "metrics": Case(TRAIN, full(8000, "policy"), 1, "saving failed (3 in a row)"),
    "evaluate": Case(f"evaluate {HERE}", full(500, "eval"), 1, "eval/"),
    "report": Case(f"report {HERE}", full(1000, "report"), 1, "report/"),
    "export": Case(f"export {HERE} --out={{tmp}}/out", full(9000), 1, "--out={tmp}/out: cannot be written: "),
    "export, its weights": Case(
        f"export {HERE} --out={{tmp}}/out", full(200_000), 1, "--out={tmp}/out: cannot be written: "
    ),
    "label": Case(f"label {HERE}", full(300, "labels"), 1, ": File too large"),
    "search": Case(f"search {HERE}", full(300, "search"), 1, ": File too large"),
    # The folder is read-only.
    "train, read-only": Case(TRAIN, rights("", 0o555), 2, "{run}: cannot be written: Permission denied"),
    "run, read-only": Case(f"run {HERE}", rights("", 0o555), 2, "{run}: cannot be written: Permission denied"),
    "evaluate, read-only": Case(f"evaluate {HERE}", rights("eval", 0o555), 2, "eval/chunks: Permission denied"),
    "report, read-only": Case(f"report {HERE}", rights("", 0o555, "report"), 2, "report: Permission denied"),
    "export, read-only": Case(f"export {HERE}", rights("", 0o555, "export"), 2, "cannot be written"),
    "generate, read-only": Case(ASK, rights("", 0o555), 0, ""),
    "export elsewhere, read-only": Case(f"export {HERE} --out={{tmp}}/out", rights("", 0o555), 0, ""),
    # Permissions are missing.
    "stage 000": Case(TRAIN, rights("policy", 0), 2, "policy"),
    "stage 555": Case(TRAIN, rights("full", 0o555, "full/checkpoints"), 0, ""),
    "new stage 555": Case(f"train {HERE} --config.stage=full", lambda run, tmp: unwritable_stage(run), 2, "full"),
    "config 000, train": Case(TRAIN, rights("config.json", 0), 2, "config.json"),
    "config 000, generate": Case(ASK, rights("config.json", 0), 2, "config.json"),
    "config 000, report": Case(f"report {HERE}", rights("config.json", 0), 2, "config.json"),
    "labels 000": Case(TRAIN, rights("labels/labels.npz", 0, "policy"), 2, "labels.npz"),
    "data 000": Case("data check --config={tmp}/own.py", own_data, 2, "data"),
    "picture 000": Case(ASK, lambda run, tmp: mode(tmp / "red.png", 0), 2, "red.png"),
    # Impossible names.
    "long name": Case(BASE + "{tmp}/" + "n" * 300, as_it_is, 2, "too long"),
    "long path": Case(BASE + "{tmp}/" + "n/" * 2030, as_it_is, 2, "too long"),
    "a file": Case(BASE + "{tmp}/red.png", as_it_is, 2, "red.png"),
    "below a file": Case(BASE + "{tmp}/red.png/x", as_it_is, 2, "red.png/x"),
    "no file system": Case(BASE + "/proc/x", as_it_is, 2, "/proc/x"),
    "a device": Case(BASE + "/dev/full", as_it_is, 2, "/dev/full"),
    "odd name": Case("report --workdir={tmp}/odd", lambda run, tmp: odd(run, tmp), 0, ""),
    # Locks that were not written by a run.
    "lock a folder": Case(TRAIN, lock(None), 2, "lock.json"),
    "lock nested": Case(TRAIN, lock("[" * 60_000), 0, ""),
    "lock of no process": Case(TRAIN, lock(json.dumps(LOCK)), 0, ""),
    "lock of digits": Case(TRAIN, lock('{"pid": ' + "9" * 5000 + "}"), 0, ""),
}
SLOW = (
    "metrics",
    "evaluate",
    "export",
    "export, its weights",
    "label",
    "search",
    "export elsewhere, read-only",
    "evaluate, read-only",
)


def unwritable_stage(run: Path) -> Any:
    """Replaces a stage's folder by an empty one without write permission."""
    shutil.rmtree(run / "full")
    (run / "full").mkdir()
    return mode(run / "full", 0o555)


def odd(run: Path, tmp: Path) -> Any:
    (tmp / "odd").symlink_to(run.rename(tmp / "a b 'c' %s {x} $HOME; ü"), target_is_directory=True)
    return contextlib.nullcontext()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_one_line_and_the_right_status(
    name: str, tiny_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visor_jax.workdir.lock.WATCH_SECONDS", 0.1)
    command, around, status, message = CASES[name]
    tmp = tmp_path / "more"
    tmp.mkdir()
    Image.new("RGB", (48, 48), "red").save(tmp / "red.png")
    (tmp / "tiny.py").write_text("from visor_jax.testing import tiny_config as get_config\n")
    changes = {"data.source": "llava", "data.root": str(tmp / "data"), "data.path": "train.json", "stages": ("full",)}
    (tmp / "own.py").write_text(
        f"from visor_jax.testing import tiny_config\ndef get_config():\n    return tiny_config({changes!r})\n"
    )
    places = {"run": tiny_copy, "tmp": tmp}
    capsys.readouterr()
    with around(tiny_copy, tmp):
        ended = main([argument.format(**places) for argument in command.split()])
    err = capsys.readouterr().err
    assert ended == status and "Traceback" not in err, err
    if status:
        *_, last = [line for line in err.splitlines() if line.startswith("visor: ")]
        assert message.format(**places) in last and err.endswith(last + "\n"), err
    litter = [path for path in tmp_path.rglob(".*") if path.name.endswith((".tmp", ".partial", ".old"))]
    assert not litter
    assert status == 0 or not (tmp / "out").exists()


# --- the mechanism ----------------------------------------------------------------------------------------------------

REQUEST_ERRNOS = "ENOENT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP"
OUT = "ENOSPC", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE"


@pytest.mark.parametrize("name", [*REQUEST_ERRNOS, *OUT])
def test_errors_of_the_system_by_number(name: str) -> None:
    kind, number = RequestError if name in REQUEST_ERRNOS else RunError, getattr(errno, name)
    error = from_os_error(OSError(number, os.strerror(number), "/some/where\n.json"))
    assert type(error) is kind and str(error) == f"/some/where\n.json: {os.strerror(number)}"
    assert type(unwritable("--out=x", OSError(number, os.strerror(number)))) is kind


def test_errors_without_a_path() -> None:
    """An exhausted resource is reported in one line; any other error is a defect and keeps its traceback."""
    assert str(from_os_error(OSError(errno.ENOSPC, "No space left on device"))) == "No space left on device"
    assert from_os_error(OSError(errno.EBADF, "Bad file descriptor")) is None
    assert from_os_error(OSError("in words")) is None
    assert str(from_os_error(OSError(errno.ENOSPC, "No space left on device", b"/a"))) == "/a: No space left on device"
