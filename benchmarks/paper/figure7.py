"""Figure 7: how often the policy picks each budget."""

from .base import Column, Entry, Row
from .runs import Evaluated, Places
from .small import Claimed

PLACES: Places = {
    level: {
        "empty": ("visor", "auto", f"share/{level}/empty"),
        "full": ("visor", "auto", f"share/{level}/full"),
        "slots": ("visor", "auto", f"slots/{level}"),
    }
    for level in ("easy", "hard")
}

ENTRY = Entry(
    name="figure7",
    title="Figure 7: the policy's routes",
    columns=(
        Column("empty", "no slot, % of the questions", digits=0),
        Column("full", "all slots, % of the questions", digits=0),
        Column("slots", "slots on, %", digits=0),
    ),
    rows=(Row("easy", "easy"), Row("hard", "hard")),
    paper=Evaluated(PLACES),
    small=Claimed(PLACES),
    about=(
        "The paper's numbers are not known here. `visor analyze --workdir=$RUNS/visor --only=routes` draws the shares"
        " of all budgets by task. The levels are means over tasks; on the embedded data set hard tasks count whole."
    ),
)
