"""Reads data sets that TFDS has prepared as ArrayRecord: registered, locally built, or stored by `visor_jax_data`.

In: `data.path`, TFDS's name of a data set ("name", "name/config", "name/config:1.0.0"); `data.root`, TFDS's folder of
data sets; `data.features`, which features hold what. Out: a `StoredSource`. Examples are read at random places in
ArrayRecord files. TensorFlow is not imported, the data set's own code is not run, and nothing is downloaded.

TFDS's splits "train", "validation" and "test" are read as those. Where a data set lacks one of them, that one is a part
of its "train", which `data.test_fraction` divides as it divides a single file.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visor_jax.config import Config
from visor_jax.data.sample import SkipSample
from visor_jax.data.source_kind import SPLITS, SourceKind
from visor_jax.data.sources.files import reading, require_usable
from visor_jax.data.sources.stored import WHOLE, StoredSource
from visor_jax.data.sources.tfds_features import (
    BUILDER_LAYOUT,
    Literal,
    Mapped,
    builder_record,
    check_paths,
    default_mapping,
    inner_features,
    mapped_record,
    parse_mapping,
    plain,
)
from visor_jax.errors import RequestError, nearest
from visor_jax.files.read_write import as_path, read_json

_NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::([0-9.*]+))?")
_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")
_ALIASES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_FEATURES_OF_TFDS = "tensorflow_datasets.core.features."


def prepared_folder(root: Path, path: str) -> Path:
    """Returns the folder of a prepared data set: of the newest version that fits, and of the only configuration.

    Raises:
        RequestError: the name cannot be read, or there is no such data set; the message names those that exist.
    """
    match = _NAME.fullmatch(path)
    if match is None:
        raise RequestError(
            f"data.path={path!r}: expected TFDS's name of a data set: name, name/config or name/config:1.0.0"
        )
    name, config, version = match.groups()
    folder = root / name
    if not folder.is_dir():
        known = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
        hint = nearest(name, known)
        raise RequestError(
            f"data.path={path!r}: no data set {name!r} in data.root={str(root)!r}"
            + (f"; {hint}" if hint else f"; prepare it first: tfds build {name} --file_format=array_record")
        )
    if config is not None:
        folder = folder / config
    elif not _versions(folder):
        configs = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and _versions(entry))
        if len(configs) != 1:
            raise RequestError(f"data.path={path!r}: expected a configuration, one of {', '.join(configs) or '(none)'}")
        folder = folder / configs[0]
    versions = [found for found in _versions(folder) if version is None or fnmatch.fnmatchcase(found, version)]
    if not versions:
        known = ", ".join(_versions(folder)) if folder.is_dir() else "no such folder"
        raise RequestError(
            f"data.path={path!r}: {folder} holds no prepared version that fits ({known or 'it is empty'})"
        )
    return folder / versions[-1]


def _versions(folder: Path) -> list[str]:
    """Returns the prepared versions in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [entry.name for entry in folder.iterdir() if _VERSION.fullmatch(entry.name)]
    prepared = [version for version in found if (folder / version / "dataset_info.json").is_file()]
    return sorted(prepared, key=lambda version: [int(part) for part in version.split(".")])


@functools.lru_cache(maxsize=8)
def _builder(folder: Path) -> Any:
    """Returns the read-only builder of a prepared data set.

    Raises:
        RequestError: its files cannot be read, name classes that are not TFDS's own, or are not ArrayRecord.
    """
    import tensorflow_datasets as tfds

    # TFDS imports the modules that features.json names; what comes with data must not choose them.
    for name in _class_names(read_json(folder / "features.json")):
        if not name.startswith(_FEATURES_OF_TFDS):
            raise RequestError(f"{folder / 'features.json'}: names the class {name[:80]!r}; expected only TFDS's own")
    read_json(folder / "dataset_info.json")
    try:
        builder = tfds.builder_from_directory(folder)
        formats = {kind.value for kind in builder.info.available_file_formats()}
    except ModuleNotFoundError as error:
        raise RequestError(
            f"{folder}: its features need TensorFlow ({error}), as tfds.features.Video does: install it, or store a"
            " video as a Sequence of Image"
        ) from None
    except Exception as error:  # TFDS raises many kinds for files that it did not write
        raise RequestError(f"{folder}: cannot be read as a TFDS data set: {type(error).__name__}: {error}") from None
    if "array_record" not in formats:
        raise RequestError(
            f"{folder}: is stored as {', '.join(sorted(formats)) or 'nothing'}; expected array_record, for reading"
            " at random places: tfds build --file_format=array_record, or tfds convert_format"
        )
    return builder


def _class_names(value: Any) -> list[str]:
    """Returns the names under "pythonClassName" anywhere in a JSON value."""
    if isinstance(value, list):
        return [name for item in value for name in _class_names(item)]
    if not isinstance(value, dict):
        return []
    return [
        name
        for key, item in value.items()
        for name in ([str(item)] if key == "pythonClassName" else _class_names(item))
    ]


def _decoders(feature: Any, used: Collection[tuple[str, ...]] | None) -> Any:
    """Returns decoders that leave pictures, and features which no path in `used` begins with, as they are stored."""
    from tensorflow_datasets import features as kinds

    inner = inner_features(feature)
    if inner is not None:
        decoders = {}
        for key, one in inner.items():
            below = None if used is None else [path[1:] for path in used if path[:1] == (key,)]
            wanted = below is None or bool(below)
            decoder = _decoders(one, None if below is None or () in below else below) if wanted else _raw(one)
            decoders |= {} if decoder is None else {key: decoder}
        return decoders
    leaf = feature
    while isinstance(leaf, kinds.Sequence):
        leaf = leaf.feature
    return _raw(feature) if isinstance(leaf, kinds.Image) else None


def _raw(feature: Any) -> Any:
    """Returns decoders that leave a feature and those inside it as they are stored."""
    from visor_jax.data.sources.tfds_decoder import Undecoded

    inner = inner_features(feature)
    return Undecoded() if inner is None else {key: _raw(one) for key, one in inner.items()}


# --- records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TfdsRecords:
    """A `RecordFile` over one split of a prepared data set.

    Attributes:
        path: the split in the data set's folder, for messages.
        examples: random access to the split's examples, pictures encoded.
        features: the data set's features.
        mapped: which of them hold what; None for the layout of our builder.
    """

    path: Path
    examples: Sequence[Any]
    features: Any
    mapped: Mapped | None

    def __len__(self) -> int:
        return len(self.examples)

    def record(self, number: int) -> Any:
        """Returns example `number` as a record.

        Raises:
            SkipSample: "broken_file", "bad_json", "bad_record".
        """
        try:
            example = self.examples[number]
            if self.mapped is None:
                return builder_record({key: plain(example[key], self.features[key]) for key in BUILDER_LAYOUT})
            record = mapped_record(self.mapped, lambda path: _value(example, self.features, path))
            return record if "id" in record else {"id": number, **record}
        except SkipSample:
            raise
        except Exception as error:  # a damaged file can make ArrayRecord and TFDS raise nearly anything
            raise SkipSample("broken_file", f"{type(error).__name__}: {str(error)[:300]}") from None

    outline = record

    def identity(self, number: int) -> Any:
        """Returns the place as the id, so that dividing a split reads no example."""
        return {"id": number}


def _value(example: Any, features: Any, path: tuple[str, ...]) -> Any:
    """Returns the plain value of the feature at a path."""
    from tensorflow_datasets import features as kinds

    feature: Any = features
    in_sequence = False
    for key in path:
        inner = inner_features(feature)
        assert inner is not None  # check_paths
        in_sequence |= isinstance(feature, kinds.Sequence)
        feature, example = inner[key], example[key]
    return plain(example, kinds.Sequence(feature) if in_sequence else feature)


# --- the row of the table ---------------------------------------------------------------------------------------------


def open_tfds(config: Config, split: str) -> StoredSource:
    """Opens a split ("train", "validation", "test", or "all" for a data set with one split).

    Raises:
        RequestError: there is no such data set, it cannot be read, its features do not fit, or the split is empty.
    """
    data = config.data
    folder = prepared_folder(_root(data), data.path)
    builder = _builder(folder)
    stored = _stored(builder, split) or _stored(builder, "train") or next(iter(builder.info.splits), "")
    if not stored:
        raise RequestError(f"{folder}: holds no split")
    features, mapped = builder.info.features, _mapped(data.features, builder)
    used = None if mapped is None else [path for path in mapped.values() if not isinstance(path, Literal)]
    examples = builder.as_data_source(split=stored, decoders=_decoders(features, used))
    records = TfdsRecords(folder / f"{builder.info.name}-{stored}", examples, features, mapped)
    whole = all(_stored(builder, name) for name in SPLITS) or (split != "train" and _stored(builder, split))
    settings = reading(config, split, divided=not whole)
    return StoredSource(builder.info.name, [records], folder, settings)


def _root(data: Any) -> Path:
    """Returns TFDS's data folder: `data.root`, or the one that TFDS uses by default.

    Raises:
        RequestError: it is a bucket.
    """
    name = data.root or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in name:
        raise RequestError(
            f"data.root={name!r}: ArrayRecord reads no bucket; expected a folder, mount it (docs/data.md)"
        )
    return as_path(name)


def _mapped(text: str, builder: Any) -> Mapped | None:
    """Returns the mapping in force, None for the layout of our builder."""
    features, name = builder.info.features, builder.info.name
    if not text and set(features) == BUILDER_LAYOUT:
        return None
    mapped = parse_mapping(text) or default_mapping(features, name)
    check_paths(mapped, features, name)
    return mapped


def _stored(builder: Any, split: str) -> str | None:
    """Returns TFDS's name of a split, None where the data set lacks it."""
    return next((name for name in _ALIASES.get(split, ()) if name in builder.info.splits), None)


def _check(config: Config) -> None:
    if not config.data.path:
        raise RequestError("data.path='': expected TFDS's name of a data set: name, name/config or name/config:1.0.0")
    parse_mapping(config.data.features)


def _check_splits(config: Config, splits: Collection[str]) -> None:
    """Checks that each split has records, and those that are read late a usable one.

    Raises:
        RequestError: a split is empty or has no usable record.
    """
    for split in sorted(splits):
        source = open_tfds(config, split)
        if split != "train":
            require_usable(source, split, range(len(source)))


def _stored_splits(config: Config) -> Sequence[str]:
    builder = _builder(prepared_folder(_root(config.data), config.data.path))
    return SPLITS if any(_stored(builder, split) for split in ("validation", "test")) else [WHOLE]


def _from_file(file: Path) -> dict[str, Any]:
    """Returns fields of `config.data` that evaluate on all of a prepared data set, named by its dataset_info.json.

    Raises:
        RequestError: it is another file, or lies in another folder than TFDS prepares.
    """
    expected = RequestError(f"--data={file}: expected dataset_info.json of a data set that TFDS prepared")
    info = read_json(file) if file.name == "dataset_info.json" else None
    if not isinstance(info, dict):
        raise expected
    name = f"{info.get('name')}/{info['configName']}" if info.get("configName") else f"{info.get('name')}"
    root = Path(os.path.abspath(file)).parents[2 + name.count("/")]
    path = f"{name}:{info.get('version')}"
    if prepared_folder(root, path) != Path(os.path.abspath(file)).parent:
        raise expected
    return {"root": str(root), "path": path, "test_fraction": 0.0}


SOURCE = SourceKind(
    open=open_tfds,
    check=_check,
    check_splits=_check_splits,
    stored_splits=_stored_splits,
    from_file=_from_file,
)
