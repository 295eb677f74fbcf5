"""What search and label leave in a workdir, read strictly: as it was written, of this run, or refused by name.

In: a workdir. Out: the viable budgets, and the arrays of the labels. Each result carries the identity of what it was
made of (`Workdir.identity`); one that an earlier version wrote carries none, and its shape alone is checked.
"""

from __future__ import annotations

import dataclasses
import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from visor_jax.budget import Bits, bit_string, parse_budgets
from visor_jax.errors import RequestError, short
from visor_jax.files.json_shape import TEXT, check_shape, optional
from visor_jax.files.read_write import parse_json, read_json, read_regular
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import describe_differences

MAX_SLOTS = 64
MAX_NPZ_BYTES = 2**28
MOST_INDEX = 2**53  # of a record or a turn
ARRAYS = {
    "budgets": ("U", 1),
    "label": ("iu", 1),
    "log_likelihood": ("f", 2),
    "picture_index": ("iu", 1),
    "turn": ("iu", 1),
    "identity": ("U", 0),
}
MADE_OF_OTHERS = "the labels were made of other data: remove labels/ and run the label stage again"


def read_viable(workdir: Workdir, num_slots: int | None = None) -> list[Bits]:
    """The viable budgets of a workdir, cheapest first.

    Args:
      workdir: the run.
      num_slots: of its model; None takes the file's word.

    Raises:
      RequestError: the search has not run, the file does not hold what it wrote, or it is another run's.
    """
    path = workdir.path / "search" / "viable.json"
    if not path.exists():
        raise RequestError(f"{path}: not found; run the search first (visor search --workdir={workdir.path})")
    found = read_json(path)
    slots = found.get("num_slots") if isinstance(found, dict) else None
    if not isinstance(found, dict) or type(slots) is not int or not 0 <= slots <= MAX_SLOTS:
        raise RequestError(f"{path}: num_slots={slots!r}: expected a whole number, as the search writes it")
    if num_slots is not None and slots != num_slots:
        raise RequestError(f"{path}: num_slots={slots}: the model has {num_slots}; expected this run's own search")
    budgets = parse_budgets(found.get("viable") or None, slots, where=f"{path}: viable")
    counts = [sum(bits) for bits in budgets]
    if len(set(budgets)) < len(budgets) or counts != sorted(counts) or counts[-1] != slots:
        raise RequestError(
            f"{path}: viable={found['viable']}: expected different budgets, cheapest first, up to all {slots} slots"
        )
    check_made_of(workdir, "search", found.get("identity"), path)
    return budgets


@dataclasses.dataclass(frozen=True)
class Labels:
    """Pseudo-labels: `label[i]` indexes `budgets` (the viable ones, cheapest first) for question `ids[i]`.

    `picture_index[i]` and `turn[i]` find the question again in the source; `log_likelihood` is [N, budgets].
    """

    budgets: list[Bits]
    label: np.ndarray
    log_likelihood: np.ndarray
    picture_index: np.ndarray
    turn: np.ndarray

    @classmethod
    def read(cls, workdir: Workdir) -> Labels:
        """The labels of a workdir.

        Raises:
          RequestError: the label stage has not run, the file does not hold what it wrote, or it was made of something
            else than what lies there now: other viable budgets, another model, other data.
        """
        path = workdir.path / "labels" / "labels.npz"
        if not path.exists():
            raise RequestError(f"{path}: not found; run the label stage first (visor label --workdir={workdir.path})")
        saved, viable = (
            read_npz(path, ARRAYS, may_lack=("identity",), again="run the label stage again"),
            read_viable(workdir),
        )
        identity = str(saved.pop("identity")) if "identity" in saved else None
        try:
            check_made_of(workdir, "label", None if identity is None else parse_json(identity), path)
        except ValueError as error:
            raise RequestError(f"{path}: damaged ({error}); remove it and run the label stage again") from error
        names = [str(name) for name in saved.pop("budgets")]
        if names != [bit_string(bits) for bits in viable]:
            raise RequestError(
                f"{path}: made for the budgets {short(names)}, and search/viable.json holds others; remove it and run"
                " the label stage again"
            )
        labels = cls(viable, **saved)
        if problem := labels.problem():
            raise RequestError(f"{path}: {problem}; remove it and run the label stage again")
        return labels

    def problem(self) -> str:
        """What no label stage writes; "" where there is nothing."""
        count, num_budgets = len(self.label), len(self.budgets)
        if not count:
            return "holds no label"
        if self.log_likelihood.shape != (count, num_budgets):
            return f"log_likelihood has shape {self.log_likelihood.shape}, expected {(count, num_budgets)}"
        if not len(self.picture_index) == len(self.turn) == count:
            return f"{count} labels of {len(self.picture_index)} pictures and {len(self.turn)} turns"
        for name, values, most in (
            ("label", self.label, num_budgets - 1),
            ("picture_index", self.picture_index, MOST_INDEX),
            ("turn", self.turn, MOST_INDEX),
        ):
            if values.min() < 0 or values.max() > most:
                return f"{name} goes from {values.min()} to {values.max()}, expected from 0 to {most}"
        return "" if np.isfinite(self.log_likelihood).all() else "log_likelihood is not finite"

    def only(self, rows: np.ndarray) -> Labels:
        """Those of some questions, told by booleans or indices."""
        arrays = (self.label, self.log_likelihood, self.picture_index, self.turn)
        return Labels(self.budgets, *(array[rows] for array in arrays))


def check_made_of(workdir: Workdir, stage: str, identity: Any, path: Path, *, model: str = "") -> None:
    """
    Args:
      workdir: the run that `path` lies in.
      stage: the pass that made it.
      identity: what the file says it was made of; None where an earlier version wrote it.
      path: for the message.
      model: "evaluate": the stage whose model was evaluated.

    Raises:
      RequestError: it was made of something else than what lies there now; names what differs.
    """
    if identity is None:
        return
    check_shape(identity, {"stage": TEXT, "config": {}, "inputs": optional({})}, path, "identity")
    if differences := workdir.differences(stage, identity, inputs=("start", "viable", "labels"), model=model):
        raise RequestError(
            f"{path}: was made of something else: {describe_differences(differences)}; expected this run's own:"
            " remove it to have it made again"
        )


def read_npz(
    path: Path, kinds: Mapping[str, tuple[str, int]], may_lack: tuple[str, ...] = (), *, again: str
) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed `.npz` file; sizes are checked against the file before anything is allocated.

    Args:
      path: the file.
      kinds: name -> (kinds of dtype as `numpy.dtype.kind` calls them, number of dimensions).
      may_lack: names that may be missing.
      again: how such a file is made, for messages.

    Raises:
      RequestError: it cannot be read, or an array is missing, or is of another kind; says which.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(read_regular(path, MAX_NPZ_BYTES))) as archive:
            present = {info.filename: info for info in archive.infolist()}
            wanted = [name for name in kinds if f"{name}.npy" in present or name not in may_lack]
            return {name: _array(archive, present[f"{name}.npy"], *kinds[name]) for name in wanted}
    except KeyError as error:
        raise RequestError(f"{path}: damaged ({error.args[0]} is missing); remove it and {again}") from error
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RequestError(f"{path}: damaged ({told}); remove it and {again}") from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str, dimensions: int) -> np.ndarray:
    """
    Raises:
      ValueError: its header does not fit its bytes, or it is an array of another kind.
    """
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    data = archive.read(info)
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"{info.filename} has format {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in kinds or len(shape) != dimensions:
        raise ValueError(f"{info.filename} has dtype {dtype} and shape {shape}")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"{info.filename} has {len(data)} bytes, too few or many for shape {shape}")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
