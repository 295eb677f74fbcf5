"""The table of entries: `--entry` names a row. Adding one is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence

from visor_jax.errors import RequestError, nearest

from . import (
    figure1,
    figure2,
    figure3,
    figure4,
    figure6,
    figure7,
    figure10,
    supplement,
    table1,
    table2,
    table3,
    table4,
    table5,
    table8,
)
from .base import Entry

ENTRIES: tuple[Entry, ...] = (
    table1.ENTRY,
    table2.ENTRY,
    table3.ENTRY,
    table4.ENTRY,
    table5.ENTRY,
    table8.ENTRY,
    supplement.ENTRY,
    figure1.ENTRY,
    figure2.ENTRY,
    figure3.ENTRY,
    figure4.ENTRY,
    figure6.ENTRY,
    figure7.ENTRY,
    figure10.ENTRY,
)


def chosen(names: Sequence[str]) -> list[Entry]:
    """Returns the entries with these names, in the order of the table; all for no name.

    Raises:
      RequestError: a name is unknown.
    """
    known = [entry.name for entry in ENTRIES]
    for name in names:
        if name not in known:
            raise RequestError(f"--entry={name}: {nearest(name, known) or 'expected one of ' + ', '.join(known)}")
    return [entry for entry in ENTRIES if not names or entry.name in names]
