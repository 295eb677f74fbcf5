"""Table 2: VISOR together with token reduction (VISOR-TR)."""

from .base import ACCURACY, SAVING, Entry, Row
from .runs import Evaluated, Places, places
from .savings import TWO_SLOTS, savings
from .small import Claimed

RUNS = ("visor", "visor_packed_2", "visor_packed_4", "visor_visionzip", "visor_vispruner")
PLACES: Places = {run: places(run, "auto") for run in RUNS}
SMALL: Places = {
    "visor": places("visor", "auto"),
    "visor_packed_2": places("visor_packed_2", "full"),
    "visor_packed_4": places("visor_packed_4", "full"),
    "visor_vispruner": places("visor_vispruner_4", "full"),
}

ENTRY = Entry(
    name="table2",
    title="Table 2: together with token reduction (VISOR-TR)",
    columns=(*ACCURACY, SAVING),
    rows=(
        Row("visor", "VISOR", {"easy": 63.6, "hard": 58.4, "saving": "8.6-8.9x"}),
        Row("visor_packed_2", "VISOR-TR, packed by 2", {"easy": 63.3, "hard": 57.8, "saving": 17.8}),
        Row("visor_packed_4", "VISOR-TR, packed by 4", {"easy": 63.1, "hard": 56.2, "saving": 35.0}),
        Row("visor_visionzip", "VISOR with VisionZip", {"easy": 63.3, "hard": 55.3, "saving": 37.0}),
        Row("visor_vispruner", "VISOR with VisPruner", {"easy": 63.5, "hard": 55.9, "saving": 39.0}),
    ),
    paper=Evaluated(PLACES),
    small=Claimed(SMALL),
    formula=savings({run: (run, TWO_SLOTS) for run in RUNS}),
    about=(
        "Savings of ours are with two slots on. Packing keeps a newline for each row of the packed map; on a map of"
        " the paper's 7,290 tokens without newlines they are 18.4x and 35.0x (docs/reduction.md). The shares that"
        " VisionZip and VisPruner keep (0.234, 0.22) are chosen for the paper's savings on those 7,290 tokens, because"
        " the paper's shares are not known here. Whether the paper trained these combinations is not known here; these"
        " commands do."
    ),
    stands_for={
        "visor": "VISOR, auto",
        "visor_packed_2": "VISOR, packed by 2, all slots",
        "visor_packed_4": "VISOR, packed by 4, all slots",
        "visor_vispruner": "VISOR, a fourth by VisPruner, all slots",
    },
)
