"""Measures every claim of the method on the default job, from one trained dense base, seed by seed.

    python benchmarks/claims.py                                    # every variant, seeds 1 2 3, then the page
    python benchmarks/claims.py --only visor dense --seeds 1       # some of them
    python benchmarks/claims.py --only visor dense_packed_4 --steps-scale 3   # longer training
    python benchmarks/claims.py --only visor --seeds 1 --steps-scale 0.02 --runs /tmp/x --out /tmp/x   # a trial
    python benchmarks/claims.py --page                             # docs/claims.md from the results that exist

In: a configuration with the stages warmup to policy (`--config`) and a dense base (`--base`: the shipped one, a folder
in Hugging Face's format, or RUN/base_pages). `claims_table.py` has the variants. Out: for every variant and seed
`benchmarks/results/claims/VARIANT_SEED.json` (accuracies, FLOPs, steps, seed, the commits that measured and trained it,
CPU seconds, and which questions each budget answers), and `questions.json`: which hard questions count, decided from
the base alone before anything else runs. A result that exists is skipped; if its configuration or base is another one,
the script stops (`--again` measures it once more). Runs live below `--runs` and continue where they were stopped.
`claims_page.py` writes the page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claims_page
import numpy as np
from claims_table import ADAPTIVE, VARIANTS, Variant
from ml_collections import ConfigDict
from paper import page as paper_page

import visor_jax
from visor_jax.commands.recipe import run_stages
from visor_jax.config import Config, from_dict, load_config, stage_config
from visor_jax.errors import RequestError, RunError
from visor_jax.evaluate.measure import measure, requested_budgets
from visor_jax.export.torch_export import write_folder
from visor_jax.files.read_write import read_json, write_json
from visor_jax.generate.visor import Visor
from visor_jax.tree import flatten
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.metrics_log import read_rows
from visor_jax.workdir.provenance import default_fields, flat_fields, git_revision, is_free, plain

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS_SEED = 0  # of the questions that decide which count; the runs have other seeds
THRESHOLD = 0.8  # hard questions count if the base answers at least this share of their task and kind
FEWEST = 8  # questions of a task and kind, below which it does not count
TEST_QUESTIONS = 4096  # unless the command line says otherwise
POINT_STEPS = 10  # steps of one point of a training curve


@dataclass(frozen=True)
class Session:
    """What the command line sets for all variants; `base_sha256` is that of the base's parameters."""

    config: Config
    base: str
    base_sha256: str
    runs: Path
    out: Path
    steps_scale: float = 1.0

    @property
    def folder(self) -> Path:
        """The folder of everything that is compared, and of questions.json."""
        return self.out / "benchmarks" / "results" / "claims"

    @property
    def results(self) -> Path:
        """The folder of the result files; runs with scaled steps have one of their own."""
        return self.folder / self.scale_name

    @property
    def scale_name(self) -> str:
        """The folder of runs and results whose steps are scaled, below that of the others."""
        return "" if self.steps_scale == 1 else f"steps_x{self.steps_scale:g}"


# --- configurations ---------------------------------------------------------------------------------------------------


def changed(config: Config, fields: Mapping[str, Any]) -> Config:
    """Returns a checked copy of a configuration with {dotted field: value}."""
    tree = ConfigDict(config.to_dict())
    tree.update_from_flattened_dict(fields)
    return from_dict(tree.to_dict())


def scaled(config: Config, scale: float, *, labels: bool = False) -> Config:
    """Returns the configuration with all stages' steps multiplied by `scale`, at least one step each.

    With `labels`, a longer policy stage also gets more labels: it would learn the same ones by heart.
    """
    stages = (*ADAPTIVE, "policy")
    fields = {f"stage_overrides.{s}.steps": max(1, round(scale * stage_config(config, s).steps)) for s in stages}
    if labels and scale > 1:
        fields["label.samples"] = round(scale * config.label.samples)
    return config if scale == 1 else changed(config, fields)


def configured(session: Session, name: str, seed: int) -> Config:
    """Returns the configuration of one variant and seed."""
    variant = VARIANTS[name]
    config = scaled(session.config, session.steps_scale, labels="label" in variant.stages)
    fields = {"name": f"claims_{name}", "seed": seed, "stage": "", "stages": variant.stages, **variant.fields(config)}
    fields |= {"evaluate.dense_start": False}  # the base is a variant
    if variant.stages and variant.after is None:
        start = session.base if variant.start is None else str(workdir_of(session, variant.start[0], seed).path)
        start = start if variant.start is None else f"{start}/{variant.start[1]}"
        fields[f"stage_overrides.{variant.stages[0]}.init_from"] = start
    return changed(config, fields)


def workdir_of(session: Session, name: str, seed: int) -> Workdir:
    """Returns the folder of one variant's run."""
    return Workdir(session.runs / session.scale_name / f"{name}_{seed}")


def identity_of(session: Session, config: Config) -> dict[str, Any]:
    """Returns what a result depends on: the base, and the fields that differ from the defaults and change results."""
    defaults = default_fields()
    fields = {
        name: value
        for name, value in flat_fields(plain(config))
        if value != defaults.get(name, "(none)")
        and (name.startswith("evaluate.") or not is_free(name))
        and not name.endswith(".init_from")
    }
    return {"base_sha256": session.base_sha256, "config": fields}


def parameters_sha256(model: Visor) -> str:
    """Returns a checksum of a model's parameters: names, shapes and float32 values."""
    digest = hashlib.sha256()
    for path, array in sorted(flatten(model.params).items()):
        values = np.asarray(array, np.float32)
        digest.update(f"{path} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def opened_base(base: str, runs: Path) -> tuple[str, str]:
    """Returns the base that stages start from, and the checksum of its parameters.

    A stage's folder is written in Hugging Face's format first, from which a model with any pattern of layers can start.
    """
    model = visor_jax.load(base)
    sha256, place = parameters_sha256(model), Path(base)
    if (place / "complete.json").exists():
        place = runs / f"base_{sha256[:12]}"
        if not (place / "config.json").exists():
            part = runs / f"{place.name}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write_folder(part, model, stage=model.stage, dtype="float32", max_shard_bytes=10**9)
            part.rename(place)
    return str(place.resolve()) if place.exists() else base, sha256


# --- the questions that count -----------------------------------------------------------------------------------------


def fixed_questions(session: Session) -> dict[str, Any]:
    """Returns which hard tasks and kinds of pages count; decides it from the base alone if that was not done yet.

    Raises:
      RequestError: it was decided from another base.
    """
    path = session.folder / "questions.json"
    if path.exists():
        questions = read_json(path)
        if questions["base_sha256"] != session.base_sha256:
            raise RequestError(f"{path}: was decided from another base; remove it and all results to begin again")
        return questions
    if others := sorted(path.parent.rglob("*_[0-9]*.json")):
        raise RequestError(f"{others[0]}: exists before {path.name}; expected the questions to be fixed first")
    fields = {**VARIANTS["base"].fields(session.config), "seed": QUESTIONS_SEED, "stages": (), "stage": ""}
    config = changed(session.config, fields)
    model = visor_jax.load(session.base)
    measured = measure(config, model, "validation", requested_budgets(model, ["full"]))
    answered = measured.answered["budgets"]
    kinds = answered.get("kinds", [""] * len(answered["tasks"]))
    cells: dict[tuple[str, str], list[bool]] = {}
    for task, kind, right in zip(answered["tasks"], kinds, answered["right"]["full"], strict=True):
        if measured.scores.levels.get(task) == "hard":
            cells.setdefault((task, kind), []).append(right == "1")
    counts = [t for t, right in sorted(cells.items()) if len(right) >= FEWEST and np.mean(right) >= THRESHOLD]
    questions = {
        "base_sha256": session.base_sha256,
        "split": "validation",
        "seed": QUESTIONS_SEED,
        "threshold": THRESHOLD,
        "fewest": FEWEST,
        "commit": git_revision(),
        "counts": [list(cell) for cell in counts],
        "cells": [[*cell, int(np.sum(right)), len(right)] for cell, right in sorted(cells.items())],
    }
    write_json(path, questions)
    return questions


# --- one variant and seed ---------------------------------------------------------------------------------------------


def result_of(session: Session, name: str, seed: int, *, again: bool = False) -> dict[str, Any]:
    """Returns the result of a variant and seed: the stored one, or that of a run which it makes or continues.

    Raises:
      RequestError: the stored result has another configuration or base, or a run that this one continues is missing.
    """
    path, variant, config = session.results / f"{name}_{seed}.json", VARIANTS[name], configured(session, name, seed)
    identity = identity_of(session, config)
    if path.exists() and not again:
        stored = read_json(path)
        if stored["identity"] != identity:
            raise RequestError(
                f"{path}: {difference(stored['identity'], identity)}; expected this configuration and base: remove the"
                " file, or measure it once more with --again"
            )
        print(f"{name}, seed {seed}: there", flush=True)
        return stored
    workdir = workdir_of(session, name, seed)
    model = visor_jax.load(session.base) if not variant.stages else trained(session, config, variant, workdir, seed)
    began = time.process_time()
    measured = measure(config, model, "test", requested_budgets(model, variant.budgets))
    result = {
        "variant": name,
        "seed": seed,
        "identity": identity,
        "commit": git_revision(),
        "trained": workdir.record().get("git_revision") if variant.stages else None,
        "steps": {stage: stage_config(config, stage).steps for stage in variant.stages if stage != "search"
                  and stage != "label"},
        "steps_scale": session.steps_scale,
        "cpu_seconds": {**spent(workdir), "measure": time.process_time() - began},
        **measured.figures,
        "answered": measured.answered["budgets"],
        "curve": curve(workdir, variant.stages, measured.scores.levels),
    }  # fmt: skip
    write_json(path, json.loads(json.dumps(result)))
    print(f"{name}, seed {seed}: {summary(result)}", flush=True)
    return result


def trained(session: Session, config: Config, variant: Variant, workdir: Workdir, seed: int) -> Visor:
    """Completes a variant's stages and returns its last model."""
    for source, stages in [variant.after] if variant.after else []:
        copy_stages(workdir_of(session, source, seed).path, workdir.path, stages)
    for stage in variant.stages:
        print(f"{workdir.path.name}: {stage}", flush=True)
        began = time.process_time()
        run_stages(config, str(workdir.path), [stage])
        seconds = spent(workdir)
        seconds[stage] = seconds.get(stage, 0.0) + time.process_time() - began
        write_json(workdir.path / "cpu_seconds.json", seconds)
    return visor_jax.load(workdir.path / variant.stages[-1])


def copy_stages(source: Path, target: Path, stages: Sequence[str]) -> None:
    """Copies finished stages of another run, if they are not there yet.

    Raises:
      RequestError: the other run has not finished them.
    """
    for stage in stages:
        if not (source / stage).is_dir():
            raise RequestError(f"{source / stage}: no such folder; run the variant that {target.name} continues first")
        if not (target / stage).exists():
            shutil.copytree(source / stage, target / f"{stage}.part", dirs_exist_ok=True)
            (target / f"{stage}.part").rename(target / stage)


def spent(workdir: Workdir) -> dict[str, float]:
    """Returns the CPU seconds of each stage, over all starts that reached its end."""
    path = workdir.path / "cpu_seconds.json"
    return read_json(path) if path.exists() else {}


def curve(workdir: Workdir, stages: Sequence[str], levels: Mapping[str, str]) -> list[list[Any]]:
    """Returns [stage, last step, hard accuracy] of every `POINT_STEPS` steps on their own fresh samples.

    Each task of level hard counts equally. Only steps with all slots on count, or all steps of a stage that trains
    another fixed budget.
    """
    points: list[list[Any]] = []
    for stage in stages:
        path = workdir.path / stage / "metrics.jsonl"
        rows = read_rows(path) if path.exists() and stage != "policy" else []
        full = [row for row in rows if row.get("budget") == "full"] or rows
        for number in range(0, len(full), POINT_STEPS):
            by_task: dict[str, list[float]] = {}
            for row in full[number : number + POINT_STEPS]:
                for field, value in row.items():
                    task = field.removeprefix("accuracy/")
                    if task != field and levels.get(task) == "hard":
                        by_task.setdefault(task, []).append(value)
            if by_task:
                accuracy = float(np.mean([np.mean(values) for values in by_task.values()]))
                points.append([stage, full[min(number + POINT_STEPS, len(full)) - 1]["step"], accuracy])
    return points


def difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Describes in a few words how two identities differ."""
    if theirs["base_sha256"] != mine["base_sha256"]:
        return f"made from base {theirs['base_sha256'][:12]}, not {mine['base_sha256'][:12]}"
    names = {n for n in theirs["config"].keys() | mine["config"].keys()
             if theirs["config"].get(n) != mine["config"].get(n)}  # fmt: skip
    return "made with another " + ", ".join(sorted(names)[:5])


def summary(result: Mapping[str, Any]) -> str:
    """Returns a result's accuracies by budget in one line."""
    budgets = result["budgets"].items()
    rows = [
        f"{name} " + "/".join(shown(row.get(level)) for level in ("easy", "middle", "hard")) for name, row in budgets
    ]
    return f"easy/middle/hard: {', '.join(rows)}; {sum(result['cpu_seconds'].values()):.0f} CPU seconds"


def shown(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def ordered(names: Sequence[str]) -> list[str]:
    """Returns the variants in the order of the table, in which a variant comes after the one that it continues."""
    return [name for name in VARIANTS if name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the variants; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "almanac_mini.py"))
    parser.add_argument("--base", default="almanac-base", help="the dense base; a name, a folder, or RUN/base_pages")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies all steps, and labels if above 1")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT, help="root of benchmarks/results and docs")
    parser.add_argument("--again", action="store_true", help="measure results once more that are there")
    parser.add_argument("--page", action="store_true", help="only write docs/claims.md from the results that are there")
    args, overrides = parser.parse_known_args(arguments)
    for override in overrides:
        if not override.startswith("--config."):
            parser.error(f"unexpected argument {override!r}; expected --only VARIANT ... or --config.FIELD=VALUE")
    if not (np.isfinite(args.steps_scale) and args.steps_scale > 0):
        raise RequestError(f"--steps-scale={args.steps_scale}: expected a finite number above 0")
    if not any("evaluate.samples" in override for override in overrides):
        overrides = [f"--config.evaluate.samples={TEST_QUESTIONS}", *overrides]
    config = load_config(args.config, overrides)
    base, sha256 = ("", "") if args.page else opened_base(args.base, args.runs.resolve())
    session = Session(config, base, sha256, args.runs.resolve(), args.out.resolve(), args.steps_scale)
    if not args.page:
        fixed_questions(session)
        for seed in args.seeds:  # all variants of a seed, so that a stopped comparison has whole seeds
            for name in ordered(args.only):
                result_of(session, name, seed, again=args.again)
    claims_page.write(session.folder, session.out / "docs")
    if session.out == ROOT:
        paper_page.write(ROOT / "benchmarks" / "results", ROOT / "docs")  # shows these results too
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RequestError, RunError) as error:
        print(f"claims: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RequestError) else 1)
