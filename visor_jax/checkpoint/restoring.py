"""Reading checkpoints: the newest step that proves itself, and the one step that a complete stage names.

In: a folder of steps, as `visor_jax.checkpoint.manager` writes it. Out: a manifest that holds, or arrays on any mesh. A
run that goes on takes the newest good step. Whoever takes a *complete* stage (the next stage, generate, evaluate,
export) gets the step that its `complete.json` names, of this run and no other, or an error that says why not: an older
step is another model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from visor_jax.checkpoint.arrays import load
from visor_jax.checkpoint.manifest import Damaged, Manifest, Unfinished, examine, read_manifest
from visor_jax.errors import RequestError, RunError
from visor_jax.files.read_write import as_path
from visor_jax.tree import unflatten
from visor_jax.workdir.folder import Complete, StageFolder, Workdir
from visor_jax.workdir.provenance import describe_differences

log = logging.getLogger(__name__)

ARRAYS = "arrays"
ADDED = ("inputs", "pictures")  # fields of an identity that format 1 did not have


@dataclass(frozen=True)
class Found:
    """What is in a checkpoint folder: the newest good step, and the newer ones that were passed over and why."""

    manifest: Manifest | None
    passed_over: list[tuple[int, str]] = field(default_factory=list)
    damaged: bool = False  # whether one of those passed over had once been committed


# --- the newest good step ---------------------------------------------------------------------------------------------


def find(folder: Path) -> Found:
    """Look for the newest step that proves itself, reading every byte of it; those passed over are logged, and why."""
    passed: list[tuple[int, str]] = []
    damaged = False
    for step in steps_in(folder):
        try:
            manifest = examine(folder / str(step))
        except (Unfinished, Damaged) as error:
            damaged = damaged or isinstance(error, Damaged)
            passed.append((step, str(error)))
            log.warning("checkpoint %s passed over: %s", folder / str(step), error)
            continue
        return Found(manifest, passed, damaged)
    return Found(None, passed, damaged)


def restore_params(folder: Path, abstract: Any, shardings: Any = None) -> Any:
    """The parameters of the newest good step, whatever run it is of.

    Args:
      folder: a stage's `checkpoints/`.
      abstract: tree of arrays or `jax.ShapeDtypeStruct`s; None for everything that was saved, as nested dicts.
      shardings: tree like `abstract`; None for its own shardings, or for the first local device where it has none.

    Raises:
      RequestError: nothing was saved there, or other parameters, shapes or dtypes (they are named).
      RunError: every saved step is damaged.
    """
    folder = rooted(folder)
    found = find(folder)
    if found.manifest is None:
        if found.damaged:
            raise all_damaged(folder, found)
        raise RequestError(f"{folder}: holds no finished checkpoint; expected that its stage has been run")
    return _params(folder / str(found.manifest.step), found.manifest, abstract, shardings)


# --- a complete stage -------------------------------------------------------------------------------------------------


def restore_complete(workdir: Workdir, stage: str, abstract: Any, shardings: Any = None) -> Any:
    """The parameters that a complete stage ended with; only their files are read and checked.

    Args:
      workdir: the run that the stage belongs to.
      stage: its name.
      abstract, shardings: as in `restore_params`.

    Raises:
      RequestError: the stage is not complete, or what lies there is another run's, stage's or dataset's.
      RunError: the step that `complete.json` names is damaged or missing.
    """
    folder = workdir.stage(stage)
    manifest = examine_complete(folder, items=("params",))
    place = rooted(folder.path / "checkpoints") / str(manifest.step)
    if (workdir.path / "config.json").exists() and (differences := workdir.differences(stage, manifest.identity)):
        raise foreign(place, differences)
    return _params(place, manifest, abstract, shardings)


def examine_complete(folder: StageFolder, items: tuple[str, ...] | None = None) -> Manifest:
    """The manifest of the step that a stage's `complete.json` names, with its files (or some items') checked.

    Raises: as `restore_complete`.
    """
    if not folder.is_complete():
        raise RequestError(f"{folder.path}: stage {folder.path.name!r} is not complete; run it first")
    complete = folder.complete()
    place = rooted(folder.path / "checkpoints") / str(complete.step)
    try:
        manifest = examine(place, items)
    except (Unfinished, Damaged) as error:
        raise RunError(
            f"{place}: is the step that {folder.path.name}/complete.json names, and cannot be used: {error}; expected"
            " that its files are brought back, or complete.json removed to train on from an earlier checkpoint"
        ) from error
    if complete.manifest_sha256 != folder.committed(complete.step) and not _is_of_earlier_version(complete, place):
        raise RequestError(
            f"{place}: is another state than the one that {folder.path.name}/complete.json names (its manifest has"
            " another sha256); expected that its files are brought back, or complete.json removed to train it again"
        )
    return manifest


def _is_of_earlier_version(complete: Complete, place: Path) -> bool:
    """Whether a `complete.json` without the manifest's sha256 is one, and not an edited one: it names the last step."""
    return not complete.manifest_sha256 and complete.step == steps_in(place.parent)[0]


def identity_of(folder: StageFolder) -> dict[str, Any] | None:
    """Whose state a complete stage is, by its manifest; None where that cannot be read: loading it will say why."""
    try:
        place = rooted(folder.path / "checkpoints") / str(folder.complete().step)
        return read_manifest(place).identity
    except (Unfinished, Damaged):
        return None


def foreign(place: Path, differences: list[tuple[str, Any, Any]]) -> RequestError:
    """The error for a step that is not this run's."""
    named = [(name.removeprefix("config."), a, b) for name, a, b in differences if name != "config_hash"]
    return RequestError(
        f"{place}: saved by another configuration or dataset: {describe_differences(named or differences)};"
        " expected this run's own state, or no such folder"
    )


# --- arrays -----------------------------------------------------------------------------------------------------------


def read_arrays(place: Path, manifest: Manifest, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a step that `abstract` names: a tree like it."""
    folders = {item: place / folder for item, folder in manifest.items.items()}
    return cast(dict[str, Any], load(place / ARRAYS, manifest.tree, abstract, folders))


def _params(place: Path, manifest: Manifest, abstract: Any, shardings: Any) -> Any:
    if abstract is None:
        saved = {name: value for name, value in manifest.tree.items() if name.startswith("params/")}
        leaves = {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, (shape, dtype) in saved.items()}
        abstract = unflatten(leaves)["params"]
    if shardings is not None:
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    return read_arrays(place, manifest, {"params": abstract})["params"]


# --- folders ----------------------------------------------------------------------------------------------------------


def rooted(folder: Path) -> Path:
    """Orbax wants absolute paths; a bucket's always are."""
    path = as_path(folder)
    return path if "://" in os.fspath(path) else path.absolute()


def steps_in(folder: Path) -> list[int]:
    """Every entry named like a step, newest first, whatever it is."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir())
    # Longer numbers than Python reads are no steps either.
    return sorted((int(n) for n in names if n.isdecimal() and len(n) < 20 and str(int(n)) == n), reverse=True)


def all_damaged(folder: Path, found: Found) -> RunError:
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in found.passed_over)
    return RunError(f"{folder}: no step can be trusted ({reasons}); remove the folder to start anew")
