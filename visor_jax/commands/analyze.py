"""Analyze what the layers of a dense model do with pictures, or what the budgets of a finished run cost and answer.

`--model=FOLDER` (a LLaVA-OneVision checkpoint, a stage's folder, or "almanac-base") names a dense model; its layers
are observed on questions of the configuration, or of `--data=FILE`:

    visor analyze --config=configs/almanac_mini.py --model=almanac-base --out=analysis
    visor analyze --config=llava_ov_finetune:HF_DIR --model=HF_DIR --data=questions.json --out=analysis

Without `--model`, an evaluated workdir is analyzed: accuracy by task and budget, routes, accuracy against FLOPs. Both
write CSV tables with PNG and SVG pictures to `--out`, by default `analysis/` in the workdir (docs/analyze.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from visor_jax.config import Config

HELP = "what layers do with pictures, what budgets cost and answer: tables and figures"
CONFIG = "workdir"
WATCHED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--model", default="", help="a dense model, as visor_jax.load takes it")
    parser.add_argument("--out", default="", help="folder to write to; default: analysis/ in the workdir")
    parser.add_argument("--data", default="", help="file with questions; default: those of the configuration")
    parser.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    parser.add_argument("--samples", type=int, default=512, help="questions")


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Writes the tables and figures; returns their paths."""
    from visor_jax.analysis.write import analyze_model, analyze_run
    from visor_jax.commands.recipe import evaluation_data
    from visor_jax.errors import RequestError
    from visor_jax.loading import load
    from visor_jax.scale.compiler_options import use_compile_cache
    from visor_jax.workdir.folder import Workdir
    from visor_jax.workdir.supervision import watched

    if args.samples < 1:
        raise RequestError(f"--samples={args.samples}: expected at least 1")
    if not args.out and not args.workdir:
        raise RequestError("--out: is missing; expected a folder to write to, or a --workdir")
    if not args.model and not args.workdir:
        raise RequestError("--model: is missing; expected a dense model, or an evaluated --workdir")
    if args.data and not args.model:
        raise RequestError(f"--data={args.data}: is for the questions that a --model is asked; expected --model")
    out = Path(args.out or Path(args.workdir) / "analysis")
    with watched(config.train.hang_seconds):
        if args.model:
            use_compile_cache(out)
            model = load(args.model)
            written = analyze_model(evaluation_data(config, "", args.data), model, out, args.split, args.samples)
        else:
            written = analyze_run(Workdir(args.workdir), load(args.workdir), out)
    for path in written:
        print(path)
    return {"written": [str(path) for path in written]}
