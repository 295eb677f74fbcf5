"""Accelerators by name: what one chip can do, and how many chips a topology such as `v5e:4x4` or `h100x8` has.

Figures are those that the vendors publish; nothing here was measured. No JAX import.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from visor_jax.errors import RequestError, nearest

GB, GIB = 10**9, 2**30
MAX_CHIPS = 256  # of one slice
MAX_SLICES = 256


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      name: as topologies spell it.
      flops: peak bfloat16 FLOP/s.
      hbm_bytes: memory that a program may use, of one chip.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s in one direction of one link between chips (all NVLinks of a GPU together).
      axes: dimensions of a slice's grid; each gives a chip two links. 0: a switch joins the chips of a host.
      chips_per_host: of slices of several hosts.
      network_bandwidth: bytes/s of one chip's share of its host's network (of a slice's, by which slices are joined).
      cores: JAX devices of one chip.
      matrix_unit: side of the matrix unit; dimensions of products are padded to its multiples. 1: no padding.
      kind: "tpu" or "gpu".
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    axes: int
    chips_per_host: int
    network_bandwidth: float
    cores: int = 1
    matrix_unit: int = 128
    kind: str = "tpu"


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB - GIB // 4, 1228 * GB, 50 * GB, 3, 4, 6.25 * GB),
        Chip("v5e", 197e12, 16 * GIB - GIB // 4, 819 * GB, 50 * GB, 2, 4, 3.125 * GB),
        Chip("v5p", 459e12, 95 * GIB + 3 * GIB // 4, 2765 * GB, 100 * GB, 3, 4, 6.25 * GB),
        Chip("v6e", 918e12, 32 * GIB - GIB // 4, 1640 * GB, 100 * GB, 2, 4, 12.5 * GB, matrix_unit=256),
        Chip("tpu7x", 2307e12, 192 * GIB - GIB // 2, 7380 * GB, 100 * GB, 3, 4, 12.5 * GB, cores=2, matrix_unit=256),
        Chip("h100", 989e12, 80 * GB, 3350 * GB, 450 * GB, 0, 8, 50 * GB, matrix_unit=1, kind="gpu"),
        Chip("h200", 989e12, 141 * GB, 4800 * GB, 450 * GB, 0, 8, 50 * GB, matrix_unit=1, kind="gpu"),
    )
}


@dataclass(frozen=True)
class Topology:
    """Chips that train together: slices of TPUs, or GPUs in hosts.

    Attributes:
      name: as it was given.
      chip: their kind.
      shape: chips along each axis of a slice's grid; one number for GPUs.
      slices: of TPUs, joined by the data center's network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def label(self) -> str:
        """The topology as messages name it: with the number of slices if there are several."""
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name

    @property
    def flags(self) -> str:
        """The topology as the command line spells it."""
        return f"--topology={self.name}" + (f" --slices={self.slices}" if self.slices > 1 else "")

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.cores

    @property
    def hosts(self) -> int:
        return -(-math.prod(self.shape) // self.chip.chips_per_host) * self.slices

    def spans_three_axes(self, ways: int) -> bool:
        """Returns whether `ways` chips of a slice need all three axes of a v4's or v5p's grid.

        XLA:TPU (libtpu 0.0.42) then gathers by all-reduces that nothing overlaps, as programs compiled for 4 x 4 x 4
        show; those for 2 x 2 x 4 gather.
        """
        return (
            self.chip.name in ("v4", "v5p") and ways > math.prod(self.shape) // min(self.shape) and min(self.shape) > 2
        )

    def gather_bandwidth(self, ways: int) -> float:
        """Returns the bytes/s at which each chip receives, while `ways` chips exchange their parts in a ring per axis.

        A TPU uses both links of every axis that has more than two chips, and one of an axis of two; a GPU uses
        NVLink within a host, and the network as soon as several hosts take part.
        """
        chip = self.chip
        if chip.axes == 0:
            return chip.link_bandwidth if ways <= chip.chips_per_host else chip.network_bandwidth
        links, left = 0, ways
        for size in sorted(self.shape, reverse=True):
            if left > 1 and size > 1:
                links += 2 if size > 2 else 1
                left = -(-left // size)
        return max(links, 1) * chip.link_bandwidth


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Returns the topology that is written `v5e:4x4`, `v5p:4x4x4`, `h100x8` or `h100x8:2` (two nodes of eight).

    Args:
      slices: of TPUs; each has this shape.

    Raises:
      RequestError: an unknown chip, a grid of the wrong number of axes, more than 256 chips of one slice, or several
        slices of GPUs.
    """
    match = re.fullmatch(r"([a-z]+[0-9]+[a-z]?)(?::((?:\d+x)+\d+)|x(\d+)(?::(\d+))?)", name)
    if match is None:
        raise _wrong(name, f"expected CHIP:AxB[xC], such as v5e:4x4, or h100x8; known are {', '.join(CHIPS)}")
    if match[1] not in CHIPS:
        hint = nearest(match[1], CHIPS)
        raise _wrong(name, f"unknown chip {match[1]!r}; known are {', '.join(CHIPS)}" + (f"; {hint}" if hint else ""))
    chip = CHIPS[match[1]]
    shape = tuple(int(size) for size in (match[2] or match[3]).split("x"))
    if len(shape) != (chip.axes or 1) or bool(chip.axes) != bool(match[2]):
        example = f"{chip.name}:{'x'.join('4' * chip.axes)}" if chip.axes else f"{chip.name}x8"
        raise _wrong(name, f"expected {f'{chip.axes} axes' if chip.axes else 'a count'}, such as {example}")
    if match[4]:
        shape = (shape[0] * int(match[4]),)
    if not 1 <= math.prod(shape) <= MAX_CHIPS:
        raise _wrong(name, f"expected 1 to {MAX_CHIPS} chips")
    if not 1 <= slices <= (MAX_SLICES if chip.axes else 1):
        expected = (
            f"expected 1 to {MAX_SLICES}" if chip.axes else f"{name} has no slices; write nodes as {chip.name}x8:2"
        )
        raise RequestError(f"--slices={slices}: {expected}")
    return Topology(name, chip, shape, slices)


def _wrong(name: str, expected: str) -> RequestError:
    return RequestError(f"--topology={name}: {expected}")
