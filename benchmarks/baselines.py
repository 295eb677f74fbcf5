"""Trains and evaluates two baselines: a dense twin, and a dense twin whose visual tokens are packed by four.

    python benchmarks/baselines.py --visor runs/glyphs_mini [--runs runs/baselines]

In: a finished run of `configs/glyphs_mini.py`. Both twins (`configs/glyphs_dense.py`) are trained with its seed, on as
many samples as its stages warmup, full and universal together. Out: `benchmarks/results/baselines.json`, the table
`docs/baselines.md` and the picture `docs/baselines.png`: accuracy on easy and hard questions against decoder FLOPs. A
twin that is complete under `--runs` is not trained again. `--out` sets the folder that contains `benchmarks/results`
and `docs`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness

from visor_jax.files.read_write import write_bytes, write_text
from visor_jax.report import figures
from visor_jax.workdir.metrics_log import read_rows

ROOT = Path(__file__).resolve().parent.parent
ADAPTIVE = ("warmup", "full", "universal")  # the dense stage replaces these
TWINS = {"dense": "s", "dense, 4 visual tokens packed into 1": "^"}  # name -> marker


def visor(command: str, config: str, workdir: Path, *options: str) -> None:
    """Runs one `visor` command; raises CalledProcessError if it fails."""
    arguments = [sys.executable, "-m", "visor_jax", command, f"--config={config}", f"--workdir={workdir}", *options]
    subprocess.run(arguments, cwd=ROOT, check=True)


def run_twins(runs: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Trains and evaluates the twins that are missing; returns name -> evaluation and training figures."""
    dense, packed = runs / "dense", runs / "packed"
    config, seeded = "configs/glyphs_dense.py", f"--config.seed={seed}"
    jobs = ((dense, config, ("base", "dense")), (packed, f"{config}:{dense}", ("dense",)))
    for workdir, twin_config, stages in jobs:
        if not (workdir / "eval" / "test.json").exists():
            for stage in stages:
                visor("train", twin_config, workdir, seeded, f"--config.stage={stage}")
            visor("evaluate", twin_config, workdir, seeded)
    return {name: measured(workdir, ("dense",)) for name, workdir in zip(TWINS, (dense, packed), strict=True)}


def measured(workdir: Path, stages: tuple[str, ...]) -> dict[str, Any]:
    """Returns a run's evaluation, its seed, and the number of conversations that `stages` trained on."""
    evaluation = json.loads((workdir / "eval" / "test.json").read_text())
    evaluation.pop("examples", None)
    config = json.loads((workdir / "config.json").read_text())["config"]
    steps = sum(len(read_rows(workdir / stage / "metrics.jsonl")) for stage in stages)
    return {
        "evaluation": evaluation,
        "seed": config["seed"],
        "samples": steps * config["data"]["batch_size"],
    }


def table(adaptive: dict[str, Any], twins: dict[str, dict[str, Any]]) -> str:
    """Returns the Markdown page: one row per budget of VISOR and per twin."""
    budgets = adaptive["evaluation"]["budgets"]
    rows = [(f"VISOR, {name}", row, adaptive) for name, row in budgets.items()]
    rows += [(name, twin["evaluation"]["budgets"]["full"], twin) for name, twin in twins.items()]
    lines = [
        "# Against a dense twin and packed tokens",
        "",
        "Made by `python benchmarks/baselines.py --visor RUN`, RUN being a run of `configs/glyphs_mini.py` with seed",
        f"{adaptive['seed']}. Same pretraining, as many training conversations, test split. VISOR's budgets are one",
        "model, trained once. The dense twin spends more FLOPs on every conversation, but its pretraining was not made",
        "for it: the table shows what the same samples give, not what a dense model can learn from more.",
        "",
        "| | easy % | hard % | decoder MFLOP | of dense | conversations |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    dense_flops = twins["dense"]["evaluation"]["budgets"]["full"]["decoder_gflops"]
    for name, row, run in rows:
        flops = row["decoder_gflops"]
        lines.append(
            f"| {name} | {100 * row['easy']:.1f} | {100 * row['hard']:.1f} | {1e3 * flops:.1f} |"
            f" {100 * flops / dense_flops:.0f} % | {run['samples']:,} |"
        )
    return "\n".join([*lines, "", "![Accuracy against decoder FLOPs](baselines.png)"]) + "\n"


@figures.styled
def draw(adaptive: dict[str, Any], twins: dict[str, dict[str, Any]]) -> bytes:
    """Draws VISOR's cost curve and the two twins as PNG."""
    figure, [axes] = figures.figure(4.2, width=6.4)
    figures.draw_cost_curve(axes, adaptive["evaluation"])
    if legend := axes.get_legend():
        legend.set_loc("center left")  # the twins are on the right
        legend.set_bbox_to_anchor((0.02, 0.62), transform=axes.transAxes)
    factor, _ = figures.flops_unit(adaptive["evaluation"]["dense"]["decoder_gflops"])
    for name, twin in twins.items():
        row = twin["evaluation"]["budgets"]["full"]
        for level in ("easy", "hard"):
            point = row["decoder_gflops"] * factor, 100 * row[level]
            axes.plot(*point, TWINS[name], color=figures.LEVELS[level], ms=9, zorder=5)
            to_the_left = {"xytext": (-9, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            axes.annotate(name.replace(", ", ",\n"), point, fontsize=8, **to_the_left)
    return figures.png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visor", type=Path, required=True, help="workdir of a finished run of configs/glyphs_mini.py")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "baselines")
    parser.add_argument("--out", type=Path, default=ROOT, help="root of benchmarks/results and docs")
    args = parser.parse_args()
    adaptive = measured(args.visor, ADAPTIVE)
    twins = run_twins(args.runs.resolve(), adaptive["seed"])
    harness.save({"visor": adaptive, **twins}, args.out / "benchmarks" / "results" / "baselines.json")
    write_text(args.out / "docs" / "baselines.md", page := table(adaptive, twins))
    write_bytes(args.out / "docs" / "baselines.png", draw(adaptive, twins))
    print(page)


if __name__ == "__main__":
    main()
