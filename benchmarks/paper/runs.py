"""The runs at the paper's scale: their commands, and the numbers that their evaluations hold.

In: the table `RUNS`. Out: shell commands with the variables of `VARIABLES`, and from the workdirs that these commands
fill the accuracy by level or benchmark, the saving, and the routes. The benchmarks are those whose level the paper
names (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visor_jax.evaluate.benchmarks import named_benchmark
from visor_jax.files.read_write import read_json

from .base import Cells

EASY = ("realworldqa", "scienceqa", "gqa", "mme", "mmstar", "pope")
HARD = ("docvqa", "infovqa", "chartqa", "textvqa", "ocrbench")
BENCHMARKS = (*EASY, *HARD)
ASKED = (*BENCHMARKS, "ai2d")  # of the paper too, but at a level that is not known here: in no average
LEVELS = {"easy": EASY, "hard": HARD}
HUB_MODEL = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
DENSE_STEPS = 17_204  # 3.2 M samples, as the stage "full" of configs/llava_ov_0p5b.py

# What a user sets in the shell. The data of both stages are one file here; `data.mixture` takes the paper's two sets.
VARIABLES = {
    "HF_DIR": "the checkpoint's folder",
    "HF_1P5B": "the folder of a 1.5B checkpoint",
    "DATA": "the folder of train.json and its pictures",
    "HUB": "the folder of the benchmarks (docs/benchmarks.md)",
    "RUNS": "the folder of the runs",
}


@dataclass(frozen=True)
class Base:
    """A base model: its configuration, shell variables, and the run whose dense costs savings refer to.

    As many key and value heads in cross-attention as query heads (`heads`) give the paper's added parameters and FLOPs.
    """

    config: str
    folder: str
    variable: str
    reference: str
    heads: int

    @property
    def settings(self) -> str:
        """The line that sets the variable of the arguments of every run."""
        data = "--config.data.root=$DATA --config.data.path=train.json"
        file = f"--config=configs/{self.config}.py:${self.folder}/tokenizer.json"
        return f'{self.variable}="{file} {data} --config.model.cross.num_kv_heads={self.heads}"'


BASES = {
    "0.5B": Base("llava_ov_0p5b", "HF_DIR", "C", "visor", 14),
    "1.5B": Base("llava_ov_1p5b", "HF_1P5B", "C_1P5B", "visor_1p5b", 12),
}
DOWNLOAD = f"hf download {HUB_MODEL} --local-dir=$HF_DIR"


def asked(benchmarks: Sequence[str] = ASKED) -> str:
    """Returns the line that sets $B, the arguments of the questions."""
    return f'B="--benchmark={",".join(benchmarks)} --data=$HUB"'


# (run, budget, what): LEVEL or "task=NAME" (accuracy), "saving", "saving/NAME", "share/LEVEL/BUDGET" or "slots/LEVEL"
Place = tuple[str, str, str]
Places = Mapping[str, Mapping[str, Place]]  # row -> column -> place


def places(run: str, budget: str) -> dict[str, Place]:
    """Returns the places of a row with the columns easy, hard and saving."""
    return {what: (run, budget, what) for what in ("easy", "hard", "saving")}


@dataclass(frozen=True)
class PaperRun:
    """A run at the paper's scale.

    Attributes:
      fields: changes of the configuration, "model.plan=dense".
      trains: False: the imported model is evaluated as it is.
      base: the model that it starts from.
      after: (run, stages): continues with these finished stages of another run instead of importing.
    """

    fields: tuple[str, ...] = ()
    trains: bool = True
    base: Base = BASES["0.5B"]
    after: tuple[str, tuple[str, ...]] | None = None


def dense(*fields: str, base: Base = BASES["0.5B"]) -> PaperRun:
    """Returns the run of an imported dense model that is not trained."""
    return PaperRun(("model.plan=dense", "stages=dense", *fields), trains=False, base=base)


def reduced(method: str, ratio: float) -> tuple[str, ...]:
    """Returns the fields of a token reduction."""
    return f"model.reduction.method={method}", f"model.reduction.ratio={ratio}"


def alone(budget: str) -> PaperRun:
    """Returns a run that trains the last stage at one budget only."""
    fields = ("stages=universal", f"stage_overrides.universal.budgets={budget}")
    return PaperRun(fields, after=("visor", ("full", "search")))


# Shares of VisionZip and HiRED alone give the paper's saving. With VISOR they give its 37x and 39x (docs/reduction.md).
RUNS: dict[str, PaperRun] = {
    "visor": PaperRun(),
    "visor_1p5b": PaperRun(base=BASES["1.5B"]),
    "dense_1p5b": dense(base=BASES["1.5B"]),
    "dense": dense(),
    "visionzip": dense(*reduced("visionzip", 0.225)),
    "hired": dense(*reduced("hired", 0.2435)),
    "m3": PaperRun(
        ("model.plan=dense", "stages=dense", f"stage_overrides.dense.steps={DENSE_STEPS}", *reduced("m3", 0.25),
         "model.reduction.scales=1,0.25,0.11,0.0625")
    ),
    "pyramiddrop": dense("model.dropping.method=pyramiddrop", "model.dropping.layers=6,12,18",
                         "model.dropping.ratios=0.5,0.25,0.125"),
    "sparsevlm": dense("model.dropping.method=sparsevlm", "model.dropping.layers=3,6,12",
                       "model.dropping.ratios=0.5208,0.3472,0.191"),
    "visor_packed_2": PaperRun(("model.anyres.packing=2", "data.visual_length=11008")),
    "visor_packed_4": PaperRun(("model.anyres.packing=4", "data.visual_length=5504")),
    "visor_visionzip": PaperRun((*reduced("visionzip", 0.234), "data.visual_length=5184")),
    "visor_vispruner": PaperRun((*reduced("vispruner", 0.22), "data.visual_length=4864")),
    "slots_0_cross_6": PaperRun(
        ("model.pattern=text,cross,text,self", "stages=warmup,full",
         "stage_overrides.warmup.budgets=empty", "stage_overrides.full.budgets=empty")
    ),
    "slots_2_cross_8": PaperRun(
        ("model.pattern=" + ",".join(("text", "cross", "text") * 3 + ("text", "cross", "self")),
         "stages=warmup,full,search,universal")
    ),
    "alone_0": alone("empty"),
    "alone_8": alone("full"),
    "router": PaperRun(("stages=label,policy", "label.without=ai2d,docvqa,gqa"),
                       after=("visor", ("full", "search", "universal"))),
}  # fmt: skip


def run_commands(name: str) -> list[str]:
    """Returns the commands of a run: import or copy, train, evaluate. $B are the questions."""
    run, workdir = RUNS[name], f"$RUNS/{name}"
    fields = "".join(f" --config.{setting}" for setting in run.fields)
    lines = []
    if run.after:
        source, stages = run.after
        lines += [f"mkdir -p {workdir}", "cp -r " + " ".join(f"$RUNS/{source}/{s}" for s in stages) + f" {workdir}"]
    else:
        lines += [f"visor import --from=${run.base.folder} --workdir={workdir} ${run.base.variable}{fields}"]
    if run.trains:
        lines += [f"visor run --workdir={workdir} ${run.base.variable}{fields}"]
    return [*lines, f"visor evaluate --workdir={workdir} $B"]


def needed(names: Sequence[str]) -> list[str]:
    """Returns runs with those that they continue, each once and in order."""
    ordered: dict[str, None] = {}
    for name in names:
        if after := RUNS[name].after:
            ordered[after[0]] = None
        ordered[name] = None
    return list(ordered)


@dataclass(frozen=True)
class Evaluated:
    """Numbers of runs that were evaluated on the public benchmarks.

    Attributes:
      places: of every number.
      benchmarks: that are asked.
    """

    places: Places
    benchmarks: tuple[str, ...] = ASKED

    def commands(self) -> list[str]:
        """Returns the commands of all runs that the numbers need."""
        names = [place[0] for place in self._places()]
        # The run that a saving refers to has the costs of the dense model on all tokens.
        references = [RUNS[name].base.reference for name, _, what in self._places() if what.startswith("saving")]
        ordered = needed([*references, *names])
        settings = [base.settings for base in BASES.values() if any(RUNS[name].base == base for name in ordered)]
        runs = [line for name in ordered for line in run_commands(name)]
        return [DOWNLOAD, *settings, asked(self.benchmarks), *runs]

    def files(self) -> list[str]:
        """Returns the evaluations that the numbers are read from."""
        read: dict[str, set[str]] = {}  # run -> benchmarks
        for name, _, what in self._places():
            references = [RUNS[name].base.reference] if what.startswith("saving") else []
            for run in (name, *references):
                read.setdefault(run, set()).update(tasks_of(what))
        return [f"{run}/{result_file(name)}" for run in RUNS for name in ASKED if name in read.get(run, ())]

    def _places(self) -> list[Place]:
        return [place for row in self.places.values() for place in row.values()]

    def read(self, runs: Path) -> Cells:
        """Returns the numbers of the evaluations below a folder; what is not evaluated is missing."""
        results = {run: evaluation(runs / run, self.benchmarks) for run in RUNS}
        return filled(self.places, lambda place: number(results, place))


def filled(places: Places, number_at: Callable[[Place], float | None]) -> Cells:
    """Returns the numbers at the places of a table, without those that are None."""
    cells: dict[str, dict[str, float]] = {}
    for row, columns in places.items():
        for column, place in columns.items():
            if (value := number_at(place)) is not None:
                cells.setdefault(row, {})[column] = value
    return cells


def result_file(benchmark: str) -> str:
    """Returns the file below a workdir that has the result of a public benchmark."""
    return f"eval/of_{benchmark}/{named_benchmark(benchmark).split}.json"


def evaluation(workdir: Path, benchmarks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the results of the benchmarks that a run was evaluated on, by name."""
    results = {}
    for name in benchmarks:
        path = workdir / result_file(name)
        if path.exists():
            results[name] = read_json(path)
    return results


def number(results: Mapping[str, Mapping[str, dict[str, Any]]], place: Place) -> float | None:
    """Returns a number at its place: accuracies and shares in percent; None if a benchmark that it needs is missing."""
    name, budget, what = place
    kind, other, asked = what.partition("/")[0], what.rpartition("/")[2], tasks_of(what)
    of_run = results[name]
    if any(task not in of_run or budget not in of_run[task]["budgets"] for task in asked):
        return None
    if kind == "saving":
        whole = [results[RUNS[name].base.reference].get(task, {}).get("dense") for task in asked]
        if any(row is None for row in whole):
            return None
        dense = sum(row["decoder_gflops"] for row in whole if row is not None)
        return dense / sum(of_run[task]["budgets"][budget]["decoder_gflops"] for task in asked)
    if kind in ("share", "slots"):
        return shares_number([of_run[task]["routes"][task] for task in asked], kind, other)
    return 100 * float(np.mean([of_run[task]["budgets"][budget]["tasks"][task] for task in asked]))


def tasks_of(what: str) -> tuple[str, ...]:
    """Returns the benchmarks that a number is the mean of: all, those of a level, or one."""
    kind, _, group = what.partition("/")
    name = group.partition("/")[0] or kind.removeprefix("task=")
    return BENCHMARKS if name == "saving" else LEVELS.get(name, (name,))


def shares_number(shares: Sequence[Mapping[str, float]], kind: str, budget: str) -> float:
    """Returns the mean over tasks of a budget's share in percent, or ("slots") of the share of slots that are on."""
    if kind == "share":
        return 100 * float(np.mean([row.get(budget, 0.0) for row in shares]))
    return 100 * float(np.mean([sum(share * slots_on(name) for name, share in row.items()) for row in shares]))


def slots_on(budget: str) -> float:
    """Returns the share of slots that a budget has on."""
    return {"empty": 0.0, "full": 1.0}.get(budget, budget.count("1") / max(len(budget) - 2, 1))
