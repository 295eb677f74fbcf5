"""The machines of a launch: which slices of TPUs and nodes of GPUs can be rented, and in which zones.

In: `v5e:4x4`, `h100x8` or `h100x8:2`. Out: `Machines`. Grids, machine sizes and accelerator types are those of Google's
pages on each TPU version (https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e, .../tpu7x); zones are the union of
its page "TPU regions and zones" as of September 2025 to 2026, with the zones for single tenants.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from visor_jax.errors import RequestError, nearest, short
from visor_jax.scale.topologies import Chip, Topology, parse_topology

_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")  # up to 256 chips
GRIDS: Mapping[str, tuple[str, ...]] = {
    "v4": _CUBES,
    "v5e": _SQUARES,
    "v5p": _CUBES,
    "v6e": _SQUARES,
    "tpu7x": _CUBES,
}
COUNTED_IN_CORES = ("v4", "v5p")  # v5p-32 are 16 chips
ONE_HOST: Mapping[str, int] = {"v5e": 8, "v6e": 8}  # chips of the largest machine that is a slice by itself; others: 4

ZONES: Mapping[str, tuple[str, ...]] = {
    "v4": ("us-central2-b",),
    "v5e": (
        *("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "us-east5-a", "us-east5-b", "us-east5-c"),
        *("europe-west4-b", "asia-southeast1-b"),
    ),
    "v5p": ("us-central1-a", "us-east5-a", "us-east5-b", "us-east5-c", "us-south1-a", "europe-west4-b"),
    "v6e": (
        *("us-central1-b", "us-east1-d", "us-east4-a", "us-east4-b", "us-east5-a", "us-east5-b", "us-east5-c"),
        *("us-west1-c", "us-south1-ai1b", "europe-west4-a", "asia-northeast1-b", "southamerica-west1-a"),
    ),
    "tpu7x": ("us-central1-c", "us-central1-ai1a"),
}


@dataclass(frozen=True)
class Machines:
    """What a launch rents.

    Attributes:
      text: as it was given, such as `v5e:4x4` or `h100x8:2`.
      topology: what `visor plan` computes with: all slices, or the GPUs of all nodes.
      hosts: machines of one slice; for GPUs all nodes.
      chips_per_host: chips of one machine.
    """

    text: str
    topology: Topology
    hosts: int
    chips_per_host: int

    @property
    def chip(self) -> Chip:
        return self.topology.chip

    @property
    def kind(self) -> str:
        """Returns "tpu" or "gpu"."""
        return self.chip.kind

    @property
    def grid(self) -> str:
        """Returns the grid of one slice, such as 4x4; the number of GPUs for those."""
        return "x".join(map(str, self.topology.shape))

    @property
    def slices(self) -> int:
        """Returns the slices of TPUs, which the data center's network joins; 1 for GPUs."""
        return self.topology.slices

    @property
    def slice_chips(self) -> int:
        """Returns the chips of one slice; for GPUs of all nodes."""
        return self.hosts * self.chips_per_host

    @property
    def chips(self) -> int:
        """Returns the chips of all slices."""
        return self.topology.chips

    @property
    def processes(self) -> int:
        """Returns the processes of the run: one per TPU machine, one per GPU."""
        return self.hosts * self.slices if self.kind == "tpu" else self.chips


def parse_machines(text: str, slices: int = 1) -> Machines:
    """Returns the machines of a topology.

    Args:
      text: `v5e:4x4` (a grid of TPU chips), `h100x8` (GPUs), or `h100x8:2` (GPUs of a node, and nodes).
      slices: slices of TPUs.

    Raises:
      RequestError: an unknown chip, or a grid or a node that cannot be rented; names the nearest ones.
    """
    if not text.isprintable() or not text.isascii() or len(text) > 40:
        raise RequestError(f"--topology={short(text)}: expected CHIP:AxB[xC], such as v5e:4x4, or h100x8:2")
    _refuse_accelerator_type(text)
    topology = parse_topology(text, slices)
    if topology.chip.kind == "gpu":
        return _nodes(text, topology)
    grid, chip, chips = text.partition(":")[2], topology.chip, topology.chips // topology.slices
    if grid not in GRIDS[chip.name]:
        raise RequestError(f"--topology={text}: no such slice of {chip.name}; {_nearest_grids(chip.name, chips)}")
    per_host = min(chips, chip.chips_per_host)
    if chips <= ONE_HOST.get(chip.name, chip.chips_per_host):
        per_host = chips
    return Machines(text, topology, chips // per_host, per_host)


def _refuse_accelerator_type(text: str) -> None:
    """Raises:
    RequestError: gcloud's name of a slice, such as v5litepod-16 or v5p-32; names the topology that it is.
    """
    match = re.fullmatch(r"(v4|v5litepod|v5e|v5p|v6e)-(\d{1,4})", text)
    if match is None:
        return
    chip = "v5e" if match[1] == "v5litepod" else match[1]
    chips = int(match[2]) // (2 if chip in COUNTED_IN_CORES else 1)
    grids = [f"{chip}:{grid}" for grid in GRIDS[chip] if math.prod(map(int, grid.split("x"))) == chips]
    hint = f"did you mean {grids[0]}?" if grids else _nearest_grids(chip, max(chips, 1))
    raise RequestError(f"--topology={text}: is gcloud's name of a slice, expected its grid; {hint}")


def _nodes(text: str, topology: Topology) -> Machines:
    """Returns nodes of GPUs; `h100x16` are two nodes, like `h100x8:2`."""
    chip, full = topology.chip.name, topology.chip.chips_per_host
    count, _, nodes = text.removeprefix(f"{chip}x").partition(":")
    number = int(nodes) if nodes else max(1, int(count) // full)
    per_node = topology.chips // number
    if per_node * number != topology.chips or not (per_node == full or (number == 1 and per_node in (1, 2, 4))):
        whole = f"{chip}x{full}"
        raise RequestError(
            f"--topology={text}: expected whole nodes, {whole} or {whole}:NODES, or a part of one, {chip}x1, x2 or x4"
        )
    return Machines(text, topology, number, per_node)


def _nearest_grids(chip: str, chips: int) -> str:
    """Names the two slices whose numbers of chips are nearest."""

    def distance(grid: str) -> float:
        return abs(math.log(math.prod(map(int, grid.split("x"))) / chips))

    close = sorted(GRIDS[chip], key=distance)[:2]
    return f"the nearest are {' and '.join(f'{chip}:{grid}' for grid in close)}"


def check_zone_of(chip: str, zone: str) -> None:
    """Raises:
    RequestError: Google has no such TPUs in this zone; names the nearest zones that have them.
    """
    zones = ZONES.get(chip, ())
    if zones and zone not in zones:
        hint = nearest(zone, zones)
        region = [name for name in zones if name.split("-")[0] == zone.split("-")[0]]
        named = hint or f"nearest: {', '.join(region or zones)}"
        raise RequestError(f"--zone={zone}: has no {chip}; {named}; {chip} is in {', '.join(zones)}")
