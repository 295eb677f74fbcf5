"""Figure 2: how much the layers attend to visual tokens."""

import numpy as np

from .analyses import Analyzed, AnalyzedBase, over_layers
from .base import Column, Entry, Row

SUMMARY = over_layers(
    lowest=("attention_share", min), mean=("attention_share", np.mean), highest=("attention_share", max)
)

ENTRY = Entry(
    name="figure2",
    title="Figure 2: attention to visual tokens, layer by layer",
    columns=tuple(Column(key, f"{key} of the layers", digits=2) for key in ("lowest", "mean", "highest")),
    rows=(Row("easy", "easy"), Row("hard", "hard")),
    paper=Analyzed("attention_share", SUMMARY),
    small=AnalyzedBase("figure2", "attention_share", SUMMARY),
    about=(
        "The share of attention that the tokens which predict the answer give to visual tokens, mean over heads and"
        " tasks. The paper finds it uneven over the layers; its numbers are not known here. The command writes the"
        " curve of every task (docs/analyze.md); the table has its extremes."
    ),
)
