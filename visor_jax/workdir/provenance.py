"""Whose a file of a workdir is: configurations as plain values, in what two differ, and what a run was made with.

Ground floor: no JAX import. A workdir's `config.json`, the manifest of every checkpoint and every result carry an
*identity*: the fields that shape them, checksums of the data, and which results of earlier stages went in. Whoever
reads one compares.
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
from pathlib import Path
from typing import Any

from visor_jax.errors import RequestError, short
from visor_jax.files.read_write import as_path

PACKAGES = ("visor-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml-collections")

# What may differ between two runs in one workdir: it changes neither the model nor the losses, only where and how
# the run is carried out (or is asked for anew each time, as the stage and the evaluation are).
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
    "model.text.max_positions",
    "*.remat",
    "*.checkpoint_every",
    "*.keep",
    "*.hang_seconds",
    "*.max_bad_steps",
)


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON gives it back: dicts, lists, numbers, strings, booleans, None."""
    tree = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps(tree))


def flat_fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field of a nested configuration."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat_fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_free(field: str) -> bool:
    return any(fnmatch(field, pattern) for pattern in FREE_FIELDS)


def differing_fields(
    theirs: Mapping[str, Any], mine: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[tuple[str, Any, Any]]:
    """(dotted name, their value, my value) wherever two configurations differ.

    A field that one of them lacks has its value in `defaults`; without one it reads "(none)".
    """
    left, right = ({**(defaults or {}), **dict(flat_fields(tree))} for tree in (theirs, mine))
    names = sorted(left.keys() | right.keys())
    pairs = [(name, left.get(name, "(none)"), right.get(name, "(none)")) for name in names]
    return [(name, a, b) for name, a, b in pairs if a != b]


@functools.cache
def default_fields() -> dict[str, Any]:
    """{dotted name: value} of the default configuration: what a field is worth where an older version had none."""
    from visor_jax.config import default_config

    return dict(flat_fields(plain(default_config())))


def describe_differences(differences: list[tuple[str, Any, Any]], shown: int = 5) -> str:
    """One line: "model.text.num_layers is 6 there and 8 here, ..."."""
    parts = [f"{name} is {short(a)} there and {short(b)} here" for name, a, b in differences[:shown]]
    if len(differences) > shown:
        parts.append(f"and {len(differences) - shown} more")
    return ", ".join(parts)


def annotations_checksum(config: Mapping[str, Any], split: str) -> str:
    """sha256 of the file that holds the records of a split; "" for generated data."""
    data = config.get("data", {})
    path = data.get("path", "").replace("{split}", split)
    return file_sha256(os.path.join(data.get("root") or "", path)) if path else ""


def tokenizer_checksum(config: Mapping[str, Any]) -> str:
    """sha256 of the tokenizer's file; "" for that of the generated data, which comes with the package."""
    return file_sha256(config.get("tokenizer", {}).get("path", ""))


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file; "" where there is none.

    Raises:
      RequestError: it is there and cannot be read.
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
    """Python's and the installed packages' versions."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str:
    """The commit this package runs from, "-dirty" when files were changed; "" outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # A virtual environment may lie inside somebody else's checkout: only one that tracks this file counts.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
