"""Figure 6: accuracy under every budget."""

from .base import ACCURACY, Entry, Row
from .runs import Evaluated, Places
from .small import Claimed

PLACES: Places = {
    budget: {level: ("visor", budget, level) for level in ("easy", "hard")} for budget in ("empty", "full", "auto")
}

ENTRY = Entry(
    name="figure6",
    title="Figure 6: accuracy under every budget",
    columns=ACCURACY,
    rows=(Row("empty", "no slot"), Row("full", "all slots"), Row("auto", "policy")),
    paper=Evaluated(PLACES),
    small=Claimed({**PLACES, "0b10": {level: ("visor", "0b10", level) for level in ("easy", "hard")}}),
    about=(
        "The paper's figure is a map of tasks and budgets; its numbers are not known here. `visor analyze"
        " --workdir=$RUNS/visor --only=budgets` draws the map with all viable budgets (docs/analyze.md)."
    ),
    small_rows=(Row("empty", "no slot"), Row("0b10", "slot 0"), Row("full", "all slots"), Row("auto", "policy")),
)
