"""Table 8: a router that has not seen some data sets."""

from claims_table import WITHOUT_TASKS

from .base import Column, Entry, Row
from .runs import Evaluated, Places
from .small import Claimed

UNSEEN = {"ai2d": "AI2D", "docvqa": "DocVQA", "gqa": "GQA"}


def places(tasks: tuple[str, ...]) -> Places:
    """Returns the places of all rows."""
    runs = {"seen": "visor", "unseen": "router"}
    return {task: {column: (run, "auto", f"task={task}") for column, run in runs.items()} for task in tasks}


ENTRY = Entry(
    name="table8",
    title="Table 8: a router that has not seen some data sets",
    columns=(Column("seen", "router that has seen it, %"), Column("unseen", "router that has not, %")),
    rows=tuple(Row(name, title) for name, title in UNSEEN.items()),
    paper=Evaluated(places(tuple(UNSEEN)), benchmarks=tuple(UNSEEN)),
    small=Claimed(places(WITHOUT_TASKS)),
    about=(
        "The paper's router, trained without labels of these three, still serves them; its numbers are not known here."
        " `label.without` takes the names that the records have as `data_source`, where LLaVA-OneVision's mixture"
        " splits a data set into several. Model and search are those of `visor`; labels and policy are made anew."
    ),
    small_rows=tuple(Row(task, task) for task in WITHOUT_TASKS),
)
