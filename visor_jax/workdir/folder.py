"""The workdir: the folder that holds a run's files.

In: a path (local, or a bucket such as `gs://...`) and a resolved configuration. Out: `config.json` (configuration,
versions, git revision) and one folder per stage. `visor_jax.files.read_write` reads and writes the files.

A workdir belongs to one configuration: `Workdir.claim` rejects another one and names the fields that differ.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.config import ConfigLike
from visor_jax.config.former import is_former, without_former
from visor_jax.config.shipped import checkpoint_folder
from visor_jax.errors import RequestError, short, unwritable
from visor_jax.files.bucket import bucket_errors, is_bucket, make_folder
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
    checkpoint_sha256,
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
# Version of the random numbers (initial weights, pictures, orders, budgets): a run can only be resumed by a version of
# the package with the same number. 1: up to 0.1.0; 2: one key and one range of pictures for each consumer.
RANDOM_NUMBERS = 2
MAX_MANIFEST_BYTES = 2**26
MAX_STEP = 2**53  # the largest integer that every JSON reader represents exactly
OFFLINE = ("search", "label")  # sections of the configuration that no trained stage reads
# Fields that change where results come from, or what is timed, not the answers.
WITHOUT_EFFECT = ("evaluate.cache_gigabytes", "evaluate.timing_rounds")

SPLIT_OF = {"search": "validation", "evaluate": "test"}  # other stages read the training split


@dataclass(frozen=True)
class Complete:
    """The content of a stage's `complete.json`.

    Attributes:
      step: the step that is the stage's result; no other step is loaded.
      manifest_sha256: of that step's manifest, which covers all its files; "" if an earlier version wrote the file.
    """

    step: int
    manifest_sha256: str


class StageFolder:
    """One stage's folder: `checkpoints/`, `metrics.jsonl`, TensorBoard events, and `complete.json` at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_complete(self) -> bool:
        """Returns whether the stage has a `complete.json`."""
        return (self.path / "complete.json").exists()

    def mark_complete(self, facts: Mapping[str, Any]) -> None:
        """Writes `complete.json`.

        Args:
          facts: fields to write, with the last `step`, whose checkpoint has been saved.
        """
        digest = self.committed(facts["step"])
        write_json(self.path / "complete.json", {**facts, **({"manifest_sha256": digest} if digest else {})})

    def complete(self) -> Complete:
        """Reads `complete.json`.

        Raises:
          RequestError: the file is missing or invalid.
        """
        path = self.path / "complete.json"
        value = read_json(path)
        record = value if isinstance(value, dict) else {}
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
        """Returns the sha256 of a step's manifest from its commit marker; "" if the marker cannot be read."""
        try:
            commit = read_json(self.path / "checkpoints" / str(step) / "commit.json", max_bytes=2**12)
        except RequestError:
            return ""
        digest = commit.get("manifest_sha256") if isinstance(commit, dict) else None
        return digest if isinstance(digest, str) else ""

    def fingerprint(self) -> str:
        """Returns the sha256 of a complete stage's identity and step; "" if they cannot be read.

        Runs of the same configuration, data and seed have the same fingerprint and the same parameters.
        """
        try:
            step = self.complete().step
            manifest = read_json(self.path / "checkpoints" / str(step) / "manifest.json", max_bytes=MAX_MANIFEST_BYTES)
        except RequestError:
            return ""
        identity = manifest.get("identity") if isinstance(manifest, dict) else None
        return hashlib.sha256(json.dumps([step, identity], sort_keys=True).encode()).hexdigest()


class Workdir:
    """A run's folder. The constructor does not access the disk; `create` and `claim` do."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
          RequestError: the path is empty, holds control characters, or names no bucket of Google Cloud Storage.
        """
        text = os.fspath(path)
        if not text or not text.isprintable():
            raise RequestError(f"--workdir: {text!r} is not a usable path: expected printable characters")
        if (is_bucket(text) or text.startswith("gs:")) and not re.match(r"gs://[^/]", text):
            raise RequestError(f"--workdir={text}: expected gs://BUCKET/FOLDER or a local folder")
        self.path = as_path(text)

    def stage(self, name: str) -> StageFolder:
        """Returns the folder of a stage."""
        return StageFolder(self.path / name)

    def create(self) -> None:
        """Creates the folder and checks that it is writable.

        Raises:
          RequestError: the path is a file, not writable, or has characters that checkpoints cannot be saved under.
          RunError: the disk is full.
        """
        # Orbax looks for the files of a save by a pattern that begins with the folder's path, and what it does not find
        # is missing from the checkpoint without an error; tensorstore takes a backslash for a slash.
        if not is_bucket(self.path) and (found := re.search(r"[*?[\\]", os.fspath(self.path.absolute()))):
            raise RequestError(
                f"--workdir={self.path.absolute()}: checkpoints cannot be saved below a folder with {found[0]!r} in its"
                " name; expected a path without *, ?, [ and \\"
            )
        probe = self.path / ".writable"
        try:
            make_folder(self.path)
            write_text(probe, "")
            with bucket_errors(probe):
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(f"--workdir={self.path}", error) from error

    def lock(self) -> WorkdirLock:
        """Returns a context manager that excludes other runs; of several processes only process 0 takes it."""
        return WorkdirLock(self.path / "lock.json")

    def claim(self, config: ConfigLike) -> None:
        """Writes `config.json`, after checking that an existing one has the same configuration (only in process 0).

        The overrides of stages that have not begun may differ: a run may be planned stage by stage.

        Raises:
          RequestError: the folder holds another configuration, or a `config.json` that cannot be read.
        """
        mine, data, random_numbers = plain(config), None, self.random_numbers()
        if (self.path / "config.json").exists():
            record = self.record()
            theirs, data = record["config"], record.get("data")
            differences = [d for d in differing_fields(theirs, mine, default_fields()) if not self._is_free(d[0])]
            if differences:
                of_stages = all(name.startswith(("train.", "stage_overrides.")) for name, *_ in differences)
                further = f", in which a stage may start from {self.path}/STAGE (init_from)" if of_stages else ""
                raise RequestError(
                    f"--workdir: {self.path} holds another configuration: {describe_differences(differences)};"
                    f" expected the same configuration or another folder{further}"
                )
        if "stage" in mine:
            mine["stage"] = ""  # chosen at each call
        provenance = {"versions": versions(), "git_revision": git_revision(), "format": FORMAT}
        provenance["random_numbers"] = random_numbers
        write_json(self.path / "config.json", {"config": mine, **({"data": data} if data else {}), **provenance})

    def _is_free(self, field: str) -> bool:
        """Returns whether a field may differ from what this workdir was started with."""
        section, _, rest = field.partition(".")
        of_later_stage = section == "stage_overrides" and not self.stage(rest.partition(".")[0]).path.exists()
        return of_later_stage or is_free(field)

    def claim_data(self, config: ConfigLike, pictures: str = "") -> None:
        """Records the training data of this workdir, after checking that they match those recorded before.

        Args:
          config: the configuration that names the data.
          pictures: their fingerprint (`visor_jax.data.fingerprint`); "" for generated data.

        Raises:
          RequestError: the data have changed; the message names the file.
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
    def claimed(self, config: ConfigLike) -> Iterator[None]:
        """Claims the workdir for a block of work; a RequestError restores the previous `config.json`."""
        path = self.path / "config.json"
        before = None
        if path.exists():
            self.record()  # raises before anything is written if the file is invalid
            before = read_regular(path, MAX_JSON_BYTES)
        self.claim(config)
        try:
            yield
        except RequestError:
            if before is not None:
                write_bytes(path, before)
            elif {entry.name for entry in self.path.iterdir()} <= {path.name, "lock.json"}:
                path.unlink()  # nothing was done, so that the workdir may be begun with other settings
            raise

    def record(self) -> dict[str, Any]:
        """Reads `config.json`: the configuration, checksums of the data, versions.

        Raises:
          RequestError: the file is missing, damaged or of another format.
        """
        path = self.path / "config.json"
        if not path.exists():
            raise RequestError(f"{path}: no such file; expected a run's folder, or --config=FILE to begin a run")
        record = read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            raise RequestError(f"{path}: expected an object with a field 'config'")
        if record.get("format") != FORMAT:
            raise RequestError(
                f"{path}: format {record.get('format')!r}, expected {FORMAT}; read it with {writer_of(record)}"
            )
        data = record.get("data")
        if data is not None and not (isinstance(data, dict) and all(isinstance(v, str) for v in data.values())):
            raise RequestError(f"{path}: field data: expected an object of checksums")
        return {**record, "config": without_former(record["config"])}

    def random_numbers(self) -> int:
        """Returns the `RANDOM_NUMBERS` of the version that started this workdir; this version's if it is new.

        Raises:
          RequestError: `config.json` cannot be read.
        """
        if not (self.path / "config.json").exists():
            return RANDOM_NUMBERS
        return self.record().get("random_numbers", 1)

    def check_random_numbers(self) -> None:
        """Checks the version of the random numbers; to be called before the run computes anything.

        Raises:
          RequestError: the workdir was started by a version that draws other random numbers.
        """
        if (theirs := self.random_numbers()) != RANDOM_NUMBERS:
            raise RequestError(
                f"--workdir: {self.path} is unfinished, and was begun by a version that draws other random numbers"
                f" (random_numbers is {theirs} there and {RANDOM_NUMBERS} here); finish it with"
                f" {writer_of(self.record())}, or start in another folder"
            )

    def config(self) -> dict[str, Any]:
        """Returns the configuration of this workdir as plain JSON values.

        Raises:
          RequestError: as `record`.
        """
        return self.record()["config"]

    def identity(
        self, config: ConfigLike, stage: str, *, model: str = "", pictures: str | None = None
    ) -> dict[str, Any]:
        """Returns the identity that a checkpoint of `stage`, or a result of a pass, must match to be used.

        Args:
          config: the run's configuration.
          stage: a stage, or "evaluate".
          model: for "evaluate": the stage whose model is evaluated.
          pictures: for "evaluate": fingerprint of its pictures; None: of the training pictures.

        Returns:
          {"stage", "config": {dotted field: value}, "config_hash", "data", "tokenizer", "pictures", "inputs"}: the
          fields that affect the result, checksums of the files that it reads ("" for files that it does not read;
          generated data and their tokenizer are identified by their fields alone), and the results of earlier stages
          that it uses ("start": fingerprint of the stage that it starts from; "viable": names of budgets; "labels":
          sha256 of `labels.npz`). Also "random_numbers", except for its first version.
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
        random_numbers = self.random_numbers()
        drawn = {} if random_numbers == 1 else {"random_numbers": random_numbers}
        return {"stage": stage, "config_hash": digest, "config": fields, **data, "inputs": inputs, **drawn}

    def differences(
        self, stage: str, identity: Mapping[str, Any], *, inputs: Iterable[str] = ("viable",), model: str = ""
    ) -> list[tuple[str, Any, Any]]:
        """Lists where a saved identity differs from that of `stage` in this workdir: (field, saved value, this value).

        Data are compared with the record of `claim_data`, so the files need not exist. Of the results of earlier stages
        (see `identity`) only `inputs` are compared, if they exist now: the stage that a model started from may have
        been removed or trained again, but its routes must refer to the present viable budgets. Fields that an earlier
        version did not record are not compared.
        """
        tree, known = self.config(), self._known_data()
        mine = {"stage": stage, "tokenizer": known.get("tokenizer")}
        mine |= {"pictures": None if stage == "evaluate" else known.get("pictures")}  # evaluation reads another split
        mine |= {"data": known.get(SPLIT_OF.get(stage, "train"))}
        present, saved = self._inputs(tree, stage, model), identity.get("inputs") or {}
        mine |= {name: present.get(name) for name in inputs}
        theirs = {**identity, **{name: saved.get(name) for name in inputs}}
        both = [name for name in mine if mine[name] and theirs.get(name)]
        differences = differing_fields({n: theirs[n] for n in both}, {n: mine[n] for n in both})
        fields = {name: value for name, value in identity["config"].items() if not is_former(name, value)}
        return differences + differing_fields(fields, stage_fields(tree, stage), default_fields())

    def _known_data(self) -> dict[str, str]:
        """Returns the record of `claim_data`; {} if there is none."""
        return (self.record().get("data") or {}) if (self.path / "config.json").exists() else {}

    def _inputs(self, tree: Mapping[str, Any], stage: str, model: str = "") -> dict[str, Any]:
        """Returns the results of earlier stages that `stage` uses and that exist; see `identity`."""
        settings = {**tree.get("train", {}), **tree.get("stage_overrides", {}).get(stage, {})}
        start = {"search": "full", "label": "universal", "evaluate": model}.get(stage, settings.get("init_from", ""))
        learns_routes = settings.get("objective") == "policy"
        inputs: dict[str, Any] = {}
        if start and (checkpoint := checkpoint_folder(start)):
            inputs["start"] = checkpoint_sha256(checkpoint)
        elif start:
            folder = StageFolder(as_path(start)) if "/" in start else self.stage(start)
            inputs["start"] = folder.fingerprint()
        if stage in ("label", "evaluate") or learns_routes or settings.get("budgets") == "viable":
            path = self.path / "search" / "viable.json"
            search = read_json(path) if path.exists() else {}
            inputs["viable"] = search.get("viable") if isinstance(search, dict) else None
        if learns_routes:
            inputs["labels"] = file_sha256(self.path / "labels" / "labels.npz")
        return inputs


def stage_fields(tree: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Returns {dotted name: value} of the configuration fields that affect the result of `stage`."""
    fields = {}
    for name, value in flat_fields(tree):
        top, _, rest = name.partition(".")
        elsewhere = top in OFFLINE or (top == "stage_overrides" and rest.partition(".")[0] != stage)
        if name not in WITHOUT_EFFECT and (top == stage or not (elsewhere or is_free(name))):
            fields[name] = value
    return fields


def writer_of(record: Mapping[str, Any]) -> str:
    """Returns the version of this package that wrote a `config.json`, for a message."""
    recorded = record.get("versions")
    version = recorded.get("visor-jax") if isinstance(recorded, dict) else None
    known = isinstance(version, str) and re.fullmatch(r"[\w.+-]{1,40}", version)
    return f"visor_jax {version}" if known else "the version of visor_jax that wrote it"
