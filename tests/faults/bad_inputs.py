"""Cases of bad inputs: a command, the reaction to it, and the changes to files that come before it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from visor_jax.workdir.folder import Workdir

Change = Callable[["Places"], Any]  # may return a context in which the command runs


class Places(NamedTuple):
    """Folders of a case: `run` a copy of a complete run, `model` a copy of its export, `tmp` files of its own."""

    run: Path
    model: Path
    tmp: Path


class Case(NamedTuple):
    """A command, its exit status, a part of its message, and what is changed before; `warned`: in the log instead."""

    command: str
    status: int
    message: str
    change: Change | None = None
    warned: str = ""


def write(name: str, text: str) -> Change:
    def change(at: Places) -> None:
        path = at.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(tmp=at.tmp))

    return change


def edit_json(path: str, **fields: Any) -> Change:
    """Sets fields of a JSON file; a dict changes fields of a section, None removes a field."""

    def change(at: Places) -> None:
        file = Path(path.format(**at._asdict()))
        record = json.loads(file.read_text())
        for name, value in fields.items():
            if value is None:
                del record[name]
            else:
                record[name] = {**record[name], **value} if isinstance(value, dict) and name in record else value
        file.write_text(json.dumps(record))

    return change


def edit_weights(edit: Callable[[dict[str, np.ndarray]], object]) -> Change:
    def change(at: Places) -> None:
        tensors = dict(load_file(at.model / "model.safetensors"))
        edit(tensors)
        save_file(tensors, at.model / "model.safetensors")

    return change


def raw_weights(data: bytes) -> Change:
    return lambda at: (at.model / "model.safetensors").write_bytes(data)


def header(text: str, data: bytes = b"", length: int | None = None) -> Change:
    size = len(text) if length is None else length
    return raw_weights(size.to_bytes(8, "little") + text.encode() + data)


def sharded(*names: str) -> Change:
    """Replaces the weights by an index that names files."""

    def change(at: Places) -> None:
        (at.model / "model.safetensors").rename(at.model / "model-00001-of-00002.safetensors")
        index = {"weight_map": {f"tensor{number}": name for number, name in enumerate(names)}}
        (at.model / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def pickled(name: str, *, alone: bool = True) -> Change:
    """Writes a pickle that would create the file `ran`, which no case may leave."""

    def change(at: Places) -> None:
        if alone:
            (at.model / "model.safetensors").unlink()
        (at.model / name).write_bytes(f"cbuiltins\nopen\n(S'{at.tmp / 'ran'}'\nS'w'\ntR.".encode())

    return change


def without(*names: str) -> Change:
    def change(at: Places) -> None:
        for name in names:
            path = at.run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def both(*changes: Change) -> Change:
    def change(at: Places) -> None:
        for one in changes:
            one(at)

    return change


def locked(at: Places) -> contextlib.AbstractContextManager[Any]:
    return Workdir(at.run).lock()


def newest(run: Path, stage: str = "policy") -> Path:
    """Returns the folder of the newest step of a stage."""
    return max((run / stage / "checkpoints").iterdir(), key=lambda step: int(step.name))


def rename(tensors: dict[str, np.ndarray], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def unfinished(*changes: Callable[[Path], object]) -> Change:
    """Makes the stage policy unfinished after its step 3, then changes its folder of checkpoints."""

    def change(at: Places) -> None:
        (at.run / "policy/complete.json").unlink()
        for one in changes:
            one(at.run / "policy/checkpoints")

    return change


def reseal(step: Path, **fields: Any) -> None:
    """Changes fields of a step's manifest and its checksum."""
    record = {**json.loads((step / "manifest.json").read_text()), **fields}
    text = json.dumps(record).encode()
    (step / "manifest.json").write_bytes(text)
    (step / "commit.json").write_text(json.dumps({"manifest_sha256": hashlib.sha256(text).hexdigest()}))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def as_bfloat16(step: Path) -> None:
    """Declares one array of a step as another dtype."""
    tree = json.loads((step / "manifest.json").read_text())["tree"]
    name = min(name for name in tree if name.startswith("params/"))
    reseal(step, tree={**tree, name: [tree[name][0], "bfloat16"]})


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))
