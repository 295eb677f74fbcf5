"""Figure 1: accuracy against decoder FLOPs."""

from . import table1, table2
from .base import Entry
from .runs import Evaluated
from .small import Claimed

_FIRST = {row.key for row in table1.ENTRY.rows}
_SOURCES = (table1.ENTRY, table2.ENTRY)
_ROWS = (*table1.ENTRY.rows, *(row for row in table2.ENTRY.rows if row.key not in _FIRST))


def formula() -> dict[str, dict[str, float]]:
    """Returns the savings of both tables."""
    return {row: dict(cells) for entry in _SOURCES if entry.formula for row, cells in entry.formula().items()}


ENTRY = Entry(
    name="figure1",
    title="Figure 1: accuracy against decoder FLOPs",
    columns=table1.ENTRY.columns,
    rows=_ROWS,
    paper=Evaluated({**table2.PLACES, **table1.PLACES}),
    small=Claimed({**table2.SMALL, **table1.SMALL}),
    formula=formula,
    about=(
        "The points are those of tables 1 and 2; which of them the paper draws is not known here. `visor analyze"
        " --workdir=$RUNS/visor --only=costs` draws the budgets, policy and dial of one run ([analyze.md](analyze.md)),"
        " and [claims.png](claims.png) the variants of [claims.md](claims.md) with as many visual tokens, or fewer."
    ),
    stands_for={**table2.ENTRY.stands_for, **table1.ENTRY.stands_for},
)
