"""Identifies the origin of a workdir's files: compares configurations, computes checksums, records versions.

Imports no JAX. A workdir's `config.json`, the manifest of every checkpoint and every result carry an *identity*: the
configuration fields that affect them, checksums of the data, and the results of earlier stages that they use. Every
reader compares it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from visor_jax.config import ConfigLike
from visor_jax.config.mixture import is_mixture, mixture_file, read_mixture
from visor_jax.errors import RequestError, short
from visor_jax.files.patterns import expand
from visor_jax.files.read_write import as_path

PACKAGES = ("visor-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml-collections")

_WITH_PICTURES = (".parquet", ".array_record")  # files that are too large to be read whole at every start
_END_BYTES = 2**20

# Fields that may differ between two runs in one workdir: they do not affect the model or the losses, only where and how
# the run is executed, or they are chosen at each call, such as the stage and the evaluation.
FREE_FIELDS = (
    "name",
    "stage",
    "stages",
    "mesh.*",
    "evaluate.*",
    "export.*",
    "data.root",
    "data.follow_links",
    "data.max_skipped_fraction",
    "data.workers",
    "model.text.max_positions",
    "*.remat",
    "*.tower_remat",
    "*.accumulate",
    "*.checkpoint_every",
    "*.keep",
    "*.hang_seconds",
    "*.max_bad_steps",
    "*.validate_every",
    "*.validate_samples",
    "*.profile",
    "*.wandb_project",
)


def plain(config: ConfigLike | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration as plain JSON values: dicts, lists, numbers, strings, booleans, None."""
    tree = dict(config) if isinstance(config, Mapping) else config.to_dict()
    return json.loads(json.dumps(tree))


def flat_fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field of a nested configuration."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat_fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_free(field: str) -> bool:
    """Returns whether a field may differ between two runs in one workdir."""
    return any(fnmatch(field, pattern) for pattern in FREE_FIELDS)


def differing_fields(
    theirs: Mapping[str, Any], mine: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[tuple[str, Any, Any]]:
    """Returns (dotted name, their value, my value) for every field in which two configurations differ.

    A field that one of them lacks has its value in `defaults`, or else "(none)". Only the file's name counts of the
    tokenizer's path: a workdir may continue on a machine that keeps it elsewhere, and checksums compare its content.
    """
    left, right = ({**(defaults or {}), **dict(flat_fields(tree))} for tree in (theirs, mine))
    names = sorted(left.keys() | right.keys())
    pairs = [(name, left.get(name, "(none)"), right.get(name, "(none)")) for name in names]
    # In an identity, the configuration is below "config".
    moved = {name for name, a, b in pairs if name.removeprefix("config.") == "tokenizer.path" and _same_name(a, b)}
    return [(name, a, b) for name, a, b in pairs if a != b and name not in moved]


def _same_name(a: Any, b: Any) -> bool:
    return PurePath(str(a)).name == PurePath(str(b)).name


@functools.cache
def default_fields() -> dict[str, Any]:
    """Returns {dotted name: value} of the default configuration, for fields that an older version did not have."""
    from visor_jax.config import default_config

    return dict(flat_fields(plain(default_config())))


def describe_differences(differences: list[tuple[str, Any, Any]], shown: int = 5) -> str:
    """Describes differences in one line: "model.text.num_layers is 6 there and 8 here, ..."."""
    parts = [f"{name} is {short(a)} there and {short(b)} here" for name, a, b in differences[:shown]]
    if len(differences) > shown:
        parts.append(f"and {len(differences) - shown} more")
    return ", ".join(parts)


def annotations_checksum(config: Mapping[str, Any], split: str) -> str:
    """Returns a sha256 of the files with the records of a split; "" for generated data and if there is no file.

    Of one file of records it is the file's own. Files that hold pictures too are identified by size, beginning and end.

    Raises:
      RequestError: a file cannot be read, or a mixture cannot.
    """
    files = _record_files(config.get("data", {}), split)
    if len(files) == 1:
        return _records_sha256(files[0])
    sums = [checksum for file in files if (checksum := _records_sha256(file))]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest() if sums else ""


def _record_files(data: Mapping[str, Any], split: str) -> list[Path]:
    """Returns the files that hold the records of a split: those of `data.path`, or of each entry of a mixture."""
    root = data.get("root") or ""
    if not is_mixture(data):
        path = data.get("path", "").replace("{split}", split)
        return expand(root, path) if path else []
    if name := data.get("mixture"):
        file = mixture_file(root, name)
        if not file.exists():
            return []
    mixture = read_mixture(data)
    files = [] if mixture.file is None else [mixture.file]
    for entry in (entry for entry in mixture.entries if not entry.is_generated):
        files += expand(str(mixture.root_of(entry)), entry.path.replace("{split}", split))
    return files


def _records_sha256(file: Path) -> str:
    """Returns the sha256 of a file, or of size, beginning and end of one that holds pictures too."""
    if file.suffix.lower() not in _WITH_PICTURES or not file.is_file():
        return file_sha256(file)
    return _ends_sha256(file)


def checkpoint_sha256(folder: Path) -> str:
    """Returns a sha256 over config.json and, by size, beginning and end, the weights of a folder in HF's format.

    Raises:
      RequestError: a file cannot be read.
    """
    digest = hashlib.sha256(file_sha256(folder / "config.json").encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}\0{_ends_sha256(file)}\0".encode())
    return digest.hexdigest()


def _ends_sha256(file: Path) -> str:
    """Returns the sha256 of a file's size, beginning and end."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            digest.update(f"{size}\0".encode())
            for start in (0, max(size - _END_BYTES, 0)):
                opened.seek(start)
                digest.update(opened.read(_END_BYTES))
    except OSError as error:
        raise RequestError(f"{file}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def tokenizer_checksum(config: Mapping[str, Any]) -> str:
    """Returns the sha256 of the tokenizer's file; "" for the generated data's, which is part of the package."""
    return file_sha256(config.get("tokenizer", {}).get("path", ""))


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the sha256 of a file; "" if it does not exist.

    Raises:
      RequestError: the file exists and cannot be read.
    """
    file = as_path(path)
    if not os.fspath(path) or not file.is_file():
        return ""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


# --- provenance -------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def git_revision() -> str:
    """Returns the commit that this package runs from, with "-dirty" for changed files; "" outside a checkout."""
    commit = git_commit()
    try:
        return commit and commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def git_commit() -> str:
    """Returns the commit that this package runs from; "" outside a checkout."""
    try:
        # A virtual environment may be inside another project's checkout, so require one that tracks this file.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
