"""Restores checkpoints: the newest valid step, or the step that a complete stage names.

In: a folder of steps, as `visor_jax.checkpoint.manager` writes it. Out: a verified manifest, or arrays on any mesh. A
resumed run takes the newest valid step. A consumer of a *complete* stage (the next stage, generate, evaluate, export)
gets the step named in its `complete.json`, which must belong to this run, or an error; an older step would be another
model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jax

from visor_jax.architecture import Architecture
from visor_jax.checkpoint.arrays import load
from visor_jax.checkpoint.manifest import Damaged, Manifest, Unfinished, examine, read_manifest
from visor_jax.config import Config, architecture
from visor_jax.errors import RequestError, RunError
from visor_jax.files.bucket import is_bucket
from visor_jax.files.read_write import as_path
from visor_jax.tree import flatten, unflatten
from visor_jax.workdir.folder import Complete, StageFolder, Workdir
from visor_jax.workdir.provenance import describe_differences

log = logging.getLogger(__name__)

ARRAYS = "arrays"
EMA = "ema"  # the item of a step with the moving average of trained parameters
WEIGHTS = "weights"  # a step's meta value: EMA where consumers take the average instead of the last parameters
ADDED = ("inputs", "pictures")  # fields of an identity that format 1 did not have


@dataclass(frozen=True)
class NewestStep:
    """The newest valid step of a checkpoint folder, and the newer ones that were skipped.

    Attributes:
      manifest: of the step; None if there is no valid one.
      skipped: (step, reason) of the newer steps.
      damaged: whether one of the skipped steps had been committed.
    """

    manifest: Manifest | None
    skipped: list[tuple[int, str]] = field(default_factory=list)
    damaged: bool = False


# --- the newest valid step --------------------------------------------------------------------------------------------


def find_newest(folder: Path) -> NewestStep:
    """Finds the newest valid step, verifying every byte of it; skips invalid steps with a warning."""
    skipped: list[tuple[int, str]] = []
    damaged = False
    for step in steps_in(folder):
        try:
            manifest = examine(folder / str(step))
        except (Unfinished, Damaged) as error:
            damaged = damaged or isinstance(error, Damaged)
            skipped.append((step, str(error)))
            log.warning("checkpoint %s skipped: %s", folder / str(step), error)
            continue
        return NewestStep(manifest, skipped, damaged)
    return NewestStep(None, skipped, damaged)


# --- a complete stage -------------------------------------------------------------------------------------------------


def saved_architecture(config: Config, folder: StageFolder) -> Architecture:
    """Returns the architecture of a complete stage: an imported `base` has `model.plan`, a trained one is dense.

    `visor import` saves step 0; training has at least one step.
    """
    imported = folder.path.name == "base" and folder.is_complete() and folder.complete().step == 0
    return architecture(config, "" if imported else folder.path.name)


def restore_complete(workdir: Workdir, stage: str, abstract: Any, shardings: Any = None) -> Any:
    """Restores the final parameters of a complete stage; reads and verifies only their files.

    Where the stage trained with `train.use_ema`, trained parameters are their moving average.

    Args:
      workdir: the run that the stage belongs to.
      stage: its name.
      abstract: tree of arrays or `jax.ShapeDtypeStruct`s.
      shardings: tree like `abstract`; None uses the shardings in `abstract`, or the first local device.

    Raises:
      RequestError: the stage is not complete, the checkpoint belongs to another run, stage or dataset, or parameters,
        shapes or dtypes differ (the message names them).
      RunError: the step that `complete.json` names is damaged or missing.
    """
    folder = workdir.stage(stage)
    manifest = examine_complete(folder, items=_items_used(folder))
    place = absolute(folder.path / "checkpoints") / str(manifest.step)
    if (workdir.path / "config.json").exists() and (differences := workdir.differences(stage, manifest.identity)):
        raise foreign(place, differences)
    if shardings is not None:
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    if manifest.meta.get(WEIGHTS) != EMA:
        return read_arrays(place, manifest, {"params": abstract})["params"]
    return read_average(place, manifest, abstract)


def examine_complete(folder: StageFolder, items: tuple[str, ...] | None = None) -> Manifest:
    """Returns the manifest of the step that a stage's `complete.json` names, after verifying the files of `items`.

    Raises:
      RequestError, RunError: as `restore_complete`.
    """
    if not folder.is_complete():
        raise RequestError(f"{folder.path}: stage {folder.path.name!r} is not complete; run it first")
    complete = folder.complete()
    place = absolute(folder.path / "checkpoints") / str(complete.step)
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
    """Returns whether an earlier version wrote a `complete.json` without sha256: it names the last step."""
    return not complete.manifest_sha256 and complete.step == steps_in(place.parent)[0]


def identity_of(folder: StageFolder) -> dict[str, Any] | None:
    """Returns the identity in a complete stage's manifest; None if it cannot be read (loading reports the reason)."""
    try:
        place = absolute(folder.path / "checkpoints") / str(folder.complete().step)
        return read_manifest(place).identity
    except (Unfinished, Damaged):
        return None


def foreign(place: Path, differences: list[tuple[str, Any, Any]]) -> RequestError:
    """Returns the error for a step of another run."""
    named = [(name.removeprefix("config."), a, b) for name, a, b in differences if name != "config_hash"]
    return RequestError(
        f"{place}: saved by another configuration or dataset: {describe_differences(named or differences)};"
        " expected this run's own state, or no such folder"
    )


# --- arrays -----------------------------------------------------------------------------------------------------------


def read_arrays(place: Path, manifest: Manifest, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the arrays of a step as a tree like `abstract`."""
    folders = {item: place / folder for item, folder in manifest.items.items()}
    return cast(dict[str, Any], load(place / ARRAYS, manifest.tree, abstract, folders))


def _items_used(folder: StageFolder) -> tuple[str, ...]:
    """Returns the items that consumers of a complete stage read; `examine_complete` reports what cannot be read."""
    if not folder.is_complete():
        return ("params",)
    try:
        meta = read_manifest(absolute(folder.path / "checkpoints") / str(folder.complete().step)).meta
    except (Unfinished, Damaged):
        return ("params",)
    return ("params", EMA) if meta.get(WEIGHTS) == EMA else ("params",)


def read_average(place: Path, manifest: Manifest, abstract: Any) -> Any:
    """Reads a step's parameters as a tree like `abstract`: the average of trained ones, frozen ones as saved."""
    averaged = {name.removeprefix(f"{EMA}/") for name in manifest.tree if name.startswith(f"{EMA}/")}
    flat = flatten(abstract)
    items = {
        "params": unflatten({path: x for path, x in flat.items() if path not in averaged}),
        EMA: unflatten({path: x for path, x in flat.items() if path in averaged}),
    }
    tree = {name: x for name, x in manifest.tree.items() if name.removeprefix("params/") not in averaged}
    read = read_arrays(place, dataclasses.replace(manifest, tree=tree), items)
    both = {**flatten(read["params"]), **flatten(read[EMA])}
    return jax.tree.structure(abstract).unflatten([both[path] for path in flat])


# --- folders ----------------------------------------------------------------------------------------------------------


def absolute(folder: Path) -> Path:
    """Returns an absolute path, as Orbax requires; bucket paths are absolute already."""
    path = as_path(folder)
    return path if is_bucket(path) else path.absolute()


def steps_in(folder: Path) -> list[int]:
    """Returns the numbers of all entries named like a step, newest first; their content is not checked."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir())
    # Python limits the length of integers that it parses.
    return sorted((int(n) for n in names if n.isdecimal() and len(n) < 20 and str(int(n)) == n), reverse=True)


def all_damaged(folder: Path, search: NewestStep) -> RunError:
    """Returns the error for a folder without a valid step."""
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in search.skipped)
    return RunError(f"{folder}: no step can be trusted ({reasons}); remove the folder to start again")
