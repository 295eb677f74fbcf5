"""The workdir: where a run keeps what it makes, and how files get there whole or not at all.

In: a path (local, or a bucket such as `gs://...`) and a resolved configuration. Out: `config.json` (configuration,
versions, git revision) and one folder per stage; how its files are read and written is in `visor_jax.files.read_write`.

A workdir belongs to one configuration: `Workdir.claim` refuses another one, naming the fields that differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.errors import RequestError, short, unwritable
from visor_jax.files.read_write import (
    MAX_JSON_BYTES,
    as_path,
    read_json,
    read_regular,
    write_bytes,
    write_json,
    write_text,
)
from visor_jax.workdir.lock import WorkdirLock
from visor_jax.workdir.provenance import (
    annotations_checksum,
    default_fields,
    describe_differences,
    differing_fields,
    file_sha256,
    flat_fields,
    git_revision,
    is_free,
    plain,
    tokenizer_checksum,
    versions,
)

FORMAT = 1
# Counts the changes to what is drawn at random (starts, pictures, orders, budgets): a run is only gone on with by a
# version of the same number. 1: up to 0.1.0; 2: one key and one range of pictures for each consumer.
RANDOM_NUMBERS = 2
MAX_MANIFEST_BYTES = 2**26
MAX_STEP = 2**53  # the largest whole number that every reader of JSON keeps exactly
OFFLINE = ("search", "label")  # sections of the configuration that no trained stage reads

SPLIT_OF = {"search": "validation", "evaluate": "test"}  # other stages read the training split


@dataclass(frozen=True)
class Complete:
    """What a stage's `complete.json` says.

    Attributes:
      step: the step that is the stage's result: this one is loaded, or none.
      manifest_sha256: of that step's manifest, so of all that is in it; "" where an earlier version wrote the file.
    """

    step: int
    manifest_sha256: str


class StageFolder:
    """One stage's folder: `checkpoints/`, `metrics.jsonl`, TensorBoard events, `complete.json` when it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_complete(self) -> bool:
        return (self.path / "complete.json").exists()

    def mark_complete(self, facts: Mapping[str, Any]) -> None:
        """Write `complete.json`.

        Args:
          facts: what is known of the stage, with its last `step`, whose checkpoint has been saved.
        """
        digest = self.committed(facts["step"])
        write_json(self.path / "complete.json", {**facts, **({"manifest_sha256": digest} if digest else {})})

    def complete(self) -> Complete:
        """What `complete.json` says.

        Raises:
          RequestError: there is none, or it is not what training writes.
        """
        path = self.path / "complete.json"
        found = read_json(path)
        record = found if isinstance(found, dict) else {}
        step, digest = record.get("step"), record.get("manifest_sha256", "")
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise RequestError(
                f"{path}: step={short(step)}: expected a whole number, as training writes it; remove the file to train"
                " the stage again from its last checkpoint"
            )
        if not isinstance(digest, str):
            raise RequestError(f"{path}: manifest_sha256={short(digest)}: expected text")
        return Complete(step, digest)

    def committed(self, step: int) -> str:
        """sha256 of a step's manifest, as its commit marker has it; "" where there is none to be read."""
        try:
            commit = read_json(self.path / "checkpoints" / str(step) / "commit.json", max_bytes=2**12)
        except RequestError:
            return ""
        found = commit.get("manifest_sha256") if isinstance(commit, dict) else None
        return found if isinstance(found, str) else ""

    def fingerprint(self) -> str:
        """sha256 of what the complete stage was made of (its identity) and of its step; "" where there is none.

        Runs of the same configuration, data and seed have the same, as they have the same parameters.
        """
        try:
            step = self.complete().step
            manifest = read_json(self.path / "checkpoints" / str(step) / "manifest.json", max_bytes=MAX_MANIFEST_BYTES)
        except RequestError:
            return ""
        identity = manifest.get("identity") if isinstance(manifest, dict) else None
        return hashlib.sha256(json.dumps([step, identity], sort_keys=True).encode()).hexdigest()


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
        mine, data, drawn_as = plain(config), None, self.random_numbers()
        if (self.path / "config.json").exists():
            record = self.record()
            theirs, data = record["config"], record.get("data")
            differences = [d for d in differing_fields(theirs, mine, default_fields()) if not is_free(d[0])]
            if differences:
                raise RequestError(
                    f"--workdir: {self.path} holds another configuration: {describe_differences(differences)};"
                    " expected the same configuration or another folder"
                )
        if "stage" in mine:
            mine["stage"] = ""  # asked for anew each time
        made_with = {"versions": versions(), "git_revision": git_revision(), "format": FORMAT}
        made_with["random_numbers"] = drawn_as
        write_json(self.path / "config.json", {"config": mine, **({"data": data} if data else {}), **made_with})

    def claim_data(self, config: Any, pictures: str = "") -> None:
        """Write down which data this workdir learns from, or see that they are the ones it began with.

        Args:
          config: the configuration that names them.
          pictures: their fingerprint (`visor_jax.data.fingerprint`); "" for generated data.

        Raises:
          RequestError: the data have changed since; says which file.
        """
        record, tree = self.record(), plain(config)
        theirs, mine = record.get("data") or {}, {"pictures": pictures, "tokenizer": tokenizer_checksum(tree)}
        mine |= {split: annotations_checksum(tree, split) for split in ("train", "validation")}
        both = [name for name in mine if mine[name] and theirs.get(name)]
        if differences := differing_fields({n: theirs[n] for n in both}, {n: mine[n] for n in both}):
            raise RequestError(
                f"--workdir: {self.path} was begun with other data: {describe_differences(differences)}; expected the"
                " same files (sha256), or another folder"
            )
        known = {name: theirs.get(name) or value for name, value in mine.items()}
        if known != theirs:
            write_json(self.path / "config.json", {**record, "data": known})

    @contextlib.contextmanager
    def claimed(self, config: Any) -> Iterator[None]:
        """`claim` for a block of work; where its request turns out to be wrong, the `config.json` before stays."""
        path = self.path / "config.json"
        before = None
        if path.exists():
            self.record()  # what cannot be read is named before anything is done with it
            before = read_regular(path, MAX_JSON_BYTES)
        self.claim(config)
        try:
            yield
        except RequestError:
            if before is not None:
                write_bytes(path, before)
            raise

    def record(self) -> dict[str, Any]:
        """The content of `config.json`: the configuration, the data's checksums, versions.

        Raises:
          RequestError: there is none, it is damaged, or another format.
        """
        path = self.path / "config.json"
        record = read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            raise RequestError(f"{path}: expected an object with a field 'config'")
        if record.get("format") != FORMAT:
            raise RequestError(f"{path}: format {record.get('format')!r}, expected {FORMAT}")
        data = record.get("data")
        if data is not None and not (isinstance(data, dict) and all(isinstance(v, str) for v in data.values())):
            raise RequestError(f"{path}: field data: expected an object of checksums")
        return record

    def random_numbers(self) -> int:
        """The `RANDOM_NUMBERS` of the version that began this workdir; this version's where nothing is begun yet.

        Raises:
          RequestError: `config.json` cannot be read.
        """
        if not (self.path / "config.json").exists():
            return RANDOM_NUMBERS
        return self.record().get("random_numbers", 1)

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

    def config(self) -> dict[str, Any]:
        """The configuration this workdir was made with, as plain JSON values.

        Raises: as `record`.
        """
        return self.record()["config"]

    def identity(self, config: Any, stage: str, *, model: str = "", pictures: str | None = None) -> dict[str, Any]:
        """What a checkpoint of `stage`, or a result of a pass, must agree with to be used.

        Args:
          config: the run's configuration.
          stage: a stage, or "evaluate".
          model: "evaluate": the stage whose model is evaluated.
          pictures: "evaluate": fingerprint of the pictures asked about; None: of those the run learns from.

        Returns:
          {"stage", "config": {dotted field: value}, "config_hash", "data", "tokenizer", "pictures", "inputs"}: the
          fields that shape the result, checksums of the files it is made from ("" for those that it does not read:
          generated data and their tokenizer are told by their fields alone), and which results of earlier stages went
          in ("start": fingerprint of the stage it goes on from; "viable": names of budgets; "labels": sha256 of
          `labels.npz`). And "random_numbers", but for the first version, which wrote none.
        """
        tree = plain(config)
        fields = stage_fields(tree, stage)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        known, split = self._known_data(), SPLIT_OF.get(stage, "train")
        data = {
            "data": known.get(split) or annotations_checksum(tree, split),
            "tokenizer": known.get("tokenizer") or tokenizer_checksum(tree),
            "pictures": known.get("pictures", "") if pictures is None else pictures,
        }
        inputs = self._inputs(tree, stage, model)
        drawn_as = self.random_numbers()
        drawn = {} if drawn_as == 1 else {"random_numbers": drawn_as}
        return {"stage": stage, "config_hash": digest, "config": fields, **data, "inputs": inputs, **drawn}

    def differences(
        self, stage: str, identity: Mapping[str, Any], *, inputs: Iterable[str] = ("viable",), model: str = ""
    ) -> list[tuple[str, Any, Any]]:
        """In what a saved identity is not that of `stage` of this workdir: (field, its value, this workdir's).

        Data are compared with what `claim_data` wrote down: the files need not be at hand. Of what went in (see
        `identity`) `inputs` are compared, as far as they are there now: where a model went on from may have been
        removed or made again since, but its routes must mean the present viable budgets. What an earlier version did
        not write down is not compared.
        """
        tree, known = self.config(), self._known_data()
        mine = {"stage": stage, "tokenizer": known.get("tokenizer")}
        mine |= {"pictures": None if stage == "evaluate" else known.get("pictures")}  # those of another split
        mine |= {"data": known.get(SPLIT_OF.get(stage, "train"))}
        present, saved = self._inputs(tree, stage, model), identity.get("inputs") or {}
        mine |= {name: present.get(name) for name in inputs}
        theirs = {**identity, **{name: saved.get(name) for name in inputs}}
        both = [name for name in mine if mine[name] and theirs.get(name)]
        found = differing_fields({n: theirs[n] for n in both}, {n: mine[n] for n in both})
        return found + differing_fields(identity["config"], stage_fields(tree, stage), default_fields())

    def _known_data(self) -> dict[str, str]:
        """What `claim_data` wrote down; {} where it did not."""
        return (self.record().get("data") or {}) if (self.path / "config.json").exists() else {}

    def _inputs(self, tree: Mapping[str, Any], stage: str, model: str = "") -> dict[str, Any]:
        """What `stage` takes from earlier ones, as far as it is there: see `identity`."""
        settings = {**tree.get("train", {}), **tree.get("stage_overrides", {}).get(stage, {})}
        start = {"search": "full", "label": "universal", "evaluate": model}.get(stage, settings.get("init_from", ""))
        learns_routes = settings.get("objective") == "policy"
        inputs: dict[str, Any] = {}
        if start:
            folder = StageFolder(as_path(start)) if "/" in start else self.stage(start)
            inputs["start"] = folder.fingerprint()
        if stage in ("label", "evaluate") or learns_routes or settings.get("budgets") == "viable":
            path = self.path / "search" / "viable.json"
            found = read_json(path) if path.exists() else {}
            inputs["viable"] = found.get("viable") if isinstance(found, dict) else None
        if learns_routes:
            inputs["labels"] = file_sha256(self.path / "labels" / "labels.npz")
        return inputs


def stage_fields(tree: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """{dotted name: value} of the fields of a configuration that shape the result of `stage`."""
    fields = {}
    for name, value in flat_fields(tree):
        top, _, rest = name.partition(".")
        elsewhere = top in OFFLINE or (top == "stage_overrides" and rest.partition(".")[0] != stage)
        if top == stage or not (elsewhere or is_free(name)):
            fields[name] = value
    return fields
