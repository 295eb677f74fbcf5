"""Reads and validates the results of search and label in a workdir.

In: a workdir. Out: the viable budgets, and the arrays of the labels. Each result carries the identity of its inputs
(`Workdir.identity`), which must match this run. Results of an earlier version carry none; only their shape is checked.
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

from visor_jax.budget import MAX_SLOTS, Bits, bit_string, parse_budgets
from visor_jax.errors import RequestError, short
from visor_jax.files.json_shape import TEXT, check_shape, optional
from visor_jax.files.read_write import parse_json, read_json, read_regular
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import describe_differences

MAX_NPZ_BYTES = 2**28
MAX_INDEX = 2**53  # of a record or a turn
ARRAYS = {
    "budgets": ("U", 1),
    "label": ("iu", 1),
    "log_likelihood": ("f", 2),
    "picture_index": ("iu", 1),
    "turn": ("iu", 1),
    "num_visual": ("iu", 1),
    "identity": ("U", 0),
}
MAY_LACK = ("num_visual", "identity")  # of files that earlier versions wrote
MADE_OF_OTHERS = "the labels were made of other data: remove labels/ and run the label stage again"


def read_viable(workdir: Workdir, num_slots: int | None = None) -> list[Bits]:
    """Reads the viable budgets of a workdir, cheapest first.

    Args:
      workdir: the run.
      num_slots: of its model; None accepts the value in the file.

    Raises:
      RequestError: the search has not run, or the file is invalid or of another run.
    """
    path = workdir.path / "search" / "viable.json"
    if not path.exists():
        raise RequestError(f"{path}: not found; run the search first (visor search --workdir={workdir.path})")
    try:
        result = read_json(path)
    except RequestError as error:
        raise RequestError(f"{error}; remove it and run the search again") from error
    slots = result.get("num_slots") if isinstance(result, dict) else None
    if not isinstance(result, dict) or type(slots) is not int or not 0 <= slots <= MAX_SLOTS:
        raise RequestError(f"{path}: num_slots={slots!r}: expected a whole number, as the search writes it")
    if num_slots is not None and slots != num_slots:
        raise RequestError(f"{path}: num_slots={slots}: the model has {num_slots}; expected this run's own search")
    budgets = parse_budgets(result.get("viable") or None, slots, where=f"{path}: viable")
    counts = [sum(bits) for bits in budgets]
    if len(set(budgets)) < len(budgets) or counts != sorted(counts) or counts[-1] != slots:
        raise RequestError(
            f"{path}: viable={result['viable']}: expected different budgets, cheapest first, up to all {slots} slots"
        )
    check_made_of(workdir, "search", result.get("identity"), path)
    return budgets


@dataclasses.dataclass(frozen=True)
class Labels:
    """Pseudo-labels: `label[i]` indexes `budgets` (the viable ones, cheapest first) for question `ids[i]`.

    `picture_index[i]` and `turn[i]` locate the question in the source; `log_likelihood` is [N, budgets].
    `num_visual[i]`: its visual positions; None if they are not known.
    """

    budgets: list[Bits]
    label: np.ndarray
    log_likelihood: np.ndarray
    picture_index: np.ndarray
    turn: np.ndarray
    num_visual: np.ndarray | None = None

    @classmethod
    def read(cls, workdir: Workdir) -> Labels:
        """Reads the labels of a workdir.

        Raises:
          RequestError: the label stage has not run, the file is invalid, or it belongs to other viable budgets, another
            model or other data.
        """
        path = workdir.path / "labels" / "labels.npz"
        if not path.exists():
            raise RequestError(f"{path}: not found; run the label stage first (visor label --workdir={workdir.path})")
        saved, viable = (
            read_npz(path, ARRAYS, may_lack=MAY_LACK, again="run the label stage again"),
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
        """Describes the first invalid array; "" if all are valid."""
        count, num_budgets = len(self.label), len(self.budgets)
        if not count:
            return "holds no label"
        if self.log_likelihood.shape != (count, num_budgets):
            return f"log_likelihood has shape {self.log_likelihood.shape}, expected {(count, num_budgets)}"
        if not len(self.picture_index) == len(self.turn) == count:
            return f"{count} labels of {len(self.picture_index)} pictures and {len(self.turn)} turns"
        ranges = [
            ("label", self.label, num_budgets - 1),
            ("picture_index", self.picture_index, MAX_INDEX),
            ("turn", self.turn, MAX_INDEX),
        ]
        if self.num_visual is not None:
            if len(self.num_visual) != count:
                return f"{count} labels and num_visual of {len(self.num_visual)}"
            ranges.append(("num_visual", self.num_visual, MAX_INDEX))
        for name, values, most in ranges:
            if values.min() < 0 or values.max() > most:
                return f"{name} goes from {values.min()} to {values.max()}, expected from 0 to {most}"
        return "" if np.isfinite(self.log_likelihood).all() else "log_likelihood is not finite"

    def only(self, rows: np.ndarray) -> Labels:
        """Returns the labels of some questions, selected by booleans or indices."""
        num_visual = None if self.num_visual is None else self.num_visual[rows]
        return Labels(
            self.budgets,
            self.label[rows],
            self.log_likelihood[rows],
            self.picture_index[rows],
            self.turn[rows],
            num_visual,
        )


def check_made_of(workdir: Workdir, stage: str, identity: Any, path: Path, *, model: str = "") -> None:
    """Checks that a result was made from the present inputs of the workdir.

    Args:
      workdir: the run.
      stage: the pass that made the result.
      identity: of its inputs, as recorded in the file; None if an earlier version wrote it.
      path: for the message.
      model: for "evaluate": the stage whose model was evaluated.

    Raises:
      RequestError: the inputs differ; the message names the differences.
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
    """Reads the arrays of an uncompressed `.npz` file; checks sizes against the file before allocating anything.

    Args:
      path: the file.
      kinds: name -> (allowed `numpy.dtype.kind` characters, number of dimensions).
      may_lack: names that may be missing.
      again: how to make the file again, for messages.

    Raises:
      RequestError: the file cannot be read, or an array is missing or has another dtype or shape.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(read_regular(path, MAX_NPZ_BYTES))) as archive:
            present = {info.filename: info for info in archive.infolist()}
            names = [name for name in kinds if f"{name}.npy" in present or name not in may_lack]
            return {name: _array(archive, present[f"{name}.npy"], *kinds[name]) for name in names}
    except KeyError as error:
        raise RequestError(f"{path}: damaged ({error.args[0]} is missing); remove it and {again}") from error
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RequestError(f"{path}: damaged ({reason}); remove it and {again}") from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str, dimensions: int) -> np.ndarray:
    """Reads one array.

    Raises:
      ValueError: its header does not match its size, or it has another dtype or number of dimensions.
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
