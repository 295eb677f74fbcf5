"""The workdir: where a run keeps what it makes, and how files get there whole or not at all.

In: a path (local, or a bucket such as `gs://...`) and a resolved configuration. Out: `config.json` (configuration,
versions, git revision) and one folder per stage; how its files are read and written is in `visor_jax.files`.

A workdir belongs to one configuration: `Workdir.claim` refuses another one, naming the fields that differ.
"""

from __future__ import annotations

import contextlib
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

from visor_jax.errors import RequestError, unwritable
from visor_jax.files import as_path as as_path
from visor_jax.files import finite_or_null as finite_or_null
from visor_jax.files import open_regular as open_regular
from visor_jax.files import parse_json as parse_json
from visor_jax.files import read_json as read_json
from visor_jax.files import read_regular as read_regular
from visor_jax.files import sync_folder as sync_folder
from visor_jax.files import write_bytes as write_bytes
from visor_jax.files import write_json as write_json
from visor_jax.files import write_text as write_text
from visor_jax.workdir_lock import WorkdirLock

FORMAT = 1
# Counts the changes to what is drawn at random (starts, pictures, orders, budgets): a run is only gone on with by a
# version of the same number. 1: up to 0.1.0; 2: one key and one range of pictures for each consumer.
RANDOM_NUMBERS = 2
PACKAGES = ("visor-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml-collections")

# What may differ between two runs in one workdir: it changes neither the model nor the losses, only where and how
# the run is carried out (or is asked for anew each time, as the stage and the evaluation are).
FREE_FIELDS = (
    "name",
    "stage",
    "stages",
    "mesh.*",
    "evaluate.*",
    "data.root",
    "data.max_skipped_fraction",
    "*.remat",
    "*.checkpoint_every",
    "*.keep",
    "*.hang_seconds",
    "*.max_bad_steps",
)


class StageFolder:
    """One stage's folder: `checkpoints/`, `metrics.jsonl`, TensorBoard events, `complete.json` when it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_complete(self) -> bool:
        return (self.path / "complete.json").exists()

    def mark_complete(self, facts: Mapping[str, Any]) -> None:
        write_json(self.path / "complete.json", facts)


class Workdir:
    """A run's folder. Making one touches nothing; `create` and `claim` do."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
          RequestError: the path is empty or holds control characters.
        """
        text = os.fspath(path)
        if not text or not text.isprintable():
            raise RequestError(f"--workdir: {text!r} is no usable path: expected printable characters")
        self.path = as_path(text)

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name)

    def create(self) -> None:
        """Make the folder and see that it can be written.

        Raises:
          RequestError: it is a file, or may not be written.
          RunError: the disk is full.
        """
        probe = self.path / ".writable"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(probe, "")
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(f"--workdir={self.path}", error) from error

    def lock(self) -> WorkdirLock:
        """A context manager that keeps other runs out; several processes of one run: process 0 only."""
        return WorkdirLock(self.path / "lock.json")

    def claim(self, config: Any) -> None:
        """Write `config.json`, or see that the one there is of this configuration (several processes: process 0 only).

        Raises:
          RequestError: the folder holds another configuration, or a `config.json` that cannot be read.
        """
        mine, drawn_as = plain(config), self.random_numbers()
        if (self.path / "config.json").exists():
            differences = [d for d in differing_fields(self.config(), mine) if not is_free(d[0])]
            if differences:
                raise RequestError(
                    f"--workdir: {self.path} holds another configuration: {describe_differences(differences)};"
                    " expected the same configuration or another folder"
                )
        if "stage" in mine:
            mine["stage"] = ""  # asked for anew each time
        record = {"config": mine, "versions": versions(), "git_revision": git_revision(), "format": FORMAT}
        record["random_numbers"] = drawn_as
        write_json(self.path / "config.json", record)

    @contextlib.contextmanager
    def claimed(self, config: Any) -> Iterator[None]:
        """`claim` for a block of work; where its request turns out to be wrong, the `config.json` before stays."""
        path = self.path / "config.json"
        before = path.read_bytes() if path.exists() else None
        self.claim(config)
        try:
            yield
        except RequestError:
            if before is not None:
                write_bytes(path, before)
            raise

    def config(self) -> dict[str, Any]:
        """The configuration this workdir was made with, as plain JSON values.

        Raises:
          RequestError: there is none, it is damaged, or another format.
        """
        record = read_json(self.path / "config.json")
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            raise RequestError(f"{self.path / 'config.json'}: expected an object with a field 'config'")
        if record.get("format") != FORMAT:
            raise RequestError(f"{self.path / 'config.json'}: format {record.get('format')!r}, expected {FORMAT}")
        return record["config"]

    def random_numbers(self) -> int:
        """The `RANDOM_NUMBERS` of the version that began this workdir; this version's where nothing is begun yet.

        Raises:
          RequestError: `config.json` cannot be read.
        """
        if not (self.path / "config.json").exists():
            return RANDOM_NUMBERS
        record = read_json(self.path / "config.json")
        return record.get("random_numbers", 1) if isinstance(record, dict) else 1

    def check_random_numbers(self) -> None:
        """To be called before anything of the run is computed.

        Raises:
          RequestError: the workdir was begun by a version that draws other random numbers.
        """
        if (drawn_as := self.random_numbers()) != RANDOM_NUMBERS:
            raise RequestError(
                f"--workdir: {self.path} is unfinished, and was begun by a version that draws other random numbers"
                f" (random_numbers is {drawn_as} there and {RANDOM_NUMBERS} here); finish it with that version,"
                " or start in another folder"
            )

    def identity(self, config: Any, stage: str) -> dict[str, Any]:
        """What a checkpoint of `stage` must agree with to be resumed: the fields that shape its state, and its data.

        Returns:
          {"stage", "config": {dotted field: value}, "config_hash", "data", "tokenizer"}; the last two as
          `file_checksums` gives them. And "random_numbers", but for the first version, which wrote none.
        """
        fields = {}
        for name, value in flat_fields(plain(config)):
            top, _, rest = name.partition(".")
            elsewhere = top in ("search", "label") or (top == "stage_overrides" and rest.partition(".")[0] != stage)
            if not elsewhere and not is_free(name):
                fields[name] = value
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        found = {"stage": stage, "config_hash": digest, "config": fields, **file_checksums(plain(config))}
        drawn_as = self.random_numbers()
        return found if drawn_as == 1 else {**found, "random_numbers": drawn_as}


# --- configurations as plain values -----------------------------------------------------------------------------------


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


def differing_fields(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted name, their value, my value) wherever two configurations differ; a missing field reads "(none)"."""
    left, right = dict(flat_fields(theirs)), dict(flat_fields(mine))
    names = sorted(left.keys() | right.keys())
    pairs = [(name, left.get(name, "(none)"), right.get(name, "(none)")) for name in names]
    return [(name, a, b) for name, a, b in pairs if a != b]


def describe_differences(differences: list[tuple[str, Any, Any]], shown: int = 5) -> str:
    """One line: "model.text.num_layers is 6 there and 8 here, ..."."""
    parts = [f"{name} is {_short(a)} there and {_short(b)} here" for name, a, b in differences[:shown]]
    if len(differences) > shown:
        parts.append(f"and {len(differences) - shown} more")
    return ", ".join(parts)


def _short(value: Any) -> str:
    text = value if value == "(none)" else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def file_checksums(config: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of the files that a run learns from: {"data": annotations of the training split, "tokenizer": ...}.

    "" for those that it does not read: generated data and their tokenizer are told by their fields alone.
    """
    data, tokenizer = config.get("data", {}), config.get("tokenizer", {})
    annotations = os.path.join(data.get("root") or "", data.get("path", "").replace("{split}", "train"))
    return {"data": _file_sha256(annotations), "tokenizer": _file_sha256(tokenizer.get("path", ""))}


def _file_sha256(path: str) -> str:
    file = as_path(path)
    if not path or not file.is_file():
        return ""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
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
