"""Keeps the results of a pass on disk, chunk by chunk, so that a killed pass computes only what is missing.

A chunk is one batch of consecutive questions under some budgets. Its file, `chunks/<pass>/<chunk>` below the folder of
the pass, is written atomically. Both names are digests: of what every result depends on (configuration, parameters,
data, versions, platform), and of the chunk's questions and budgets. A file of other inputs is therefore never read. The
pass removes its files when its result is written, or the next run does; removing `chunks/` by hand costs only time.

`ChunkStore` keeps scores as arrays; `visor_jax.evaluate.benchmarks.predictions` keeps answers as lines of JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from visor_jax.budget import Bits, bit_string
from visor_jax.data.questions import Failure, Place
from visor_jax.errors import RequestError
from visor_jax.files.bucket import is_bucket
from visor_jax.files.json_shape import COUNT, FLAG, TEXT, check_shape, list_of
from visor_jax.files.read_write import as_path, parse_json, remove_folder, write_bytes
from visor_jax.scale.gather import gathered
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import versions
from visor_jax.workdir.results import read_npz

log = logging.getLogger(__name__)

ARRAYS = {"record": ("U", 0), "correct": ("b", 2), "log_likelihood": ("f", 2), "routes": ("f", 2), "sizes": ("i", 2)}


@dataclass(frozen=True)
class ChunkScores:
    """The scores of one chunk: budgets in rows, its n usable questions in columns.

    Attributes:
      correct, log_likelihood, routes: as in `Scores`.
      sizes: of each question, as `scoring.sample_sizes` returns them.
      ids, tasks: of each question.
      failures: the questions of the chunk that cannot be used.
    """

    correct: Bool[np.ndarray, "budgets n"]
    log_likelihood: Float[np.ndarray, "budgets n"]
    routes: Float[np.ndarray, "n budgets"] | None
    sizes: Int[np.ndarray, "n 4"]
    ids: list[str]
    tasks: list[str]
    failures: list[Failure]

    def only(self, rows: Sequence[int]) -> ChunkScores:
        """Returns the scores of some of the budgets; there are no routes."""
        assert self.routes is None, "the policy's scores are over all budgets"
        return replace(self, correct=self.correct[rows], log_likelihood=self.log_likelihood[rows])


class PassFolder:
    """The folder that holds the chunks of one pass."""

    def __init__(self, workdir: Workdir, folder: str, identity: Mapping[str, Any], stage: str, **inputs: Any) -> None:
        """
        Args:
          workdir: the run.
          folder: of the pass, below the workdir.
          identity: of the pass (`Workdir.identity`).
          stage: the stage whose parameters are used.
          inputs: what else every result depends on, as JSON values.

        Raises:
          RequestError: that stage is not complete.
        """
        known = {
            "identity": identity,
            "parameters": workdir.stage(stage).complete().manifest_sha256,
            "versions": versions(),
            "platform": jax.default_backend(),
        }
        self._chunks = _chunks_of(workdir, folder)
        self._folder = self._chunks / _digest({**known, **inputs})

    def path(self, chunk: Mapping[str, Any], ending: str) -> Path:
        """Returns the file of a chunk, which these JSON values identify."""
        return self._folder / f"{_digest(chunk)}{ending}"

    def remove(self) -> None:
        """Removes the chunks of this pass, after its result was written."""
        if jax.process_index() != 0:
            return
        fault_point("result")
        remove_folder(self._folder)
        if not is_bucket(self._chunks):
            with contextlib.suppress(OSError):  # other passes may have theirs beside it
                self._chunks.rmdir()


class ChunkStore(PassFolder):
    """The scored chunks of one pass."""

    def __init__(
        self, workdir: Workdir, folder: str, identity: Mapping[str, Any], stage: str, *, with_features: bool
    ) -> None:
        """
        Args:
          workdir, folder, identity, stage: as for `PassFolder`.
          with_features: whether features are stored and read; they come from programs that round differently.

        Raises:
          RequestError: that stage is not complete.
        """
        super().__init__(workdir, folder, identity, stage, with_features=with_features)

    def load(self, places: Sequence[Place], budgets: Sequence[Bits], routed: bool) -> ChunkScores | None:
        """Returns the scores of a chunk; None if it is not stored, or damaged (with a warning)."""
        path = self._path(places, budgets, routed)
        if not path.exists():
            return None
        try:
            arrays = read_npz(path, ARRAYS, may_lack=("routes",), again="run the pass again")
            scores = _unpacked(arrays, path)
            _check(scores, places, len(budgets), routed)
        except (RequestError, ValueError) as error:
            log.warning("%s: cannot be used and is computed again: %s", path, error)
            return None
        return scores

    def save(self, places: Sequence[Place], budgets: Sequence[Bits], routed: bool, scores: ChunkScores) -> None:
        """Writes the scores of a chunk; every process those of its own chunks."""
        write_bytes(self._path(places, budgets, routed), _packed(scores))

    def _path(self, places: Sequence[Place], budgets: Sequence[Bits], routed: bool) -> Path:
        chunk = {"places": [place.id for place in places], "budgets": [*map(bit_string, budgets)], "routed": routed}
        return self.path(chunk, ".npz")


ResultT = TypeVar("ResultT")


class ProcessShares(Generic[ResultT]):
    """Divides the chunks of a pass among all processes: each computes its own, then all have the results of all.

    Chunk i belongs to process i modulo the number of processes, whatever an earlier run has kept: on a network's file
    system the processes may not see the same files at the same time.
    """

    def __init__(self, pack: Callable[[ResultT], bytes], unpack: Callable[[bytes], ResultT]) -> None:
        """
        Args:
          pack, unpack: between the result of a chunk and the bytes that one process sends to the others.
        """
        self._pack, self._unpack = pack, unpack
        self._computed: list[ResultT] = []

    @classmethod
    def of_scores(cls) -> ProcessShares[ChunkScores]:
        """Returns the shares of a pass that scores."""
        return ProcessShares(_packed, _scores_of)

    def mine(self, missing: Sequence[int]) -> Sequence[int]:
        """Returns those of the missing chunks that belong to this process."""
        return [index for index in missing if index % jax.process_count() == jax.process_index()]

    def add(self, result: ResultT) -> None:
        """Takes the result of one of this process's chunks; in their order."""
        self._computed.append(result)

    def fill(self, known: Sequence[ResultT | None]) -> list[ResultT]:
        """Returns the results of all chunks, each from its process, which has them from `known` or from `add`."""
        computed, self._computed = iter(self._computed), []
        own = known[jax.process_index() :: jax.process_count()]
        everyone = gathered([self._pack(next(computed) if result is None else result) for result in own])
        count = jax.process_count()
        return [self._unpack(everyone[index % count][index // count]) for index in range(len(known))]


def _scores_of(packed: bytes) -> ChunkScores:
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return _unpacked(dict(arrays), "scores of another process")


def remove_all(workdir: Workdir, folder: str) -> None:
    """Removes the chunks of all passes of a folder, which a kill after the result has left behind."""
    remove_folder(_chunks_of(workdir, folder))


def _chunks_of(workdir: Workdir, folder: str) -> Path:
    return as_path(workdir.path / folder / "chunks")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _packed(scores: ChunkScores) -> bytes:
    """Returns the content of a chunk's file: arrays, and one JSON text for what is not an array."""
    record = {"ids": scores.ids, "tasks": scores.tasks, "failures": [failure._asdict() for failure in scores.failures]}
    arrays: dict[str, Any] = {"correct": scores.correct, "log_likelihood": scores.log_likelihood, "sizes": scores.sizes}
    arrays |= {} if scores.routes is None else {"routes": scores.routes}
    file = io.BytesIO()
    np.savez(file, record=np.array(json.dumps(record)), **arrays)
    return file.getvalue()


def _unpacked(arrays: dict[str, np.ndarray], path: Any) -> ChunkScores:
    """Returns the scores in a file's arrays.

    Raises:
      RequestError, ValueError: the record in them is not one that `_packed` writes.
    """
    record = parse_json(str(arrays["record"]))
    failure = {"index": COUNT, "turn": COUNT, "reason": TEXT, "detail": TEXT, "readable": FLAG}
    check_shape(record, {"ids": list_of(TEXT), "tasks": list_of(TEXT), "failures": list_of(failure)}, path, "record")
    failures = [Failure(**{name: item[name] for name in failure}) for item in record["failures"]]
    routes = arrays.get("routes")
    return ChunkScores(
        arrays["correct"],
        arrays["log_likelihood"],
        routes,
        arrays["sizes"],
        record["ids"],
        record["tasks"],
        failures,
    )


def _check(scores: ChunkScores, places: Sequence[Place], num_budgets: int, routed: bool) -> None:
    """Checks that the scores are those of a chunk.

    Raises:
      ValueError: they are not.
    """
    failed = {Place(failure.index, failure.turn) for failure in scores.failures}
    ids, count = [place.id for place in places if place not in failed], len(scores.ids)
    shapes = [scores.correct.shape, scores.log_likelihood.shape, scores.sizes.shape]
    if scores.ids != ids or len(scores.tasks) != count or shapes != [(num_budgets, count)] * 2 + [(count, 4)]:
        raise ValueError("its arrays are of other questions or budgets")
    if (None if scores.routes is None else scores.routes.shape) != ((count, num_budgets) if routed else None):
        raise ValueError("its routes are of other questions or budgets")
