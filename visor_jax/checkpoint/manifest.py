"""Writes and verifies the manifest of a checkpoint step.

Orbax restores corrupted data without an error, accepts an empty folder as the newest step, and casts dtypes silently.
Therefore, when Orbax has finished a step, `seal` writes `manifest.json` (size and sha256 of every file, the tree with
shapes and dtypes, the run's identity, small values) and then `commit.json` with the manifest's sha256. A step is valid
if and only if `examine` succeeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from visor_jax.errors import RequestError
from visor_jax.files.bucket import bucket_errors, is_bucket, names_below
from visor_jax.files.read_write import open_regular, parse_json, read_regular, write_bytes
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.folder import MAX_MANIFEST_BYTES

FORMAT = 2  # in format 1 all items share files
READS = (1, 2)
MAX_BYTES = {"manifest.json": MAX_MANIFEST_BYTES, "commit.json": 2**12}
MANIFEST, COMMIT = "manifest.json", "commit.json"
_BLOCK = 1 << 20
_HASH_THREADS = 8  # hashlib releases the interpreter, so large checkpoints are read in parallel


@dataclass(frozen=True)
class Manifest:
    """The content of a step.

    Attributes:
      format: version of the layout.
      step: number of optimizer steps done.
      identity: the run's configuration fields, stage and data; must match to resume.
      meta: small JSON values saved with the arrays.
      tree: path of an array ("params/...") -> [shape, dtype name].
      files: path inside the step's folder -> {"size", "sha256"}.
      items: top-level entry of the tree ("params") -> the folder that holds only its arrays, so that it can be verified
        and read alone. {} in format 1, where all entries share files.
    """

    format: int
    step: int
    identity: dict[str, Any]
    meta: dict[str, Any]
    tree: dict[str, list[Any]]
    files: dict[str, dict[str, Any]]
    items: dict[str, str] = field(default_factory=dict)

    def files_of(self, items: Iterable[str] | None) -> dict[str, dict[str, Any]]:
        """Returns the files needed to read some items: their own, and those that belong to no item; None for all."""
        others = self.folders_without(items)
        return {name: entry for name, entry in self.files.items() if not name.startswith(others)}

    def folders_without(self, items: Iterable[str] | None) -> tuple[str, ...]:
        """Returns the folders, with a final "/", whose files are not needed to read some items."""
        if items is None:
            return ()
        return tuple(f"{folder}/" for item, folder in self.items.items() if item not in items)


class Unfinished(Exception):
    """The step was never committed: an interrupted save, or a folder that is not a checkpoint."""


class Damaged(Exception):
    """The step was committed, and its content has changed since."""


def seal(
    folder: Path,
    step: int,
    *,
    identity: Mapping[str, Any],
    meta: Mapping[str, Any],
    tree: Mapping[str, list[Any]],
    items: Mapping[str, str],
    known: Mapping[str, Any] | None = None,
) -> None:
    """Commits the step in `folder`: computes checksums, writes the manifest, then the commit marker.

    Args:
      known: checksums that were computed already (`checksums`).
    """
    names, known = files_of(folder), known or {}
    files = {**known, **checksums(folder, [name for name in names if name not in known])}
    files = {name: files[name] for name in names}
    manifest = Manifest(FORMAT, step, dict(identity), dict(meta), dict(tree), files, dict(items))
    text = json.dumps(asdict(manifest), indent=1, allow_nan=False).encode()
    fault_point("before_manifest", step)
    write_bytes(folder / MANIFEST, text)
    fault_point("before_commit", step)
    marker = {"manifest_sha256": hashlib.sha256(text).hexdigest()}
    write_bytes(folder / COMMIT, json.dumps(marker).encode())


def files_of(folder: Path) -> list[str]:
    """Returns the names of a step's files, with "/" separators."""
    return sorted(_files(folder))


def checksums(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Reads files of a step back and flushes them; returns size and sha256 of each."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        sums = pool.map(lambda name: _checksum(folder / name, to_disk=True), names)
        return {name: {"size": size, "sha256": digest} for name, (size, digest) in zip(names, sums, strict=True)}


def examine(folder: Path, items: Iterable[str] | None = None) -> Manifest:
    """Reads a step's manifest and verifies all files, or those of some items of the tree, without opening the others.

    Raises:
      Unfinished, Damaged: the step is not valid; the message gives the reason.
      RequestError: the step has a format that this version does not read.
    """
    manifest = read_manifest(folder)
    needed, others = manifest.files_of(items), manifest.folders_without(items)
    present = {name for name in _files(folder) if not name.startswith(others)} - {MANIFEST, COMMIT}
    if missing := sorted(needed.keys() - present):
        raise Damaged(f"{missing[0]} is missing")
    if unknown := sorted(present - needed.keys()):
        raise Damaged(f"{unknown[0]} is not in its manifest")
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        for reason in pool.map(lambda item: _difference(folder, *item), needed.items()):
            if reason:
                raise Damaged(reason)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Reads a step's manifest and verifies it against the commit marker; ignores the other files.

    Raises:
      Unfinished, Damaged, RequestError: as `examine`.
    """
    if is_link(folder):
        raise Unfinished("is a symbolic link")
    if not folder.is_dir():
        raise Unfinished("is not a folder")
    marker, text = _read(folder / COMMIT), _read(folder / MANIFEST)
    if marker is None:
        raise Unfinished("its save was never finished (no commit.json)")
    if text is None:
        raise Damaged(f"{MANIFEST} is missing")
    committed = _parsed(marker, COMMIT).get("manifest_sha256")
    if hashlib.sha256(text).hexdigest() != committed:
        raise Damaged(f"{MANIFEST} does not match the checksum in {COMMIT}")
    record = _parsed(text, MANIFEST)
    if record.get("format") not in READS:
        known = " and ".join(map(str, READS))
        raise RequestError(f"{folder}: checkpoint format {record.get('format')!r}; this version reads {known}")
    if str(record.get("step")) != folder.name:
        raise Damaged(f"holds step {record.get('step')}")
    _check_fields(record)
    return Manifest(**record)


def _parsed(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise Damaged(f"{name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{name} holds no object")
    return value


def _check_fields(record: Mapping[str, Any]) -> None:
    """Checks that a manifest has exactly the fields and types that `seal` writes.

    Raises:
      Damaged: a field is missing, unknown, or of another type.
    """
    known = {field.name for field in fields(Manifest)} - ({"items"} if record["format"] == 1 else set())
    if different := sorted(record.keys() ^ known):
        raise Damaged(f"{MANIFEST}: field {different[0]!r} is {'missing' if different[0] in known else 'unknown'}")
    checks = {
        "step": type(record["step"]) is int,
        "identity": isinstance(record["identity"], dict) and isinstance(record["identity"].get("config", {}), dict),
        "meta": isinstance(record["meta"], dict),
        "tree": isinstance(record["tree"], dict) and all(map(_is_array, record["tree"].values())),
        "files": isinstance(record["files"], dict) and all(map(_is_file, record["files"].items())),
        "items": record["format"] == 1 or _are_items(record["items"], record["tree"]),
    }
    for name, holds in checks.items():
        if not holds:
            raise Damaged(f"{MANIFEST}: field {name!r} is not what a save writes")


def _is_array(entry: Any) -> bool:
    """Returns whether an entry of the tree is [shape, dtype name]."""
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list) and isinstance(entry[1], str)):
        return False
    return all(type(size) is int and 0 <= size < 2**48 for size in entry[0])


def _is_file(item: tuple[str, Any]) -> bool:
    name, entry = item
    if not (_is_inside(name) and isinstance(entry, dict) and entry.keys() == {"size", "sha256"}):
        return False
    size, digest = entry["size"], entry["sha256"]
    return type(size) is int and size >= 0 and isinstance(digest, str) and bool(re.fullmatch("[0-9a-f]{64}", digest))


def _are_items(items: Any, tree: Any) -> bool:
    """Returns whether `items` has a folder for exactly the top-level entries of the tree."""
    if not (isinstance(items, dict) and isinstance(tree, dict)):
        return False
    return items.keys() == {path.partition("/")[0] for path in tree} and all(map(_is_inside, items.values()))


def _is_inside(name: Any) -> bool:
    """Returns whether a path stays inside the step's folder."""
    return isinstance(name, str) and all(part not in ("", "..") for part in name.split("/"))


def _files(folder: Path) -> Iterator[str]:
    """Yields the paths of all files below `folder`, relative to it, with "/" separators."""
    if is_bucket(folder):
        yield from (name for name in names_below(folder) if not name.rpartition("/")[2].startswith("."))
        return
    for entry in folder.iterdir():
        if is_link(entry):
            # Tensorstore would follow a link, which may lead out of the checkpoint.
            raise Damaged(f"{entry.name} is a symbolic link")
        if entry.is_dir():
            yield from (f"{entry.name}/{name}" for name in _files(entry))
        elif not entry.name.startswith("."):  # file systems may leave hidden files
            yield entry.name


def _difference(folder: Path, name: str, expected: Mapping[str, Any]) -> str:
    """Describes how a file differs from its manifest; "" if it does not."""
    try:
        size, digest = _checksum(folder / name)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    if size != expected["size"]:
        return f"{name} has {size} bytes instead of {expected['size']}"
    return "" if digest == expected["sha256"] else f"{name} does not match its checksum"


def _checksum(path: Path, *, to_disk: bool = False) -> tuple[int, str]:
    """Returns (size, sha256) of a file; `to_disk` also flushes it, because a commit requires stored data."""
    digest, size = hashlib.sha256(), 0
    with bucket_errors(path), path.open("rb") if is_bucket(path) else open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if to_disk and not is_bucket(path):
            os.fsync(file.fileno())
    return size, digest.hexdigest()


def _read(path: Path) -> bytes | None:
    """Returns a file's bytes, or None if it does not exist.

    Raises:
      Damaged: the file exists and cannot be read.
    """
    try:
        return read_regular(path, MAX_BYTES[path.name])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror or error}") from error


def is_link(path: Path) -> bool:
    """Returns whether a path is a symbolic link; buckets have none."""
    return not is_bucket(path) and path.is_symlink()
