"""Checkpoints that prove themselves: saving in the background, and finding the newest step that can be trusted.

In: a folder, whose state it is (`identity`), pytrees of arrays. Out: `<folder>/<step>/`: `arrays/` (Orbax),
`manifest.json` and, last of all, `commit.json` (`visor_jax.checkpoint.manifest`). A step whose manifest does not hold
is skipped with a warning, and the next older one is taken.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from visor_jax.checkpoint.arrays import UNFINISHED_MARK, ArraySaver, describe_tree, items_of
from visor_jax.checkpoint.manifest import COMMIT, Damaged, Manifest, Unfinished, examine, is_link, read_manifest, seal
from visor_jax.checkpoint.restoring import ADDED, ARRAYS, all_damaged, find, foreign, read_arrays, rooted, steps_in
from visor_jax.errors import RequestError, RunError
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.provenance import differing_fields, plain

log = logging.getLogger(__name__)

SAVE_ATTEMPTS = 3  # failed saves in a row that end the run
_NONE, _REFUSED, _FAILED = -1, -2, -3  # what process 0 tells the others instead of a step


class Checkpoints:
    """One stage's checkpoints. With several processes, all of them make the same calls.

    As a context manager it waits for the last save at the end of its block; an error in the block is not hidden by it.
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
          folder: made if need be; rests of saves that were cut short are removed from it.
          identity: JSON values that say whose state this is; must equal those of a step to resume it.
          keep: how many good steps to keep, 1 or more.
          retry_seconds: how long to wait after a failed save.
          copied_bytes: see `ArraySaver`.
        """
        self._folder, self._identity, self._keep = rooted(folder), plain(identity), keep
        self._retry_seconds = retry_seconds
        self._copied_bytes = copied_bytes
        self._saver, self._worker = ArraySaver(copied_bytes), ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None  # a save on its way
        self._failures, self._failed_at = 0, 0.0  # in a row
        self._saved: set[int] = set()  # by this process
        self._manifests: dict[int, Manifest] = {}  # of steps that this process has written or examined
        self.passed_over: list[tuple[int, str]] = []
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
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
        """Save `state` as `step`; returns when the arrays are copied, so that the next step may overwrite them.

        Args:
          step: optimiser steps done; a step that is already saved is left as it is.
          state: {"params": tree, "opt_state": tree, ...} of arrays.
          meta: small JSON values to keep beside them (`meta` gives them back).
          wait: return only when the step is on disk and counts.

        Raises:
          RunError: this save, or the earlier one it had to wait for, was one failure in a row too many.
        """
        self._settle()
        while step not in self._saved:
            self._pending = (step, self._begin(step, state, dict(meta or {})))
            if not wait:
                return
            if not self._settle():
                time.sleep(self._retry_seconds)

    def poll(self) -> bool:
        """To be asked at every step: whether a save has failed and is to be made again now. Costs nothing.

        Raises:
          RunError: too many saves in a row have failed.
        """
        if self._pending is not None:
            if not self._pending[1].done():
                return False
            self._settle()
        return self._failures > 0 and time.monotonic() - self._failed_at >= self._retry_seconds

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
          RunError: the last save failed, so that what was to be kept is not.
        """
        self._settle()
        if self._failures:
            raise RunError(f"{self._folder}: the last checkpoint could not be saved (see above)")

    def close(self) -> None:
        """`wait`, then let go of the threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._saver.close()

    def _begin(self, step: int, state: Mapping[str, Any], meta: dict[str, Any]) -> Future[None]:
        """Copy the arrays and go on in the background; whatever goes wrong is in the result."""
        tree = describe_tree(state)
        place = self._folder / str(step)
        fault_point("save_begin", step)
        try:
            if jax.process_index() == 0:
                remove_step(place)
                place.mkdir(parents=True)
            self._saver.start(place / ARRAYS, state)
        except (OSError, ValueError, RuntimeError) as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed
        return self._worker.submit(self._finish, self._saver, step, meta, tree)

    def _finish(self, saver: ArraySaver, step: int, meta: dict[str, Any], tree: dict[str, list[Any]]) -> None:
        """In the background: wait for the arrays, prove the step, drop old ones."""
        saver.wait()
        if jax.process_index() != 0:
            return
        fault_point("arrays_written", step)
        place = self._folder / str(step)
        items = {item: f"{ARRAYS}/{item}" for item in items_of(tree)}
        seal(place, step, identity=self._identity, meta=meta, tree=tree, items=items)
        self._manifests[step] = read_manifest(place)
        try:
            self._drop_old()
        except OSError as error:
            log.warning("%s: an old checkpoint cannot be removed: %s", self._folder, error)

    def _settle(self) -> bool:
        """Wait for the save on its way and deal with how it ends; whether nothing failed.

        Raises:
          RunError: that was one failure in a row too many, or several processes cannot agree on a retry.
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
        # A failure is seen by the process that had it; the others must not go on as if it were saved.
        if self._failures >= SAVE_ATTEMPTS or jax.process_count() > 1:
            raise RunError(message) from error
        return False

    def _discard(self, step: int) -> None:
        """Free what a failed save has written, and start afresh with Orbax, which is of no use after an error."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._saver.close()
        self._saver = ArraySaver(self._copied_bytes)
        if jax.process_index() == 0:
            try:
                remove_step(self._folder / str(step))
            except OSError as error:
                log.warning("%s: the rests of step %d cannot be removed: %s", self._folder, step, error)

    def _drop_old(self) -> None:
        """Keep the newest `keep` good steps, and whatever is newer than those; remove older ones."""
        kept = 0
        for step in steps_in(self._folder):
            if kept < self._keep:
                kept += self._is_good(step)
            else:
                self._manifests.pop(step, None)
                remove_step(self._folder / str(step))

    def _is_good(self, step: int) -> bool:
        if step not in self._manifests:
            try:
                self._manifests[step] = examine(self._folder / str(step))
            except (Unfinished, Damaged, RequestError):
                return False
        return True

    # --- restoring ----------------------------------------------------------------------------------------------------

    def latest(self) -> int | None:
        """The newest step that proves itself; None where nothing was ever saved. See `passed_over` for the others.

        Raises:
          RequestError: that step is of another configuration, dataset or format; names what differs.
          RunError: there are saved steps, and every one is damaged.
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
        found = find(self._folder)
        self.passed_over = found.passed_over
        if found.manifest is None:
            if found.damaged:
                raise all_damaged(self._folder, found)
            return None
        self._check_identity(found.manifest)
        self._manifests[found.manifest.step] = found.manifest
        return found.manifest.step

    def meta(self, step: int) -> dict[str, Any]:
        """The small values that were saved with `step`."""
        return self._manifest(step).meta

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """The state saved as `step`, on any mesh.

        Args:
          step: one that `latest` has named.
          abstract: the tree that is wanted: arrays, or `jax.ShapeDtypeStruct`s, with the shardings they are to have.

        Returns:
          A tree like `abstract`, of arrays.

        Raises:
          RequestError: the saved state has other parameters, shapes or dtypes (they are named), or is not this run's.
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
        theirs = manifest.identity
        # What an earlier version did not write down is not compared.
        theirs = {**{name: self._identity[name] for name in ADDED if name in self._identity}, **theirs}
        if differences := differing_fields(theirs, self._identity):
            raise foreign(self._folder / str(manifest.step), differences)


def remove_step(place: Path) -> None:
    """Remove a step's folder; the marker goes first, so that a half removed step does not count."""
    if not place.exists():
        return
    (place / COMMIT).unlink(missing_ok=True)
    fault_point("gc", int(place.name))
    if "://" in str(place):
        epath.Path(place).rmtree()
    else:
        shutil.rmtree(place)


# --- inside -----------------------------------------------------------------------------------------------------------


def _clean(folder: Path) -> None:
    """Remove saves that a kill cut short (known by Orbax's unfinished folder in them); anything else stays."""
    for step in steps_in(folder):
        place = folder / str(step)
        if is_link(place) or not place.is_dir() or (place / COMMIT).exists():
            continue
        if any(UNFINISHED_MARK in entry.name for entry in place.iterdir()):
            log.warning("checkpoint %s was cut short while it was saved; removed", place)
            remove_step(place)


def _one_line(error: BaseException) -> str:
    """An error's kind and the beginning of its message (tensorstore's run over many lines)."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"
