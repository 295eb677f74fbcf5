"""Leftovers of killed processes are removed only if the process certainly ran here and is dead."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import visor_jax.errors
from visor_jax.files.leftovers import remove_leftovers, remove_leftovers_of, temporary_name
from visor_jax.files.read_write import write_bytes
from visor_jax.workdir.lock import WorkdirLock

ROOT = Path(visor_jax.errors.__file__).parents[1]
DEAD = 2**22 + 1  # larger than any process id
HOST = socket.gethostname()


def make(path: Path) -> Path:
    """Creates a file, or a folder with one if the name contains "partial" or "old"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tmp" or path.suffix == ".json":
        path.write_text("half")
    else:
        path.mkdir()
        (path / "model.safetensors").write_text("half")
    return path


LEFT = [
    f".export.{DEAD}.partial",
    f".export.{DEAD}@{HOST}.partial",
    f"report/.index.html.{DEAD}@{HOST}.tmp",
    f"search/.subsets.csv.{DEAD}.tmp",
    f"universal/checkpoints/4/.commit.json.{DEAD}@{HOST}.tmp",
    f"eval/of_mine/partial/.test.json.{DEAD}.tmp",
    f".lock.json.{DEAD}@{HOST}.tmp",
]
KEPT = [
    f".export.{os.getppid()}@{HOST}.partial",  # alive
    f".export.{DEAD}@elsewhere.partial",  # unknown on this machine
    f".viable.json.{os.getpid()}@{HOST}.tmp",  # this process is writing it
    f"export.{DEAD}.partial",
    f".notes.{DEAD}.txt.json",
    ".cache.x.tmp",
]


def test_the_next_holder_of_the_lock_removes_what_dead_processes_left(tmp_path: Path) -> None:
    left, remaining = [make(tmp_path / name) for name in LEFT], [make(tmp_path / name) for name in KEPT]
    with WorkdirLock(tmp_path / "lock.json"):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in remaining)


def test_links_are_neither_followed_nor_spared(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside" / f".x.{DEAD}.partial")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "elsewhere").symlink_to(outside.parent)
    link = tmp_path / "run" / f".y.{DEAD}.partial"
    link.symlink_to(outside)
    remove_leftovers(tmp_path / "run")
    assert outside.exists() and not link.is_symlink()


def test_an_export_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "model"
    make(tmp_path / f".model.{DEAD}@{HOST}.old")
    make(tmp_path / f".model.{DEAD}@{HOST}.partial")
    other = make(tmp_path / f".other.{DEAD}@{HOST}.partial")
    remove_leftovers_of(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "model"]
    make(tmp_path / f".model.{DEAD}@{HOST}.old")
    remove_leftovers_of(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "model"]


def test_leftovers_that_cannot_be_removed_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / LEFT[2])
    monkeypatch.setattr(
        Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    remove_leftovers(tmp_path)
    assert "cannot be removed: Permission denied" in caplog.text


def test_a_kill_while_a_file_is_written_leaves_what_is_found(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from visor_jax.files.read_write import write_bytes
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
        write_bytes({str(tmp_path / "a.json")!r}, b"half")
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_what_is_written_whole(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.json", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert temporary_name("a", "tmp") == f".a.{os.getpid()}@{HOST}.tmp"
