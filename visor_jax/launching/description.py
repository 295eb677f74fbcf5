"""What a launch is: one checked description, from which every target's commands and manifests are made.

`describe` takes what the user typed and returns a `Launch`, or raises a RequestError that names the flag. Whatever
holds a `Launch` may rely on its fields: they have passed `names.py` and `machines.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from visor_jax.errors import RequestError, short
from visor_jax.launching import names
from visor_jax.launching.machines import ZONES, Machines, check_zone_of, parse_machines

TARGETS = ("tpu", "gke", "slurm", "sky")
CAPACITIES = ("on-demand", "spot", "reserved", "flex-start")
MOUNTS = "/gcs"  # where buckets are mounted, read-only
NOT_OFFERED = (("tpu", "tpu7x"),)  # whatever the zone; the target's own check says so
GRACE_SECONDS = 300  # between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Launch:
    """One run on machines elsewhere.

    Attributes:
      target: one of `TARGETS`.
      name: of the run and of everything that is created for it.
      rented: the machines; None where the action does not need them (see `machines`).
      zone, project: of Google Cloud; empty where they are not given.
      config: a configuration's file or shipped name, as it was given; empty where the action starts nothing.
      config_json: the resolved configuration with all overrides.
      overrides: as they were given, such as `--config.train.steps=9`.
      workdir: `gs://BUCKET/PATH` or an absolute path on the machines.
      capacity: one of `CAPACITIES`.
      image: container image, if the target runs one.
      service_account: address of the service account of the machines.
      secrets: names only. The run gets each as a variable of the same name.
      labels: key and value.
      buckets: names of buckets that each machine mounts read-only at `/gcs/NAME`.
      reservation: name of the reservation that GKE's nodes use, with capacity `reserved`.
      cluster: context of kubectl; empty: the current one.
      queue: Kueue's queue, or Slurm's partition.
      max_restarts: how often a run that ended with 143 or 134 is started again without anybody asking.
      grace_seconds: from SIGTERM to SIGKILL, in which the run saves.
      max_hours: after which a request that still waits expires, and a flex-start run ends.
      follow: `logs` continues until it is interrupted.
      force: the plan was not asked whether the run fits.
    """

    target: str
    name: str
    rented: Machines | None = None
    zone: str = ""
    project: str = ""
    config: str = ""
    config_json: str = field(default="", repr=False)
    overrides: tuple[str, ...] = ()
    workdir: str = ""
    capacity: str = "on-demand"
    image: str = ""
    service_account: str = ""
    secrets: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    buckets: tuple[str, ...] = ()
    reservation: str = ""
    cluster: str = ""
    queue: str = ""
    max_restarts: int = 50
    grace_seconds: int = GRACE_SECONDS
    max_hours: int = 24
    follow: bool = False
    force: bool = False

    @property
    def machines(self) -> Machines:
        """Returns the machines.

        Raises:
          RequestError: --topology was not given.
        """
        if self.rented is None:
            raise RequestError("--topology is missing; expected for instance --topology=v5e:4x4 or --topology=h100x8")
        return self.rented

    @property
    def config_shipped(self) -> bool:
        """Returns whether the configuration is one that every installation of this package has, by its name."""
        return re.fullmatch(r"\w+", self.config) is not None  # an argument may name a folder, which nothing else has

    @property
    def in_bucket(self) -> bool:
        """Returns whether the run's folder is in a bucket."""
        return self.workdir.startswith("gs://")


def describe(
    target: str,
    name: str,
    topology: str = "",
    *,
    slices: int = 1,
    zone: str = "",
    project: str = "",
    config: str = "",
    config_json: str = "",
    overrides: Sequence[str] = (),
    workdir: str = "",
    capacity: str = "on-demand",
    image: str = "",
    service_account: str = "",
    secrets: Sequence[str] = (),
    labels: Sequence[str] = (),
    buckets: Sequence[str] = (),
    reservation: str = "",
    cluster: str = "",
    queue: str = "",
    max_restarts: int = 50,
    grace_seconds: int = GRACE_SECONDS,
    max_hours: int = 24,
    follow: bool = False,
    force: bool = False,
) -> Launch:
    """Returns the checked description; see `Launch`. Empty values mean "not given".

    Raises:
      RequestError: a name, zone, topology or number that cannot be; names the flag and the nearest valid values.
    """
    names.check_choice("--target", target, TARGETS)
    secrets = tuple(names.check_secret(secret) for secret in secrets)  # first: a message must not repeat a value
    texts = (name, topology, zone, project, config, *overrides, workdir, capacity, image, service_account, *labels)
    for argument in (*texts, *buckets, reservation, cluster, queue):
        names.check_no_key(argument)
    rented = parse_machines(topology, slices) if topology else None
    if zone:
        names.check_zone(zone, ZONES.get(rented.chip.name, ()) if rented is not None else ())
        if rented is not None and rented.kind == "tpu" and (target, rented.chip.name) not in NOT_OFFERED:
            check_zone_of(rented.chip.name, zone)
    if reservation and (target, capacity) != ("gke", "reserved"):
        raise RequestError("--reservation: expected with --target=gke and --capacity=reserved only")
    for override in overrides:
        if "\0" in override:
            raise RequestError(f"{short(override)}: expected no NUL character")
    return Launch(
        target=target,
        name=names.check_name(name),
        rented=rented,
        zone=zone,
        project=names.check_project(project) if project else "",
        config=config,
        config_json=config_json,
        overrides=tuple(overrides),
        workdir=names.check_workdir(workdir) if workdir else "",
        capacity=names.check_choice("--capacity", capacity, CAPACITIES),
        image=names.check_image(image) if image else "",
        service_account=names.check_service_account(service_account) if service_account else "",
        secrets=tuple(dict.fromkeys(secrets)),  # one given twice is one
        labels=tuple(dict(names.check_label(label) for label in labels).items()),
        buckets=tuple(dict.fromkeys(names.check_bucket(bucket) for bucket in buckets)),
        reservation=names.check_word("--reservation", reservation) if reservation else "",
        cluster=names.check_context(cluster) if cluster else "",
        queue=names.check_word("--queue", queue) if queue else "",
        max_restarts=_between("--max-restarts", max_restarts, 0, 10_000),
        grace_seconds=_between("--grace-seconds", grace_seconds, 30, 3600),
        max_hours=_between("--max-hours", max_hours, 1, 168),
        follow=follow,
        force=force,
    )


def visor_argv(launch: Launch, config_file: str, program: str = "visor") -> tuple[str, ...]:
    """Returns the command that every process of the run executes.

    Args:
      launch: the description.
      config_file: where the machine has the resolved configuration, if it has to travel (`travels`).
      program: the command on the machine.
    """
    if travels(launch):
        return (program, "run", f"--config={config_file}", f"--workdir={launch.workdir}")
    return (program, "run", f"--config={launch.config}", f"--workdir={launch.workdir}", *launch.overrides)


def travels(launch: Launch) -> bool:
    """Returns whether the resolved configuration has to be put on the machines.

    A shipped one does not, where the machines have this package already: its name and the overrides are enough.
    """
    return launch.target == "tpu" or not launch.config_shipped


def _between(flag: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise RequestError(f"{flag}={value}: expected {least} to {most}")
    return value
