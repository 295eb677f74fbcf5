"""Mixtures: several sources, from a YAML file or from a list in the configuration.

In: the `data` section. Out: its `Entry`s, each with the place that messages name. Imports no JAX and opens no records.

A file is a list of entries, or has one under `datasets`, as LLaVA-NeXT's files have:

    datasets:
      - json_path: llava_instruct.json
        sampling_strategy: first:10%
      - path: ai2d(cauldron,llava_format)/train-*.parquet
        source: parquet          # else by the ending of the name
        weight: 2                # share of the stream, relative to the other entries; on all entries or on none
        root: llava_ov           # below data.root: the entry's own folder, of its file and of its pictures
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from visor_jax.config.data_fields import BUILT_IN
from visor_jax.config.sampling import parse_sampling
from visor_jax.errors import RequestError, nearest
from visor_jax.files.read_write import as_path, read_regular

MIXTURE_SUFFIXES = (".yaml", ".yml")
MAX_BYTES = 16 * 2**20  # of a mixture file
MAX_ENTRIES = 10_000
_MAX_DEPTH = 20  # of lists and entries within each other; a mixture has three

GENERATED = BUILT_IN  # sources without files; the path of such an entry names an exercise

_KEYS = {
    "path": "path",
    "json_path": "path",
    "sampling": "sampling",
    "sampling_strategy": "sampling",
    "source": "source",
    "root": "root",
    "weight": "weight",
}


@dataclass(frozen=True)
class Entry:
    """One source of a mixture.

    Attributes:
      path: the file or pattern below its root, or of a generated source the exercise, as `data.path`.
      source: a name from the table of sources; "" recognizes it by the ending of `path`.
      sampling: which records are used (`visor_jax.config.sampling`).
      weight: share of the training stream relative to the other entries; 0 makes it the number of records.
      place: where the entry stands, for messages.
      root: folder below the mixture's root that holds the file and its pictures; "" for the mixture's root itself.
    """

    path: str
    source: str = ""
    sampling: str = "all"
    weight: float = 0.0
    place: str = ""
    root: str = ""

    @property
    def is_generated(self) -> bool:
        """Returns whether the entry has no files."""
        return self.source in GENERATED


@dataclass(frozen=True)
class Mixture:
    """The entries of a mixture and the folder that holds their files; `file` is None for a list in a configuration."""

    name: str
    root: Path
    entries: tuple[Entry, ...]
    file: Path | None = None

    def root_of(self, entry: Entry) -> Path:
        """Returns the folder that holds an entry's file and its pictures."""
        return self.root / entry.root if entry.root else self.root


def is_mixture(data: Mapping[str, Any]) -> bool:
    """Returns whether the fields of a `data` section configure a mixture."""
    return bool(data.get("mixture") or data.get("parts"))


def generated_parts(data: Mapping[str, Any]) -> list[int]:
    """Returns the indices of the generated ones of `data.parts`; the entries of a file never are."""
    parts: Sequence[Sequence[Any]] = () if data.get("mixture") else data.get("parts") or ()
    return [index for index, part in enumerate(parts) if part[0] in GENERATED]


def mixture_fields(file: Path) -> dict[str, Any]:
    """Returns fields of `config.data` that evaluate on all records of the sources that a mixture file names."""
    fields = {"root": str(file.parent), "mixture": file.name, "test_fraction": 0.0}
    return {**fields, "path": "", "parts": (), "sampling": "all"}


def mixture_file(root: str, name: str) -> Path:
    """Returns the path of a mixture file: below `root`, or if there is none, relative to the current folder."""
    below = as_path(name) if name.startswith("~") else as_path(root) / name
    here = as_path(name)
    return here if not below.exists() and here.exists() else below


def read_mixture(data: Mapping[str, Any]) -> Mixture:
    """Reads the mixture that the fields of a `data` section (`mixture` or `parts`, and `root`) configure.

    Raises:
      RequestError: the file cannot be read, or an entry does not fit; the message names file, line and field.
    """
    root, name = data.get("root") or "", data.get("mixture") or ""
    if name:
        file = mixture_file(root, name)
        folder = as_path(root) if root else file.parent
        entries = _file_entries(file)
    else:
        file, folder = None, as_path(root)
        entries = [_listed(item, f"data.parts[{number}]") for number, item in enumerate(data.get("parts") or ())]
    for entry in entries:
        if entry.is_generated and file is None:
            _check_generated(entry)
        else:
            _check_inside(folder, entry)
    weighted = [bool(entry.weight) for entry in entries]
    if any(weighted) and not all(weighted):
        missing = entries[weighted.index(False)]
        raise RequestError(f"{missing.place}: no weight; expected a weight on every entry of the mixture, or on none")
    return Mixture(file.stem if file else "parts", folder, tuple(entries), file)


# --- a list in the configuration --------------------------------------------------------------------------------------


def _listed(item: tuple[str, str, str, float], place: str) -> Entry:
    source, path, sampling, weight = item
    return _entry({"source": source, "path": path, "sampling": sampling or "all", "weight": weight or None}, place)


# --- a YAML file ------------------------------------------------------------------------------------------------------


def _file_entries(file: Path) -> list[Entry]:
    text = _read(file)
    try:
        _refuse_aliases(file, text)
        value, lines = yaml.safe_load(text), _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise RequestError(f"data.mixture: {file}{where}: not YAML that is read: {_one_line(error.problem)}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError, AttributeError) as error:
        raise RequestError(f"data.mixture: {file}: not YAML that is read: {_one_line(error)}") from None
    items = value.get("datasets") if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        raise RequestError(f"data.mixture: {file}: expected `datasets:` with a list of entries (json_path or path)")
    if len(items) > MAX_ENTRIES:
        raise RequestError(f"data.mixture: {file}: {len(items)} entries; expected at most {MAX_ENTRIES}")
    lines += [0] * (len(items) - len(lines))
    return [
        _entry(item, f"data.mixture: {file} line {line} (datasets[{number}])")
        for number, (item, line) in enumerate(zip(items, lines, strict=False))
    ]


def _read(file: Path) -> str:
    try:
        return read_regular(file, MAX_BYTES).decode("utf-8-sig")
    except IsADirectoryError:
        raise RequestError(f"data.mixture: {file} is a folder; expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"data.mixture: {file}: not UTF-8 at byte {error.start + 1}") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"data.mixture: cannot read {file}: {getattr(error, 'strerror', None) or error}") from None


def _refuse_aliases(file: Path, text: str) -> None:
    """Refuses aliases, by which a small file describes values of any size, and nesting, which is slow to parse."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise RequestError(f"data.mixture: {file} line {line}: the alias *{event.anchor[:30]}; expected the value")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise RequestError(f"data.mixture: {file} line {line}: nested too deeply; expected a list of entries")


def _lines(node: Any) -> list[int]:
    """Returns the line, counted from 1, on which each entry of a parsed mixture begins."""
    if isinstance(node, yaml.MappingNode):
        node = next((value for key, value in node.value if key.value == "datasets"), None)
    return [item.start_mark.line + 1 for item in node.value] if isinstance(node, yaml.SequenceNode) else []


def _one_line(error: Any) -> str:
    return " ".join(str(error).split())[:200]


# --- one entry --------------------------------------------------------------------------------------------------------


def _entry(item: Any, place: str) -> Entry:
    if not isinstance(item, dict):
        raise RequestError(f"{place}: expected an entry with json_path or path, got {type(item).__name__}")
    fields: dict[str, Any] = {}
    for key, value in item.items():
        name = _KEYS.get(key) if isinstance(key, str) else None
        if name is None:
            hint = nearest(key[:50], _KEYS) if isinstance(key, str) else ""
            raise RequestError(
                f"{place}: unknown key {_shown(key)}; expected {', '.join(_KEYS)}" + (f"; {hint}" if hint else "")
            )
        if name in fields:
            raise RequestError(f"{place}: {key} repeats {name}; expected one of them")
        if value is not None:
            fields[name] = value
    path = fields.get("path")
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise RequestError(f"{place}: json_path={_shown(path)}: expected the name of a file below data.root")
    for name in ("source", "sampling", "root"):
        if not isinstance(fields.get(name, ""), str):
            raise RequestError(f"{place}: {name}={_shown(fields[name])}: expected text")
    sampling = fields.get("sampling", "all")
    try:
        parse_sampling(sampling)
    except ValueError as error:
        raise RequestError(f"{place}: sampling_strategy={_shown(sampling)}: {error}") from None
    weight = _weight(fields.get("weight"), place)
    return Entry(path, fields.get("source", ""), sampling, weight, place, fields.get("root", ""))


def _shown(value: Any) -> str:
    """Returns a short form of a value for messages: a scalar itself, else its type."""
    if isinstance(value, str | bool | float) or value is None or (isinstance(value, int) and abs(value) < 10**18):
        return repr(value)[:80]
    return type(value).__name__


def _weight(value: Any, place: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
        raise RequestError(f"{place}: weight={_shown(value)}: expected a number above 0")
    return float(value)


def _check_generated(entry: Entry) -> None:
    """Refuses to choose among the samples of a generated source, or to weigh it by their number: it is endless."""
    if entry.sampling != "all":
        raise RequestError(
            f"{entry.place}: sampling={_shown(entry.sampling)}: chooses among stored records; expected 'all' for the"
            f" generated source {entry.source!r}"
        )
    if not entry.weight:
        raise RequestError(f"{entry.place}: weight=0: {entry.source!r} has no number of records; expected a weight")


def _check_inside(root: Path, entry: Entry) -> None:
    """Refuses a folder or a path that leaves the root, by its name or as an absolute one."""
    top = os.path.abspath(root)
    own = os.path.join(top, entry.root)
    for key, name, path in (("root", entry.root, own), ("json_path", entry.path, os.path.join(own, entry.path))):
        inside = f"{os.path.normpath(path)}/".startswith(f"{top.rstrip('/')}/")
        if name.startswith("~") or "://" in name or "\0" in name or not inside:
            raise RequestError(f"{entry.place}: {key}={_shown(name)}: expected a path below data.root={str(root)!r}")
