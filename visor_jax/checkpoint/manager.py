"""Saves checkpoints in the background, verifies them, and finds the newest valid step.

In: a folder, the run's `identity`, pytrees of arrays. Out: `<folder>/<step>/` with `arrays/` (Orbax), `manifest.json`
and, written last, `commit.json` (`visor_jax.checkpoint.manifest`). A step that fails verification is skipped with a
warning, and the next older one is used.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from visor_jax.checkpoint.arrays import BUCKET_MARK, INDEX, UNFINISHED_MARK, ArraySaver, describe_tree, items_of
from visor_jax.checkpoint.manifest import (
    COMMIT,
    Damaged,
    Manifest,
    Unfinished,
    checksums,
    examine,
    files_of,
    is_link,
    read_manifest,
    seal,
)
from visor_jax.checkpoint.restoring import (
    ADDED,
    ARRAYS,
    absolute,
    all_damaged,
    find_newest,
    foreign,
    read_arrays,
    steps_in,
)
from visor_jax.errors import RequestError, RunError
from visor_jax.files.bucket import bucket_errors, is_bucket, make_folder
from visor_jax.files.read_write import remove_folder
from visor_jax.scale.distributed import divided
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.provenance import default_fields, differing_fields, plain

log = logging.getLogger(__name__)

SAVE_ATTEMPTS = 3  # failed saves in a row that end the run
_REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOENT)
_saves = itertools.count()  # of this process; all processes make the same ones
_NONE, _REFUSED, _FAILED = -1, -2, -3  # broadcast by process 0 instead of a step


class Checkpoints:
    """The checkpoints of one stage. With several processes, all of them make the same calls.

    As a context manager it waits for the last save at the end of its block; an error in the block is re-raised.

    Attributes:
      skipped: (step, reason) of the damaged or unfinished steps that `latest` skipped.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: Mapping[str, Any],
        keep: int,
        retry_seconds: float = 5.0,
        copied_bytes: int | None = None,
    ) -> None:
        """
        Args:
          folder: created if missing; interrupted saves in it are removed.
          identity: JSON values that identify the run's state; must equal those of a step to resume it.
          keep: number of valid steps to keep, at least 1.
          retry_seconds: delay after a failed save.
          copied_bytes: see `ArraySaver`.
        """
        self._folder, self._identity, self._keep = absolute(folder), plain(identity), keep
        self._retry_seconds = retry_seconds
        self._copied_bytes = copied_bytes
        self._saver, self._worker = ArraySaver(copied_bytes), ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None  # the save in progress
        self._failures, self._failed_at = 0, 0.0  # consecutive
        self._saved: set[int] = set()  # by this process
        self._manifests: dict[int, Manifest] = {}  # of steps that this process has written or verified
        self.skipped: list[tuple[int, str]] = []
        if jax.process_index() == 0:
            make_folder(self._folder)
            _clean(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except RunError as failure:
            log.error("%s", failure)

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any] | None = None, *, wait: bool = False
    ) -> None:
        """Saves `state` as `step`; returns once the arrays are copied, so that the next step may overwrite them.

        Args:
          step: number of optimizer steps done; a step that is already saved is not written again.
          state: {"params": tree, "opt_state": tree, ...} of arrays.
          meta: small JSON values to store with the arrays (`meta` returns them).
          wait: return only once the step is committed on disk.

        Raises:
          RunError: this save, or the earlier one it had to wait for, was the last of `SAVE_ATTEMPTS` failures in a row.
        """
        self._settle()
        while step not in self._saved:
            self._pending = (step, self._begin(step, state, dict(meta or {})))
            if not wait:
                return
            if not self._settle():
                time.sleep(self._retry_seconds)

    def poll(self) -> bool:
        """Returns whether a save failed and should be repeated now; cheap, to be called at every step.

        Raises:
          RunError: too many saves in a row have failed.
        """
        if self._pending is not None:
            if not self._pending[1].done():
                return False
            self._settle()
        return self._failures > 0 and time.monotonic() - self._failed_at >= self._retry_seconds

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          RunError: the last save failed.
        """
        self._settle()
        if self._failures:
            raise RunError(f"{self._folder}: the last checkpoint could not be saved (see above)")

    def close(self) -> None:
        """Waits, then stops the background threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._saver.close()

    def _begin(self, step: int, state: Mapping[str, Any], meta: dict[str, Any]) -> Future[None]:
        """Copies the arrays and continues in the background; the future holds any error."""
        tree, name = describe_tree(state), f"checksums {next(_saves)}"
        place = self._folder / str(step)
        fault_point("save_begin", step)
        try:
            if jax.process_index() == 0:
                remove_step(place)
                make_folder(place)
            with bucket_errors(place):
                self._saver.start(place / ARRAYS, state)
        except (OSError, ValueError, RuntimeError) as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed
        return self._worker.submit(self._finish, self._saver, step, meta, tree, name)

    def _finish(
        self, saver: ArraySaver, step: int, meta: dict[str, Any], tree: dict[str, list[Any]], name: str
    ) -> None:
        """Runs in the background: waits for the arrays, commits the step, removes old ones."""
        saver.wait()
        place = self._folder / str(step)
        if jax.process_index() == 0:
            fault_point("arrays_written", step)
        known = _shared_checksums(name, place)
        if jax.process_index() != 0:
            return
        items = {item: f"{ARRAYS}/{item}" for item in items_of(tree)}
        for folder in items.values():  # Orbax reports no error where it does not find what it has to put together
            with bucket_errors(place):
                if not (place / folder / INDEX).exists():
                    raise RunError(f"{place}: Orbax has written no {folder}/{INDEX}, without which it reads nothing")
        seal(place, step, identity=self._identity, meta=meta, tree=tree, items=items, known=known)
        self._manifests[step] = read_manifest(place)
        try:
            self._drop_old()
        except OSError as error:
            log.warning("%s: an old checkpoint cannot be removed: %s", self._folder, error)

    def _settle(self) -> bool:
        """Waits for the save in progress and returns whether it succeeded.

        Raises:
          RunError: it was the last of `SAVE_ATTEMPTS` failures in a row, or there are several processes, which cannot
            agree on a retry.
        """
        if self._pending is None:
            return True
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is None:
            self._saved.add(step)
            self._failures = 0
            return True
        self._failures, self._failed_at = self._failures + 1, time.monotonic()
        message = f"{self._folder / str(step)}: saving failed ({self._failures} in a row): {_one_line(error)}"
        log.error("%s", message)
        self._discard(step)
        # Only the failing process knows of the failure; the others must not continue as if the step were saved.
        if self._failures >= SAVE_ATTEMPTS or jax.process_count() > 1:
            raise RunError(message) from error
        return False

    def _discard(self, step: int) -> None:
        """Removes the files of a failed save and creates a new saver, because Orbax cannot continue after an error."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._saver.close()
        self._saver = ArraySaver(self._copied_bytes)
        if jax.process_index() == 0:
            try:
                remove_step(self._folder / str(step))
            except OSError as error:
                log.warning("%s: the rests of step %d cannot be removed: %s", self._folder, step, error)

    def _drop_old(self) -> None:
        """Removes steps older than the newest `keep` valid ones."""
        kept = 0
        for step in steps_in(self._folder):
            if kept < self._keep:
                kept += self._is_valid(step)
            else:
                self._manifests.pop(step, None)
                remove_step(self._folder / str(step))

    def _is_valid(self, step: int) -> bool:
        if step not in self._manifests:
            try:
                self._manifests[step] = examine(self._folder / str(step))
            except (Unfinished, Damaged, RequestError):
                return False
        return True

    # --- restoring ----------------------------------------------------------------------------------------------------

    def latest(self) -> int | None:
        """Returns the newest valid step, or None if nothing was saved; sets `skipped`.

        Raises:
          RequestError: the step belongs to another configuration, dataset or format; the message names the difference.
          RunError: every saved step is damaged.
        """
        self._settle()
        if jax.process_count() == 1:
            return self._find_latest()
        answer = np.int32(_NONE)
        failure: RequestError | RunError | None = None
        if jax.process_index() == 0:
            try:
                step = self._find_latest()
                answer = np.int32(_NONE if step is None else step)
            except (RequestError, RunError) as error:
                failure = error
                answer = np.int32(_REFUSED if isinstance(error, RequestError) else _FAILED)
        answer = int(multihost_utils.broadcast_one_to_all(answer))
        if failure is not None:
            raise failure
        if answer in (_REFUSED, _FAILED):
            raise (RequestError if answer == _REFUSED else RunError)(f"{self._folder}: see the message of process 0")
        return None if answer == _NONE else answer

    def _find_latest(self) -> int | None:
        search = find_newest(self._folder)
        self.skipped = search.skipped
        if search.manifest is None:
            if search.damaged:
                raise all_damaged(self._folder, search)
            return None
        self._check_identity(search.manifest)
        self._manifests[search.manifest.step] = search.manifest
        return search.manifest.step

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the `meta` values that were saved with `step`."""
        return self._manifest(step).meta

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Restores the state saved as `step` onto any mesh.

        Args:
          step: a step that `latest` returned.
          abstract: tree of arrays or `jax.ShapeDtypeStruct`s with the target shardings.

        Returns:
          A tree like `abstract`, of arrays.

        Raises:
          RequestError: the saved state has other parameters, shapes or dtypes (the message names them), or belongs to
            another run.
        """
        manifest = self._manifest(step)
        self._check_identity(manifest)
        return read_arrays(self._folder / str(step), manifest, abstract)

    def _manifest(self, step: int) -> Manifest:
        if step not in self._manifests:
            try:
                self._manifests[step] = read_manifest(self._folder / str(step))
            except (Unfinished, Damaged) as error:
                raise RunError(f"{self._folder / str(step)}: {error}") from error
        return self._manifests[step]

    def _check_identity(self, manifest: Manifest) -> None:
        # Fields that an earlier version did not record are not compared, and those of a configuration that it did not
        # have had the values that are the defaults now. The hash says nothing that the fields do not say.
        theirs, mine = ({k: v for k, v in x.items() if k != "config_hash"} for x in (manifest.identity, self._identity))
        theirs = {**{name: mine[name] for name in ADDED if name in mine}, **theirs}
        defaults = {
            f"config.{name}": value for name, value in default_fields().items() if name in mine.get("config", {})
        }
        missing = {name: x for name, x in defaults.items() if name.partition(".")[2] not in theirs.get("config", {})}
        if differences := differing_fields(theirs, mine, missing):
            raise foreign(self._folder / str(manifest.step), differences)


def remove_step(place: Path) -> None:
    """Removes a step's folder; the commit marker goes first, so that a partly removed step is not valid.

    Of a link only the link is removed, never what it leads to.
    """
    if is_link(place) or (not is_bucket(place) and place.is_file()):
        place.unlink()
        return
    with bucket_errors(place):
        if not place.exists():
            return
        (place / COMMIT).unlink(missing_ok=True)
    fault_point("gc", int(place.name))
    if is_bucket(place):
        remove_folder(place)
    else:
        shutil.rmtree(place)  # unlike `remove_folder`, raises


# --- helpers ----------------------------------------------------------------------------------------------------------


def _clean(folder: Path) -> None:
    """Removes saves that were interrupted while Orbax wrote the arrays; keeps everything else."""
    for step in steps_in(folder):
        place = folder / str(step)
        if is_link(place) or not place.is_dir() or (place / COMMIT).exists():
            continue
        if _is_unfinished(place):
            log.warning("checkpoint %s was cut short while it was saved; removed", place)
            remove_step(place)


def _is_unfinished(place: Path) -> bool:
    """Returns whether Orbax has not finished its part of a step. In a bucket it renames nothing, and marks the end."""
    if is_bucket(place):
        return (place / ARRAYS).is_dir() and not (place / ARRAYS / BUCKET_MARK).exists()
    return any(UNFINISHED_MARK in entry.name for entry in place.iterdir())


def _one_line(error: BaseException) -> str:
    """Returns an error's type and the beginning of its message, or the system's reason and a shorter beginning.

    tensorstore's messages have many lines, with the system's reason near their end.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError) or len(text) <= 300:
        return f"{type(error).__name__}: {text}"
    reason = next((os.strerror(number) for number in _REASONS if os.strerror(number) in text), "")
    return f"{type(error).__name__}: {reason + ': ' if reason else ''}{text[:240]}..."


def _shared_checksums(name: str, folder: Path) -> dict[str, Any]:
    """Computes checksums of a step's files, a share of them in each process; all must call it with the same name.

    Returns:
      in process 0 the checksums of all files, without those that another process could not read.
    """

    def of_share(names: Sequence[str]) -> dict[str, Any]:
        try:
            return checksums(folder, names)
        except (OSError, RunError) as error:
            if jax.process_index() == 0:
                raise
            log.warning("%s: process 0 reads what this one cannot: %s", folder, error)
            return {}

    return divided(name, lambda: files_of(folder), of_share)
