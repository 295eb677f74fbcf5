"""Analyze what the layers of a dense model do with pictures, or what the budgets of a finished run cost and answer.

`--model` names a dense model: a LLaVA-OneVision checkpoint in Hugging Face's format, a stage's folder, or
"almanac-base". Its layers are observed on the questions of the configuration, of `--data=FILE`, or of public
benchmarks:

    visor analyze --model=almanac-base --out=analysis
    visor analyze --model=HF_DIR --data=questions.json --out=analysis
    visor analyze --model=HF_DIR --benchmark=docvqa,mme --data=FOLDER --out=analysis

An evaluated workdir (`--workdir`, or as `--model`) is analyzed by its results: accuracy by task and budget, routes,
accuracy against FLOPs. Each analysis writes a CSV table with a PNG and an SVG picture to `--out`, by default
`analysis/` in the workdir; `--only` chooses analyses (docs/analyze.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visor_jax.config import Config

if TYPE_CHECKING:
    from visor_jax.analysis.write import Asked
    from visor_jax.generate.visor import Visor

HELP = "what layers do with pictures, what budgets cost and answer: tables and figures"
WATCHED = True
SAMPLES = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--model", default="", help="a dense model, as visor_jax.load takes it; or an evaluated workdir"
    )
    parser.add_argument("--out", default="", help="folder to write to; default: analysis/ in the workdir")
    parser.add_argument("--only", default="", help="names of analyses, separated by commas; default: all")
    parser.add_argument("--data", default="", help="file with questions, or the folder of a benchmark")
    parser.add_argument("--benchmark", default="", help="public benchmarks, separated by commas; or another source")
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), help="of the questions; default: validation"
    )
    parser.add_argument("--samples", type=int, default=None, help=f"questions, of each benchmark; default: {SAMPLES}")


def main(args: argparse.Namespace, config: Config | None) -> dict[str, Any]:
    """Writes the tables and figures; returns their paths."""
    from visor_jax.analysis.layers import check_dense
    from visor_jax.analysis.write import analyze_model, analyze_run
    from visor_jax.errors import RequestError
    from visor_jax.evaluate.configured import in_dtype_of
    from visor_jax.files.read_write import as_path
    from visor_jax.hf.hub import local_folder
    from visor_jax.loading import load
    from visor_jax.scale.compiler_options import use_compile_cache
    from visor_jax.workdir.folder import Workdir
    from visor_jax.workdir.supervision import watched

    if not args.model and not args.workdir:
        raise RequestError("--model: is missing; expected a dense model, or an evaluated workdir")
    if args.samples is not None and args.samples < 1:
        raise RequestError(f"--samples={args.samples}: expected at least 1")
    only = [name.strip() for name in args.only.split(",") if name.strip()]
    source = as_path(local_folder(args.model) if args.model else args.workdir)
    workdir = as_path(args.workdir) if args.workdir else source if is_run(source) else None
    if workdir is None and not args.out and source.exists():
        raise RequestError("--out: is missing; expected a folder to write to")
    out = workdir / "analysis" if workdir is not None and not args.out else as_path(args.out)
    use_compile_cache(workdir)
    model = load(source)
    of_run = model.arch.plan != "dense" and is_run(source)
    if of_run:
        refuse_questions(args)
    else:
        check_dense(model)
    config = config or config_of(args.model, source)
    with watched(config.train.hang_seconds):
        if of_run:
            result = analyze_run(Workdir(source), model, out, only)
        else:
            model = in_dtype_of(config, model)  # that of the passes, in which the answers are given too
            config, asked = questions_of(args, config, model)
            result = analyze_model(config, model, out, asked, only)
    for path in result["written"]:
        print(path)
    if result.get("slots"):
        print("for visor run: --config.search.slots=" + ",".join(map(str, result["slots"])))
    return result


def is_run(path: Path) -> bool:
    """Returns whether a folder is a workdir, not a stage of one nor a checkpoint."""
    from visor_jax.hf.read import is_folder

    return (path / "config.json").exists() and not is_folder(path)


def config_of(name: str, folder: Path) -> Config:
    """Returns the configuration that belongs to a model where none is given.

    Args:
      name: as `--model` gives it.
      folder: of the model.

    Raises:
      RequestError: there is none for it.
    """
    from visor_jax.config import from_dict, load_config
    from visor_jax.config.shipped import SHIPPED
    from visor_jax.hf.folder import read_shape
    from visor_jax.workdir.folder import Workdir

    if name in SHIPPED:
        return load_config("almanac_mini")
    for workdir in (folder, folder.parent):  # of a run, of its stage
        if is_run(workdir):
            return from_dict(Workdir(workdir).config())
    _, arch = read_shape(folder)
    anyres = (
        f"--config.model.anyres.{name}={getattr(arch.anyres, name)}"
        for name in ("packing", "packing_kind", "standardize")
    )
    return load_config(f"llava_ov_finetune:{folder}", [*anyres])


def refuse_questions(args: argparse.Namespace) -> None:
    """Raises RequestError if an argument chooses questions, which the results of a run do not need."""
    from visor_jax.errors import RequestError

    for name in ("data", "benchmark", "split", "samples"):
        if value := getattr(args, name):
            raise RequestError(
                f"--{name}={value}: is for the questions that a dense model is asked; this is an adaptive run, of which"
                " eval/test.json is analyzed; expected --model with a dense one"
            )


def questions_of(args: argparse.Namespace, config: Config, model: Visor) -> tuple[Config, Asked]:
    """Returns the configuration, and the questions that a dense model is asked.

    Raises:
      RequestError: benchmark, file or split do not exist or do not fit.
    """
    import dataclasses

    from visor_jax.analysis.write import Asked
    from visor_jax.commands.recipe import evaluation_data, public_benchmarks
    from visor_jax.data.questions import Questions, single_questions
    from visor_jax.data.sources import source_kind
    from visor_jax.errors import RequestError
    from visor_jax.evaluate.benchmarks.run import open_tables
    from visor_jax.evaluate.benchmarks.samples import AnsweredBenchmarks

    # Questions are asked with the model's own system text, as it answers.
    tokenizer = dataclasses.replace(config.tokenizer, system=model.system or "")
    config = dataclasses.replace(config, tokenizer=tokenizer)
    count, benchmarks = args.samples or SAMPLES, public_benchmarks(args.benchmark, args.data, None, args.workdir or "")
    if not benchmarks:
        config = evaluation_data(config, args.benchmark, args.data)
        levels = source_kind(config).levels
        return config, Asked(single_questions(config, args.split or "validation", count), levels)
    if args.split:
        raise RequestError(f"--split={args.split}: public benchmarks have one only; expected no --split")
    answers = AnsweredBenchmarks(
        open_tables(benchmarks, args.data), model, limit=count, batch_size=config.evaluate.batch_size
    )
    return config, Asked(Questions(config, answers, len(answers)), answers.levels, answers.scores)
