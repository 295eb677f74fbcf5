"""Evaluate the newest model of a workdir on its held-out test split, under every viable budget and the policy.

The result is `eval/test.json`, which the report uses. `--budget=empty,full,auto,0b10` selects budgets, `--stage=full`
an earlier stage's model, `--config.FIELD=VALUE` another configuration: such results go to `eval/partial/`. Of the model
only what needs no training can be changed: `model.dtype`, `model.reduction`, `model.dropping`, `model.anyres.packing`;
also `tokenizer.system`. With `--data=FILE` (or a folder that holds one) the questions come from a file instead; the
ending of its name decides the source (.json, .jsonl, .parquet, .array_record, .yaml for a mixture). Its result goes to
`eval/of_<file's name>/`, or `partial/` in it.

`--benchmark=docvqa --data=FOLDER` asks the questions of a public benchmark, or of several (`docvqa,chartqa`), from a
folder in the hub's layout, or from one that holds a folder for each repository (docs/benchmarks.md). The results go to
`eval/of_docvqa/`, with a line of JSON for each question and budget. `--limit=N` asks the first N questions only.
`--benchmark=FILE.py` asks those of a benchmark of your own; the file is executed (docs/add_a_benchmark.md).

`--against=B` compares the answers with those of another run to the same questions, of which B is the workdir or the
file of answers. Its budget of the same name counts, or `--against-budget=NAME` (docs/evaluation.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from visor_jax.config import Config

HELP = "accuracy and cost of every budget"
CONFIG = "workdir"
WORKDIR = "required"
WATCHED = True
PROCESSES = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose data, budgets, stage and split."""
    parser.add_argument(
        "--benchmark",
        default="",
        help="public benchmarks, separated by commas, or a file of your own; or a source, as data.source",
    )
    parser.add_argument(
        "--data", default="", help="a JSON file in LLaVA's format, or a folder; of a benchmark: a folder"
    )
    parser.add_argument("--limit", type=int, default=None, help="of the questions of each benchmark; default: all")
    parser.add_argument("--budget", default=None, help="comma-separated names; default: all viable budgets and auto")
    parser.add_argument(
        "--against", default="", help="another run's workdir, or the file of its answers, to compare with"
    )
    parser.add_argument(
        "--against-budget", default="", help="its budget to compare with; default: the only one, or that of each name"
    )
    parser.add_argument("--stage", default="", help="the stage whose model is evaluated; default: the newest complete")
    parser.add_argument(
        "--split", choices=("validation", "test"), help="default: test; a public benchmark has one only"
    )


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Evaluates the model; returns the content of the result file."""
    from visor_jax.commands.recipe import check_average, evaluation_data, public_benchmarks
    from visor_jax.config import from_dict
    from visor_jax.errors import RequestError, nearest
    from visor_jax.evaluate.against import open_answers, open_predictions
    from visor_jax.evaluate.benchmarks.run import evaluate_benchmarks, open_tables
    from visor_jax.evaluate.configured import configured
    from visor_jax.evaluate.runner import evaluate
    from visor_jax.evaluate.tables import print_benchmarks, print_budgets
    from visor_jax.loading import MODEL_STAGES, load
    from visor_jax.scale.compiler_options import use_compile_cache
    from visor_jax.workdir.folder import WITHOUT_EFFECT, Workdir
    from visor_jax.workdir.provenance import differing_fields, plain
    from visor_jax.workdir.supervision import watched

    if args.stage and args.stage not in MODEL_STAGES:
        hint = nearest(args.stage, MODEL_STAGES) or f"expected one of {', '.join(MODEL_STAGES)}"
        raise RequestError(f"--stage={args.stage}: unknown stage; {hint}")
    workdir = Workdir(args.workdir)
    benchmarks = public_benchmarks(args.benchmark, args.data, args.limit, args.workdir)
    if benchmarks and args.split:
        raise RequestError(
            f"--split={args.split}: is for the run's own data; expected no --split with {args.benchmark}"
        )
    check_average(workdir, config)
    trained = from_dict(workdir.config())
    run_config, config = config, config if benchmarks else evaluation_data(config, args.benchmark, args.data)
    budgets = [name.strip() for name in (args.budget or "").split(",") if name.strip()] or None
    if args.budget is not None and budgets is None:
        raise RequestError(f"--budget={args.budget}: expected comma-separated budgets, such as empty,full")
    other = any(
        field not in ("stage", *WITHOUT_EFFECT) for field, *_ in differing_fields(plain(trained), plain(run_config))
    )
    name = "partial" if budgets or args.stage or other or args.limit else ""
    if args.against_budget and not args.against:
        raise RequestError(f"--against-budget={args.against_budget}: expected also --against=WORKDIR or a file")
    tables, split = open_tables(benchmarks, args.data), args.split or "test"
    of = Path(config.data.path or config.data.mixture).stem if args.data else args.benchmark
    folder = f"of_{of}" if config is not run_config else ""
    predictions = open_predictions(args.against, tables, args.limit, args.against_budget) if args.against else None
    answers = open_answers(args.against, folder, split, args.against_budget) if args.against and not tables else None
    use_compile_cache(workdir.path)
    source = workdir.path / args.stage if args.stage else workdir.path
    with watched(config.train.hang_seconds):
        if tables:
            model = configured(load(source, dtype=config.model.dtype), trained, config)
            result = evaluate_benchmarks(
                config, model, workdir, tables, budgets=budgets, limit=args.limit, name=name, against=predictions
            )
        else:
            name = str(Path(folder) / name) if folder else name
            model = configured(load(source), trained, config)
            result = evaluate(config, model, workdir, split=split, budgets=budgets, name=name, against=answers)
    (print_benchmarks if tables else print_budgets)(result)
    return result
