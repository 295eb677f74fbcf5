"""Runs the default job (`visor run`) for several seeds and tabulates their figures.

    python benchmarks/glyphs_seeds.py --seeds 1 2 3 4 5 --runs runs/seeds [--jobs 2]

In: the configuration `configs/glyphs_mini.py`. Out: `benchmarks/results/glyphs_seeds.json` (every seed's
`eval/test.json` and its figures) and the table `docs/glyphs_seeds.md`, with the number of seeds that met each target. A
seed that is complete under `--runs` is not run again; the table has every seed of `--seeds`. With `--jobs 2` two seeds
run at the same time, each on half of the cores, which takes about two thirds of the time of running them in sequence.
`--out` sets the folder that contains `benchmarks/results` and `docs`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import harness

from visor_jax.files.read_write import write_text

ROOT = Path(__file__).resolve().parent.parent

LADDER = ("follow2", "follow3")  # the tasks that must gain from a second slot


def run_seed(seed: int, runs: Path, cores: set[int]) -> dict[str, Any]:
    """Runs the job of one seed on the given cores, unless it is complete; returns its evaluation."""
    workdir = runs / str(seed)
    if not (workdir / "export" / "parity.json").exists():
        command = [sys.executable, "-m", "visor_jax", "run", "--config=configs/glyphs_mini.py", f"--workdir={workdir}"]
        with (runs / f"{seed}.log").open("w") as log:
            subprocess.run(
                [*command, f"--config.seed={seed}"],
                cwd=ROOT,
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
    evaluation = json.loads((workdir / "eval" / "test.json").read_text())
    evaluation.pop("examples", None)
    return {"seed": seed, "evaluation": evaluation}


def run_seeds(seeds: Sequence[int], runs: Path, jobs: int) -> list[dict[str, Any]]:
    """Returns the result of every seed; runs `jobs` seeds at a time, each on its share of the cores."""
    runs.mkdir(parents=True, exist_ok=True)
    cores, shares = sorted(os.sched_getaffinity(0)), Queue()
    for job in range(jobs):
        shares.put(set(cores[job::jobs]))

    def run(seed: int) -> dict[str, Any]:
        share = shares.get()
        try:
            return run_seed(seed, runs, share)
        finally:
            shares.put(share)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, seeds))


def ladder_gain(budgets: dict[str, Any], task: str) -> float:
    """Returns the points that the best budget of two slots gains over the best budget of one slot on one task."""

    def best(count: int) -> float:
        return max(row["tasks"][task] for name, row in budgets.items() if name.count("1") == count and name != "auto")

    return 100 * (best(2) - best(1))


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Returns the figures that have targets, in percent and points."""
    evaluation = result["evaluation"]
    budgets, levels, routes = evaluation["budgets"], evaluation["levels"], evaluation["routes"]
    fixed = {name: row for name, row in budgets.items() if name != "auto"}
    easy = [task for task, level in levels.items() if level == "easy"]
    hard = [task for task, level in levels.items() if level == "hard"]
    auto, full = budgets["auto"], budgets["full"]
    spent = [point["decoder_gflops"] / full["decoder_gflops"] for point in evaluation["dial"]]  # from low to high
    return {
        "easy, worst budget": 100 * min(row["easy"] for row in fixed.values()),
        "worst easy task, worst budget": 100 * min(row["tasks"][task] for row in fixed.values() for task in easy),
        "hard, empty": 100 * budgets["empty"]["hard"],
        "easiest hard task, empty": 100 * max(budgets["empty"]["tasks"][task] for task in hard),
        "hard, full": 100 * full["hard"],
        "worst hard task, full": 100 * min(full["tasks"][task] for task in hard),
        "auto minus full, easy": 100 * (auto["easy"] - full["easy"]),
        "auto minus full, hard": 100 * (auto["hard"] - full["hard"]),
        "auto's share of full's decoder FLOPs": 100 * auto["decoder_gflops"] / full["decoder_gflops"],
        "least rise of that share from one dial to the next": 100 * min(b - a for a, b in itertools.pairwise(spent)),
        "easy routed to empty": 100 * statistics.mean(routes[task].get("empty", 0.0) for task in easy),
        **{f"{task}, two slots over one": ladder_gain(fixed, task) for task in LADDER},
    }


TARGETS = {
    "easy, worst budget": lambda x: x >= 98,
    "hard, empty": lambda x: x <= 65,
    "easiest hard task, empty": lambda x: x <= 65,
    "hard, full": lambda x: x >= 97,
    "auto minus full, easy": lambda x: x >= -1,
    "auto minus full, hard": lambda x: x >= -1,
    "auto's share of full's decoder FLOPs": lambda x: x <= 60,
    "least rise of that share from one dial to the next": lambda x: x >= 0,
    "easy routed to empty": lambda x: x >= 95,
    "follow3, two slots over one": lambda x: x >= 3,
}


def table(rows: list[dict[str, float]], seeds: list[int]) -> str:
    """Returns the Markdown page: one row per figure, one column per seed."""
    lines = [
        "# The effect, seed by seed",
        "",
        "Made by `python benchmarks/glyphs_seeds.py --seeds " + " ".join(map(str, seeds)) + "`; percent and points,",
        "test split, 1,024 questions with eight cards a picture. Targets: easy questions 98 or more at every budget,",
        "hard ones at most 65 empty and 97 full, auto within a point of full at 60 % of its FLOPs or less, and never",
        "fewer FLOPs as the dial rises from -4 to 4, 95 % of the easy questions sent to the empty budget, 3 points or",
        "more from a second slot on chains of three arrows.",
        "",
        "| figure | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | spread | target met by |",
        "| --- |" + " ---: |" * (len(seeds) + 3),
    ]
    for name in rows[0]:
        values = [row[name] for row in rows]
        met = f"{sum(map(TARGETS[name], values))} of {len(values)}" if name in TARGETS else ""
        cells = [
            *(f"{value:.1f}" for value in values),
            f"{statistics.mean(values):.1f}",
            f"{max(values) - min(values):.1f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {met} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seeds")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at the same time")
    parser.add_argument("--out", type=Path, default=ROOT, help="root of benchmarks/results and docs")
    args = parser.parse_args()
    results = run_seeds(args.seeds, args.runs.resolve(), args.jobs)
    rows = [figures(result) for result in results]
    harness.save({"results": results, "figures": rows}, args.out / "benchmarks" / "results" / "glyphs_seeds.json")
    write_text(args.out / "docs" / "glyphs_seeds.md", page := table(rows, args.seeds))
    print(page)


if __name__ == "__main__":
    main()
