"""Export a trained model as a Hugging Face folder with a PyTorch module, and verify that both agree.

The folder appears only if the PyTorch model, loaded from it, gives the JAX model's logits and greedy tokens under every
viable budget; its `parity.json` holds the differences. A dense stage exports to transformers' own class.
"""

from __future__ import annotations

import argparse
from typing import Any

from visor_jax.config import Config

HELP = "export a trained model as a Hugging Face folder for PyTorch"
CONFIG = "workdir"
WORKDIR = "required"
WATCHED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--out", metavar="DIR", help="the folder to write (default: WORKDIR/export)")
    parser.add_argument("--stage", metavar="STAGE", help="whose weights to export (default: the newest complete stage)")
    parser.add_argument(
        "--dtype", default="float32", metavar="TYPE", help="of the weights: float32 (default) or bfloat16"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing export in DIR")


def main(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Exports the model; returns the folder and the agreement with PyTorch."""

    from visor_jax.commands.recipe import check_average
    from visor_jax.errors import RequestError, nearest
    from visor_jax.export.model_card import about_stage
    from visor_jax.export.torch_export import DTYPES, export
    from visor_jax.files.read_write import as_path

    if args.dtype not in DTYPES:
        raise RequestError(f"--dtype={args.dtype}: expected {' or '.join(DTYPES)}")

    from visor_jax.loading import MODEL_STAGES, load_stage
    from visor_jax.scale.compiler_options import use_compile_cache
    from visor_jax.workdir.folder import Workdir
    from visor_jax.workdir.supervision import watched

    workdir = Workdir(args.workdir)
    if args.stage is not None and args.stage not in MODEL_STAGES:
        hint = nearest(args.stage, MODEL_STAGES) or f"expected one of {', '.join(MODEL_STAGES)}"
        raise RequestError(f"--stage={args.stage}: no stage with a model; {hint}")
    stage = args.stage or next((name for name in MODEL_STAGES if workdir.stage(name).is_complete()), None)
    if stage is None:
        raise RequestError(f"--workdir={args.workdir}: no complete stage; expected a workdir that `visor run` wrote")
    check_average(workdir, config)
    out = as_path(args.out) if args.out else workdir.path / "export"
    use_compile_cache(workdir.path)
    about = about_stage(config.export, workdir, stage)
    with watched(config.train.hang_seconds):
        result = export(load_stage(workdir, stage), out, stage=stage, dtype=args.dtype, force=args.force, about=about)
    print(f"{result['out']}: stage {stage}, {args.dtype}")
    print(
        f"logits differ from JAX by at most {result['max_logit_difference']:.2g}; greedy tokens "
        f"{'equal' if result['greedy_tokens_equal'] else 'not equal'} (parity.json)"
    )
    return result
