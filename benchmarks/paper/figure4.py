"""Figure 4: which benchmarks lose if layers do not see the picture."""

from .analyses import Analyzed, AnalyzedBase, clusters
from .base import Column, Entry, Row

ENTRY = Entry(
    name="figure4",
    title="Figure 4: vision dropped from layers, and the two clusters",
    columns=(Column("tasks", "tasks", digits=0), Column("robust", "of these robust, %", digits=0)),
    rows=(Row("easy", "easy", {"robust": 100}), Row("hard", "hard", {"robust": 0})),
    paper=Analyzed("vision_drop", clusters),
    small=AnalyzedBase("figure4", "vision_drop", clusters),
    about=(
        "Tasks form two clusters by how much they lose if layers do not see the picture. The paper names its levels by"
        " these clusters: RealWorldQA, ScienceQA, GQA, MME, MMStar, POPE and others are robust, DocVQA, ChartQA,"
        " InfoVQA, OCRBench, TextVQA and others are not. So its two numbers hold by definition; ours test whether the"
        " same benchmarks come out. The embedded data set's levels were named before."
    ),
)
