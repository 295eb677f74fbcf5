"""Run a configuration on machines elsewhere: Cloud TPU VMs, GKE, a Slurm cluster, or SkyPilot.

`visor launch --target=tpu --name=first --topology=v5e:4x4 --zone=us-west4-a --config=CONFIG
--workdir=gs://BUCKET/first` creates the machines, waits for them, copies the package and the configuration, and starts
`visor run` there. ACTION is one of

  up (default)  create, wait, copy, run; whatever exists already is kept
  logs          what the run has printed; --follow continues
  status        the machines and the run
  stop          SIGTERM: the run saves and ends with 143
  resume        create again what was preempted, and continue from the last checkpoint
  delete        remove everything except the workdir

`--dry-run` prints the exact commands and files as a shell script, and runs nothing: it needs no client, no credentials
and no network. A job that cannot fit its topology by formula is refused before anything is created; `--force` skips
that check only. Values of secrets are never given here: `--secret=HF_TOKEN` names one that the target stores; for
Slurm and SkyPilot, one of this shell. Tokenizer and records must lie where the machines see them. docs/launch.md.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from visor_jax.config import Config

HELP = "run a configuration on Cloud TPU, GKE, Slurm or SkyPilot"
CONFIG = "given"
ACTIONS = ("up", "logs", "status", "stop", "resume", "delete")
STARTS = ("up", "resume")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("action", nargs="?", default="up", metavar="ACTION", help=f"{', '.join(ACTIONS)} (default: up)")
    parser.add_argument("--target", required=True, help="tpu (queued resources), gke, slurm or sky")
    parser.add_argument("--name", required=True, help="of the run and of everything that is created for it")
    parser.add_argument("--topology", default="", metavar="CHIPS", help="v5e:4x4, v5p:4x4x4, h100x8, or h100x8:2 nodes")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices of TPUs (Multislice)")
    parser.add_argument("--zone", default="", help="Google Cloud's zone, such as us-east5-b")
    parser.add_argument("--project", default="", help="Google Cloud's project (default: the client's)")
    parser.add_argument("--capacity", default="on-demand", metavar="KIND", help="on-demand, spot, reserved, flex-start")
    parser.add_argument("--image", default="", help="container image, for targets that run one")
    parser.add_argument("--service-account", default="", metavar="ADDRESS", help="of the machines")
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME", help="a stored secret, by name; repeat"
    )
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="of what is created; repeat")
    parser.add_argument("--bucket", action="append", default=[], metavar="NAME", help="mounted at /gcs/NAME; repeat")
    parser.add_argument("--reservation", default="", metavar="NAME", help="gke: of --capacity=reserved")
    parser.add_argument("--cluster", default="", metavar="CONTEXT", help="gke: a context of kubectl (default: its own)")
    parser.add_argument("--queue", default="", help="Kueue's queue, or Slurm's partition")
    parser.add_argument("--max-restarts", type=int, default=50, metavar="N", help="after exit status 143 or 134")
    parser.add_argument("--grace-seconds", type=int, default=300, metavar="N", help="between SIGTERM and SIGKILL")
    parser.add_argument(
        "--max-hours", type=int, default=24, metavar="N", help="tpu: to wait for machines; of flex-start"
    )
    parser.add_argument("--follow", action="store_true", help="logs: continue until interrupted")
    parser.add_argument("--dry-run", action="store_true", help="print commands and files, and run nothing")
    parser.add_argument("--force", action="store_true", help="do not check whether the run fits the topology")


def main(args: argparse.Namespace, config: Config | None) -> dict[str, Any]:
    """Carries the action out, or prints its commands; returns what the target reports."""
    from visor_jax.config import to_json
    from visor_jax.errors import RequestError
    from visor_jax.launching.description import describe
    from visor_jax.launching.names import check_choice
    from visor_jax.launching.steps import Runner

    action = check_choice("ACTION", args.action, ACTIONS)
    if args.follow and action != "logs":
        raise RequestError(f"--follow: not for {action}; expected with 'visor launch logs'")
    launch = describe(
        args.target,
        args.name,
        args.topology,
        slices=args.slices,
        zone=args.zone,
        project=args.project,
        config=args.config or "",
        config_json=to_json(config) + "\n" if config is not None else "",
        overrides=args.overrides,
        workdir=args.workdir or "",
        capacity=args.capacity,
        image=args.image,
        service_account=args.service_account,
        secrets=args.secret,
        labels=args.label,
        buckets=args.bucket,
        reservation=args.reservation,
        cluster=args.cluster,
        queue=args.queue,
        max_restarts=args.max_restarts,
        grace_seconds=args.grace_seconds,
        max_hours=args.max_hours,
        follow=args.follow,
        force=args.force,
    )
    target = importlib.import_module(f"visor_jax.launching.{launch.target}")
    target.check(launch)
    runner = Runner(launch.name, dry_run=args.dry_run)
    if action in STARTS:
        check_request(launch, config, runner)
    try:
        found = target.ACTIONS[action](launch, runner)
    except KeyboardInterrupt:
        if action in STARTS and runner.shown:
            runner.say(f"{launch.name}: interrupted; what was asked for stays, and 'visor launch delete' removes it")
        raise
    result = {"name": launch.name, "target": launch.target, "action": action, **found}
    if args.dry_run:
        return {**result, "dry_run": True, "commands": runner.shown, "files": runner.files}
    return result


def check_request(launch: Any, config: Config | None, runner: Any) -> None:
    """Checks what only an action that starts the run needs: a configuration, a workdir, and whether it fits.

    Raises:
      RequestError: something is missing, or the run cannot fit its chips.
    """
    from visor_jax.errors import RequestError
    from visor_jax.launching.paths import check_paths
    from visor_jax.planning.fits import fit_by_formula
    from visor_jax.planning.plan import planned_stages

    if config is None:
        raise RequestError("launch: --config is missing; expected a configuration's file or shipped name")
    if not launch.workdir:
        raise RequestError("launch: --workdir is missing; expected --workdir=gs://BUCKET/PATH or an absolute path")
    machines = launch.machines
    check_paths(launch, config)
    if launch.force or not planned_stages(config):
        return
    fit = fit_by_formula(config, machines.topology)
    if not fit.fits:
        raise RequestError(f"--topology={machines.text}: {fit}; take more chips, see 'visor plan --search', or --force")
    runner.say(f"{machines.topology.label}: {fit}")
