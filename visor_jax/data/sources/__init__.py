"""The table of data sources: `data.source` names a row. Adding a source is one file and one line here.

In: a configuration. Out: the `SourceKind` that its `data.source` names.
"""

from __future__ import annotations

import importlib
import os

from visor_jax.config import Config
from visor_jax.config.mixture import is_mixture
from visor_jax.data.source_kind import SourceKind
from visor_jax.errors import RequestError, nearest

# name -> the module that defines its `SOURCE`; imported on first use
SOURCES: dict[str, str] = {
    "almanac": "visor_jax.data.almanac.kind",
    "llava": "visor_jax.data.sources.llava",
    "parquet": "visor_jax.data.sources.parquet",
    "messages": "visor_jax.data.sources.messages",
    "array_record": "visor_jax.data.sources.array_record",
    "tfds": "visor_jax.data.sources.tfds",
}

# ending of a file's name -> the source that reads it, where nothing else names one
SUFFIXES: dict[str, str] = {
    ".json": "llava",
    ".jsonl": "llava",
    ".ndjson": "llava",
    ".parquet": "parquet",
    ".array_record": "array_record",
}


def source_of_file(path: str | os.PathLike[str]) -> str | None:
    """Returns the source that reads a file, by the ending of its name; None if the ending is unknown."""
    return SUFFIXES.get(os.path.splitext(os.fspath(path))[1].lower())


def named_kind(name: str) -> SourceKind:
    """Returns the source kind of one row of the table."""
    return importlib.import_module(SOURCES[name]).SOURCE


def source_kind(config: Config) -> SourceKind:
    """Returns the source kind that `config.data.source` names, or that of mixtures.

    Raises:
      RequestError: the table has no source of this name.
    """
    if is_mixture(vars(config.data)):
        return importlib.import_module("visor_jax.data.mixture").kind_of(config)
    name = config.data.source
    if name not in SOURCES:
        hint = nearest(name, SOURCES)
        raise RequestError(
            f"data.source={name!r}: expected one of {', '.join(map(repr, SOURCES))}" + (f"; {hint}" if hint else "")
        )
    return named_kind(name)


def source_label(config: Config) -> str:
    """Returns the configured source's name for results: that of the table, or "mixture"."""
    return "mixture" if is_mixture(vars(config.data)) else config.data.source


def check_source(config: Config) -> None:
    """Checks `config.data` against the source that it names.

    Raises:
      RequestError: the source is unknown, or its fields do not fit.
    """
    source_kind(config).check(config)
