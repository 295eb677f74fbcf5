"""Figure 3: how much the layers change the visual tokens, by CKA."""

from .analyses import Analyzed, AnalyzedBase, over_layers
from .base import Column, Entry, Row

SUMMARY = over_layers(first=("cka_first", min), before=("cka_before", min))

ENTRY = Entry(
    name="figure3",
    title="Figure 3: how much layers change visual tokens (CKA)",
    columns=(
        Column("first", "lowest CKA with V(0)", digits=2),
        Column("before", "lowest CKA with the layer before", digits=2),
    ),
    rows=(Row("easy", "easy", {"first": 0.9}), Row("hard", "hard", {"first": 0.6})),
    paper=Analyzed("cka", SUMMARY),
    small=AnalyzedBase("figure3", "cka", SUMMARY),
    about=(
        "The paper: above 0.9 on easy tasks, down to 0.6 on hard ones; that this is the CKA with V(0) is our reading."
        " On the embedded data set easy and hard questions are asked about the same kinds of page, so the levels hardly"
        " differ (docs/analyze.md)."
    ),
)
