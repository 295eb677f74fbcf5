"""Makes a checkpoint that the package contains: exports a stage and adds what made it.

    python -m visor_jax.export.ship --workdir=runs/almanac_base --stage=base_pages

writes `visor_jax/assets/almanac-base` of this checkout: the files of an export in bfloat16 that this package reads
(`visor export` also writes code for PyTorch), a README.md, and `recipe.json` with the configuration, commit, samples,
last metrics and evaluation of every stage that led to the weights. If the first of them started from a checkpoint that
the package contains, also from the one that is replaced, the recipe of that checkpoint is in it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from visor_jax.architecture import Architecture
from visor_jax.config import from_dict, stage_config
from visor_jax.config.shipped import ASSETS, SHIPPED
from visor_jax.errors import RequestError, RunError
from visor_jax.export.torch_export import export
from visor_jax.files.read_write import as_path, read_json, write_json
from visor_jax.loading import MODEL_STAGES, load_stage
from visor_jax.model.visor import abstract_params
from visor_jax.tree import flatten
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.metrics_log import read_rows

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
MEASURED = ("benchmark", "split", "budgets", "blind", "shuffled", "intervals", "kinds", "levels", "dense", "skipped")
README = """\
---
license: apache-2.0
language: en
tags: [visor, jax]
---
# {name}

A dense vision-language model of {parameters:,} parameters, trained from random weights on the generated data set
almanac with the next-token loss on answers (stage {stage}). `recipe.json` holds its configuration, commit and metrics.

    import visor_jax
    model = visor_jax.load("{name}")

`init_from="{name}"` lets a stage start from it. `visor export` of a run writes folders for PyTorch.
"""


def ship(workdir: Workdir, stage: str, name: str, assets: Path = ASSETS) -> Path:
    """Writes the shipped checkpoint `name` from a complete stage of a dense plan; replaces an earlier one.

    Returns: its folder.

    Raises:
      RequestError: the stage is not complete or not dense.
      RunError: the export does not match the model.
    """
    if not workdir.stage(stage).is_complete():
        raise RequestError(f"--stage={stage}: {workdir.path} holds no complete stage of this name")
    model = load_stage(workdir, stage)
    if model.arch.plan != "dense":
        raise RequestError(f"--stage={stage}: has plan {model.arch.plan!r}; expected a stage of a dense model")
    folder = assets / name
    made_by = recipe(workdir, stage, assets)  # before the folder is replaced
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / name
        parity = export(model, made, stage=stage, dtype="bfloat16")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in FILES:
            shutil.copyfile(made / file, folder / file)
    parity.pop("out")
    write_json(folder / "recipe.json", {**made_by, "parity": parity})
    text = README.format(name=name, stage=stage, parameters=num_parameters(model.arch))
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def num_parameters(arch: Architecture) -> int:
    """Returns the number of parameters of a model."""
    return sum(leaf.size for leaf in flatten(abstract_params(arch)).values())


def recipe(workdir: Workdir, stage: str, assets: Path = ASSETS) -> dict[str, Any]:
    """Returns what made a stage: of each stage that led to it configuration, commit, samples and metrics.

    "start" is the recipe of the shipped checkpoint that the first of them started from, or None.

    Raises:
      RequestError: a workdir among them cannot be read.
    """
    result = workdir.path / "eval" / "test.json"
    evaluation = read_json(result) if result.exists() else {}
    measured = evaluation.get("stage") == stage
    line = list(lineage(workdir, stage))
    first_run, first = line[0]
    start = stage_config(from_dict(first_run.config()), first).init_from
    return {
        "stage": stage,
        "start": read_json(assets / start / "recipe.json") if start in SHIPPED else None,
        "stages": {name: _made(run, name) for run, name in line},
        "evaluation": {key: value for key, value in evaluation.items() if key in MEASURED} if measured else {},
    }


def lineage(workdir: Workdir, stage: str) -> Iterator[tuple[Workdir, str]]:
    """Yields (workdir, stage) of the stages that led to `stage`, the first one first; some may be in other workdirs."""
    start = stage_config(from_dict(workdir.config()), stage).init_from
    if "/" in start and as_path(start).name in MODEL_STAGES:
        yield from lineage(Workdir(as_path(start).parent), as_path(start).name)
    elif start in MODEL_STAGES:
        yield from lineage(workdir, start)
    yield workdir, stage


def _made(workdir: Workdir, stage: str) -> dict[str, Any]:
    """Returns how one stage was trained."""
    record, rows = workdir.record(), list(read_rows(workdir.stage(stage).path / "metrics.jsonl"))
    return {
        "commit": record.get("git_revision", ""),
        "versions": record.get("versions", {}),
        "config": record["config"],
        "steps": workdir.stage(stage).complete().step,
        "samples": sum(row.get("samples", 0) for row in rows),
        "seconds": round(sum(row.get("seconds", 0.0) for row in rows)),
        "last": rows[-1] if rows else {},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description="Makes a checkpoint that the package contains.")
    parser.add_argument("--workdir", required=True, help="the run that trained the model")
    parser.add_argument("--stage", default="base_pages", help="whose weights to ship")
    parser.add_argument("--name", default=SHIPPED[0], choices=SHIPPED)
    args = parser.parse_args(arguments)
    try:
        folder = ship(Workdir(args.workdir), args.stage, args.name)
    except (RequestError, RunError) as error:
        print(f"ship: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RequestError) else 1)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
