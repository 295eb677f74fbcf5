"""The table of data sources: `data.source` names a row. Adding a source is one file and one line here.

In: a configuration. Out: the `SourceKind` that its `data.source` names.
"""

from __future__ import annotations

import importlib

from visor_jax.config import Config
from visor_jax.data.source_kind import SourceKind
from visor_jax.errors import RequestError, nearest

# name -> the module whose `SOURCE` describes it; imported when first asked for
SOURCES: dict[str, str] = {
    "glyphs": "visor_jax.data.glyphs.kind",
    "llava": "visor_jax.data.sources.llava",
}


def named_kind(name: str) -> SourceKind:
    """The source of one row of the table."""
    return importlib.import_module(SOURCES[name]).SOURCE


def source_kind(config: Config) -> SourceKind:
    """The source that `config.data.source` names.

    Raises:
      RequestError: there is none of this name.
    """
    name = config.data.source
    if name not in SOURCES:
        hint = nearest(name, SOURCES)
        raise RequestError(
            f"data.source={name!r}: expected one of {', '.join(map(repr, SOURCES))}" + (f"; {hint}" if hint else "")
        )
    return named_kind(name)


def check_source(config: Config) -> None:
    """Check `config.data` against the source that it names.

    Raises:
      RequestError: there is no such source, its fields do not fit, or a stage cannot learn from it.
    """
    kind = source_kind(config)
    kind.check(config)
    if "base" in {config.stage, *config.stages} and not kind.has_patch_labels:
        where = "stage" if config.stage == "base" else "stages"
        able = " or ".join(repr(name) for name in SOURCES if named_kind(name).has_patch_labels)
        raise RequestError(
            f"data.source={config.data.source!r}: the stage 'base' in {where} learns from generated data;"
            f" expected data.source={able}, or no 'base'"
        )
