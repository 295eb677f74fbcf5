"""Table 5: every benchmark by itself."""

from visor_jax.config import load_config
from visor_jax.data.source_kind import LEVELS
from visor_jax.data.sources import source_kind

from .base import Column, Entry, Row
from .runs import ASKED, EASY, Evaluated, Place
from .small import Claimed

NAMES = {
    "realworldqa": "RealWorldQA", "scienceqa": "ScienceQA", "gqa": "GQA", "mme": "MME", "mmstar": "MMStar",
    "pope": "POPE", "docvqa": "DocVQA", "infovqa": "InfoVQA", "chartqa": "ChartQA", "textvqa": "TextVQA",
    "ocrbench": "OCRBench", "ai2d": "AI2D",
}  # fmt: skip
ACCURACIES = (Column("dense", "dense, %"), Column("visor", "VISOR, %"))
PAPER = {"realworldqa": {"dense": 54.0, "visor": 54.6, "saving": 8.4}}


def places(task: str) -> dict[str, Place]:
    """Returns the places of a row's accuracies."""
    return {"dense": ("dense", "full", f"task={task}"), "visor": ("visor", "auto", f"task={task}")}


def small_tasks() -> dict[str, str]:
    """Returns the tasks of the embedded data set's pages with their levels, easy ones first."""
    config = load_config("almanac_mini")
    kind = source_kind(config)
    tasks = kind.levels if kind.tasks is None else kind.tasks(config)
    return {task: level for level in LEVELS for task in sorted(tasks) if kind.levels[task] == level}


ENTRY = Entry(
    name="table5",
    title="Table 5: every benchmark",
    columns=(*ACCURACIES, Column("saving", "saving", suffix="x")),
    rows=tuple(
        Row(
            task,
            NAMES[task] + ("" if task == "ai2d" else " (easy)" if task in EASY else " (hard)"),
            PAPER.get(task, {}),
        )
        for task in ASKED
    ),
    paper=Evaluated({task: {**places(task), "saving": ("visor", "auto", f"saving/{task}")} for task in ASKED}),
    small=Claimed({task: places(task) for task in small_tasks()}),
    about=(
        "The headline number of each benchmark (docs/benchmarks.md), MME's perception score over 2000. Of the paper's"
        " numbers of this table only one row is known here, and that AI2D is among its data sets, not at which level."
        " VISOR answers with its policy's budgets. Results on the embedded data set keep the costs of all tasks"
        " together and not those of each, whose questions differ in length; so its table has no saving, and table 1"
        " has that of all tasks."
    ),
    small_rows=tuple(Row(task, f"{task} ({level})") for task, level in small_tasks().items()),
    small_columns=ACCURACIES,
)
