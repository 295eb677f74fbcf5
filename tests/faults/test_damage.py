"""Damage to an unfinished stage's newest step, end to end: it is named, never loaded, and the next older step resumes.

`tests/checkpoint/test_restoring.py` has the same kinds of damage, and more, without a command around them. Every case
trains the stage policy of a copy of the tiny run to its end again; its results equal the undamaged run's, bit for bit.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.faults.whole_run import array_digests, steps_of
from visor_jax.__main__ import main
from visor_jax.loading import load, load_stage
from visor_jax.workdir.folder import Workdir

pytestmark = pytest.mark.usefixtures("quick")

# One of each kind of file in a step: Orbax's metadata and marks, OCDBT's manifests and data, ours.
KINDS = {
    "ours: manifest": "manifest.json",
    "ours: marker": "commit.json",
    "checkpoint metadata": "arrays/_CHECKPOINT_METADATA",
    "checkpoint mark": "arrays/commit_success.txt",
    **{
        f"{item}: {kind}": f"arrays/{item}/{pattern}"
        for item in ("params", "opt_state")
        for kind, pattern in {
            "metadata": "_METADATA",
            "mark": "commit_success.txt",
            "merged data": "d/*",
            "merged manifest": "manifest.ocdbt",
            "data": "ocdbt.process_0/d/*",
            "data manifest": "ocdbt.process_0/manifest.ocdbt",
        }.items()
    },
}


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file; an empty one gets a byte."""
    data = bytearray(path.read_bytes() or b"\0")
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Removes the second half of a file; an empty one becomes longer instead."""
    size = path.stat().st_size
    os.truncate(path, size // 2 if size else 9)


def one_of(step: Path, pattern: str) -> Path:
    """Returns the largest file of a kind."""
    return max(step.glob(pattern), key=lambda path: path.stat().st_size)


Damage = Callable[[Path], object]
FILES: dict[str, Damage] = {
    f"{name}, {how.__name__}": lambda step, pattern=pattern, how=how: how(one_of(step, pattern))
    for name, pattern in KINDS.items()
    for how in (flip, cut, Path.unlink)
}
FOLDERS: dict[str, Damage] = {
    "no arrays": lambda step: shutil.rmtree(step / "arrays"),
    "no parameters": lambda step: shutil.rmtree(step / "arrays/params"),
    "no optimizer": lambda step: shutil.rmtree(step / "arrays/opt_state"),
    "a file too many": lambda step: (step / "arrays/more").write_text("x"),
    "a file that is a link": lambda step: link(one_of(step, KINDS["params: data"])),
    "a folder that is a link": lambda step: link(step / "arrays/params"),
    "the step is a link": lambda step: link(step),
    "the step is a link to the older one": lambda step: (shutil.rmtree(step), step.symlink_to(step.parent / "2")),
    "the step is a link to nothing": lambda step: (shutil.rmtree(step), step.symlink_to("/nowhere")),
    "the step is a file": lambda step: (shutil.rmtree(step), step.write_text("x")),
    "an older step under its name": lambda step: (shutil.rmtree(step), shutil.copytree(step.parent / "2", step)),
    "an older step's arrays": lambda step: (
        shutil.rmtree(step / "arrays"), shutil.copytree(step.parent / "2/arrays", step / "arrays")
    ),
    "emptied": lambda step: (shutil.rmtree(step), step.mkdir()),
}  # fmt: skip
# Beside the valid newest step, which stays the one that is used: skipped by name, or no step at all.
BESIDE: dict[str, Damage] = {
    "an empty newer step": lambda step: (step.parent / "5").mkdir(),
    "a giant step": lambda step: shutil.copytree(step, step.parent / "99999999999"),
    "a giant step, emptied": lambda step: (step.parent / "99999999999").mkdir(),
    "a newer step that links to it": lambda step: (step.parent / "6").symlink_to(step),
    "a newer step that links out": lambda step: (step.parent / "6").symlink_to("/etc"),
    "a temporary folder": lambda step: (step.parent / "7.orbax-checkpoint-tmp").mkdir(),
    "other names": lambda step: [(step.parent / name).mkdir() for name in ("latest", "-3", "0x5", "٣")],
}
QUICK = ("opt_state: data, flip", "ours: marker, unlink")


def link(path: Path) -> None:
    aside = path.parent.parent / f"aside-{path.name}"
    path.rename(aside)
    path.symlink_to(aside)


def train_again(run: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Trains the stage policy of `run` to its end; returns the log."""
    caplog.set_level(logging.INFO, "visor_jax")
    assert main(["train", f"--workdir={run}", "--config.stage=policy"]) == 0
    return caplog.text


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in (*FILES, *FOLDERS)]
)
def test_a_damaged_step_is_named_and_the_older_one_resumes(
    name: str, tiny_run: Path, tiny_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step = tiny_copy / "policy/checkpoints/4"
    (tiny_copy / "policy/complete.json").unlink()
    (FILES | FOLDERS)[name](step)
    log = train_again(tiny_copy, caplog)
    assert re.search(rf"checkpoint {re.escape(str(step))} skipped: \S+", log), log
    assert "policy: resumed after step 2" in log
    assert array_digests(tiny_copy, "policy") == array_digests(tiny_run, "policy")
    assert steps_of(tiny_copy, "policy") == steps_of(tiny_run, "policy")


@pytest.mark.slow
@pytest.mark.parametrize("name", BESIDE)
def test_what_is_no_step_does_not_hide_the_newest_one(
    name: str, tiny_run: Path, tiny_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tiny_copy / "policy/complete.json").unlink()
    BESIDE[name](tiny_copy / "policy/checkpoints/4")
    assert "policy: resumed after step 4" in train_again(tiny_copy, caplog)
    assert array_digests(tiny_copy, "policy") == array_digests(tiny_run, "policy")


def of_another_run(checkpoints: Path) -> None:
    """Gives the newest step the identity of a run with another seed."""
    step = checkpoints / "4"
    record = json.loads((step / "manifest.json").read_text())
    record["identity"]["config"]["seed"] = 7
    text = json.dumps(record).encode()
    (step / "manifest.json").write_bytes(text)
    (step / "commit.json").write_text(json.dumps({"manifest_sha256": hashlib.sha256(text).hexdigest()}))


def of_another_stage(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "4")
    shutil.copytree(checkpoints.parent.parent / "universal/checkpoints/4", checkpoints / "4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_run, "policy/checkpoints/4: saved by another configuration or dataset: seed is 7 there and 0 here"),
        (of_another_stage, "policy/checkpoints/4: saved by another configuration or dataset: stage_overrides."),
    ],
)
def test_another_runs_step_is_refused_by_name(
    change: Callable[[Path], None], message: str, tiny_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not damaged, so that no older step is used in its place."""
    (tiny_copy / "policy/complete.json").unlink()
    change(tiny_copy / "policy/checkpoints")
    assert main(["train", f"--workdir={tiny_copy}", "--config.stage=policy"]) == 2
    assert message in capsys.readouterr().err


# --- parameters alone -------------------------------------------------------------------------------------------------

IN_ACCESS, IN_OPEN = 0x1, 0x20


@contextmanager
def opened_files(*folders: Path) -> Iterator[list[str]]:
    """Yields a list that holds, after the block, the files below `folders` that anything opened or read in it."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    queue = libc.inotify_init1(os.O_NONBLOCK)
    assert queue >= 0, os.strerror(ctypes.get_errno())
    watched = {}
    for folder in folders:
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            watched[libc.inotify_add_watch(queue, os.fsencode(path), IN_ACCESS | IN_OPEN)] = path
    found: list[str] = []
    try:
        yield found
        with open(queue, "rb", buffering=0, closefd=False) as events:
            while data := events.read(1 << 16):
                while data:
                    watch, mask, _, length = struct.unpack_from("iIII", data)
                    name = data[16 : 16 + length].rstrip(b"\0").decode()
                    if name and (watched[watch] / name).is_file():
                        found.append(f"{watched[watch] / name} {mask:#x}")
                    data = data[16 + length :]
    finally:
        os.close(queue)


def test_opened_files_are_seen(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/file").write_text("x")
    with opened_files(tmp_path) as nothing:
        pass
    with opened_files(tmp_path) as found:
        (tmp_path / "inner/file").read_text()
    assert not nothing and found


def test_loading_a_model_opens_no_file_of_the_optimizer(tiny_run: Path) -> None:
    folders = list(tiny_run.glob("*/checkpoints/*/arrays/opt_state"))
    assert folders
    with opened_files(*folders) as found:
        load(tiny_run)
        load_stage(Workdir(tiny_run), "full")
    assert not found


@pytest.mark.parametrize("how", [shutil.rmtree, lambda folder: [flip(f) for f in folder.rglob("*") if f.is_file()]])
def test_a_model_and_a_start_need_no_optimizer_state(
    how: Callable[[Path], object], tiny_run: Path, tiny_copy: Path
) -> None:
    """Its files may be damaged or missing: `load` reads the same parameters, and a stage starts from them."""
    for folder in tiny_copy.glob("*/checkpoints/*/arrays/opt_state"):
        how(folder)
    for left, right in zip(
        jax.tree.leaves(load(tiny_run).params), jax.tree.leaves(load(tiny_copy).params), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    shutil.rmtree(tiny_copy / "policy")
    assert main(["train", f"--workdir={tiny_copy}", "--config.stage=policy"]) == 0  # starts from universal
    assert array_digests(tiny_copy, "policy") == array_digests(tiny_run, "policy")
