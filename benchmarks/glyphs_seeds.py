"""The effect on several seeds: run the whole default job for each, and put its figures in one table.

    python benchmarks/glyphs_seeds.py --seeds 1 2 3 4 5 --runs runs/seeds

In: nothing but the configuration `configs/glyphs_mini.py`. Out: `benchmarks/results/glyphs_seeds.json` (every seed's
`eval/test.json`, its wall seconds, and which of the targets below it met) and `docs/glyphs_seeds.md`, the table. A seed
that is complete under `--runs` is not run again; no seed that was asked for is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "glyphs_seeds.json"
TABLE = ROOT / "docs" / "glyphs_seeds.md"
LADDER = ("follow2", "follow3")  # the tasks that must gain from a second slot


def run_seed(seed: int, runs: Path) -> dict[str, Any]:
    """One seed's whole job; its evaluation and wall seconds."""
    workdir = runs / str(seed)
    timing = workdir / "seconds.json"
    if not (workdir / "eval" / "test.json").exists() or not timing.exists():
        command = [sys.executable, "-m", "visor_jax", "run", "--config=configs/glyphs_mini.py", f"--workdir={workdir}"]
        began = time.perf_counter()
        subprocess.run([*command, f"--config.seed={seed}"], cwd=ROOT, check=True)
        timing.write_text(json.dumps(time.perf_counter() - began))
    evaluation = json.loads((workdir / "eval" / "test.json").read_text())
    for unneeded in ("examples", "dial"):
        evaluation.pop(unneeded, None)
    return {"seed": seed, "seconds": json.loads(timing.read_text()), "evaluation": evaluation}


def ladder_gain(budgets: dict[str, Any], task: str) -> float:
    """Points that the best budget of two slots gains over the best of one, on one task."""

    def best(count: int) -> float:
        return max(row["tasks"][task] for name, row in budgets.items() if name.count("1") == count and name != "auto")

    return 100 * (best(2) - best(1))


def figures(result: dict[str, Any]) -> dict[str, float]:
    """What the targets are about, in percent and points."""
    evaluation = result["evaluation"]
    budgets, levels, routes = evaluation["budgets"], evaluation["levels"], evaluation["routes"]
    fixed = {name: row for name, row in budgets.items() if name != "auto"}
    easy = [task for task, level in levels.items() if level == "easy"]
    hard = [task for task, level in levels.items() if level == "hard"]
    auto, full = budgets["auto"], budgets["full"]
    return {
        "worst easy task, worst budget": 100 * min(row["tasks"][task] for row in fixed.values() for task in easy),
        "easiest hard task, empty": 100 * max(budgets["empty"]["tasks"][task] for task in hard),
        "worst hard task, full": 100 * min(full["tasks"][task] for task in hard),
        "hard, empty": 100 * budgets["empty"]["hard"],
        "hard, full": 100 * full["hard"],
        "auto minus full, easy": 100 * (auto["easy"] - full["easy"]),
        "auto minus full, hard": 100 * (auto["hard"] - full["hard"]),
        "auto's share of full's decoder FLOPs": 100 * auto["decoder_gflops"] / full["decoder_gflops"],
        "easy routed to empty": 100 * statistics.mean(routes[task].get("empty", 0.0) for task in easy),
        **{f"{task}, two slots over one": ladder_gain(fixed, task) for task in LADDER},
        "seconds": result["seconds"],
    }


TARGETS = {
    "worst easy task, worst budget": lambda x: x >= 98,
    "easiest hard task, empty": lambda x: x <= 65,
    "worst hard task, full": lambda x: x >= 97,
    "auto minus full, easy": lambda x: x >= -1,
    "auto minus full, hard": lambda x: x >= -1,
    "auto's share of full's decoder FLOPs": lambda x: x <= 60,
    "easy routed to empty": lambda x: x >= 95,
    "follow3, two slots over one": lambda x: x >= 3,
    "seconds": lambda x: x <= 600,
}


def table(rows: list[dict[str, float]], seeds: list[int]) -> str:
    lines = [
        "# The effect, seed by seed",
        "",
        "Made by `python benchmarks/glyphs_seeds.py --seeds " + " ".join(map(str, seeds)) + "`; percent and points,",
        "test split, eight cards a picture. Seconds are wall time on the machine that ran it.",
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
    args = parser.parse_args()
    results = [run_seed(seed, args.runs) for seed in args.seeds]
    rows = [figures(result) for result in results]
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({"results": results, "figures": rows}, indent=1) + "\n")
    TABLE.write_text(table(rows, args.seeds))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
