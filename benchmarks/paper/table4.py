"""Table 4: one universal network against networks that are trained for one budget each."""

from collections.abc import Mapping

from .base import Column, Entry, Row
from .runs import Evaluated, Places
from .small import Claimed


def places(budgets: Mapping[str, tuple[str, str]]) -> Places:
    """Returns the places of all rows: row -> (budget, run that is trained for it alone)."""
    return {
        row: {
            **{f"alone_{level}": (alone, budget, level) for level in ("easy", "hard")},
            **{f"universal_{level}": ("visor", budget, level) for level in ("easy", "hard")},
        }
        for row, (budget, alone) in budgets.items()
    }


ENTRY = Entry(
    name="table4",
    title="Table 4: one universal network against one network per budget",
    columns=(
        Column("alone_easy", "trained alone, easy, %"),
        Column("universal_easy", "universal, easy, %"),
        Column("alone_hard", "trained alone, hard, %"),
        Column("universal_hard", "universal, hard, %"),
    ),
    rows=(Row("empty", "no slot"), Row("full", "all slots")),
    paper=Evaluated(places({"empty": ("empty", "alone_0"), "full": ("full", "alone_8")})),
    small=Claimed(
        places(
            {
                "empty": ("empty", "alone_empty"),
                "0b10": ("0b10", "alone_0b10"),
                "0b01": ("0b01", "alone_0b01"),
                "full": ("full", "alone_full"),
            }
        )
    ),
    about=(
        "The paper finds the universal network as good as the others or better; its numbers and its budgets are not"
        " known here. Which slots a budget between these two has, the search decides:"
        " `--config.stage_overrides.universal.budgets=0b...` with bits of `$RUNS/visor/search/viable.json` trains it"
        " alone. All start from the same stage `full`."
    ),
    small_rows=(Row("empty", "no slot"), Row("0b10", "slot 0"), Row("0b01", "slot 1"), Row("full", "all slots")),
)
