"""Collectives of a compiled program, by kind and bytes, read from its text.

A collective in the body of a loop counts once per iteration; of the branches of a conditional, the one with more bytes
counts. No JAX import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}  # others end in their bits: s32, u8

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_CALLS = re.compile(r"(?:calls|to_apply|async_computation)=%?([\w.\-]+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count[^}]*?"n":"?(\d+)')


@dataclass
class Traffic:
    """Collectives of one run of a computation.

    Attributes:
      counts, bytes: by kind; bytes of the results on one device.
      waiting: bytes of those during which the device computes nothing: neither asynchronous nor part of a fusion.
        An all-reduce counts twice, as a scatter and a gather.
      unknown_loops: loops whose number of iterations is not in the text; they count once.
    """

    counts: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    waiting: float = 0.0
    unknown_loops: int = 0

    def add(self, other: Traffic, times: float = 1) -> None:
        for kind in other.counts:
            self.counts[kind] = self.counts.get(kind, 0) + times * other.counts[kind]
            self.bytes[kind] = self.bytes.get(kind, 0) + times * other.bytes[kind]
        self.waiting += times * other.waiting
        self.unknown_loops += other.unknown_loops

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


def collectives(text: str) -> Traffic:
    """Returns the collectives of a compiled program on one device, from `compiled.as_text()`."""
    bodies = dict(_computations(text))
    entry = next((name for name, lines in bodies.items() if lines and lines[0].startswith("ENTRY")), None)
    return _traffic(entry, bodies, {}) if entry else Traffic()


def traffic_of(text: str) -> dict[str, Any]:
    """Returns the collectives of a compiled program as plans keep them: by kind, and bytes that the device awaits."""
    found = collectives(text)
    kinds = {kind: {"count": found.counts[kind], "bytes": found.bytes[kind]} for kind in found.bytes}
    return {"collectives": kinds, "waiting": found.waiting, "unknown_loops": found.unknown_loops}


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, lines) of each computation."""
    name, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name, lines = match[1], [line]
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _traffic(name: str, bodies: Mapping[str, list[str]], done: dict[str, Traffic]) -> Traffic:
    if name not in done:
        total, channels = Traffic(), set()
        done[name] = total  # computations do not call themselves
        for line, fused in _flat(name, bodies):
            if match := _OPERATION.search(line):
                channel = re.search(r"channel_id=(\d+)", line)
                # A collective that is spread over several fusions appears in each of them, with the same channel.
                if channel is None or channel[1] not in channels:
                    channels.add(channel[1] if channel else None)
                    size = float(_result_bytes(match[1], match[2], started=bool(match[3])))
                    waiting = 0.0 if match[3] or fused else size * (2 if match[2] == "all-reduce" else 1)
                    total.add(Traffic({match[2]: 1}, {match[2]: size}, waiting))
            elif loop := _LOOP.search(line):
                trips = _iterations(line, bodies.get(loop[1], []))
                total.unknown_loops += trips is None
                total.add(_traffic(loop[2], bodies, done), trips or 1)
            elif branches := _BRANCHES.search(line):
                names = re.findall(r"[\w.\-]+", branches[1]) if branches[1] else [branches[2], branches[3]]
                total.add(max((_traffic(branch, bodies, done) for branch in names), key=lambda x: x.total))
    return done[name]


def _flat(name: str, bodies: Mapping[str, list[str]], *, fused: bool = False) -> Iterator[tuple[str, bool]]:
    """Yields the lines of a computation and of those that it calls once, and whether they belong to a fusion."""
    for line in bodies.get(name, [])[1:]:
        yield line, fused
        for called in _CALLS.findall(line):
            yield from _flat(called, bodies, fused=fused or " fusion(" in line or "async" in line)


def _iterations(line: str, condition: list[str]) -> int | None:
    """Returns the number of iterations of a loop that counts up from 0; None if the text does not say it."""
    if match := _TRIP_COUNT.search(line):
        return int(match[1])
    limits = re.findall(r" constant\((\d+)\)", "\n".join(condition))
    counts_up = any("direction=LT" in x for x in condition)
    return int(limits[0]) if counts_up and len(limits) == 1 else None


def _result_bytes(result: str, kind: str, *, started: bool) -> int:
    """Returns the bytes of a result such as `bf16[8,896]{1,0}` or of a tuple of them.

    The result of an asynchronous start holds operands, then results: only the larger half counts, which is the result
    of a gather and the operand of a scatter.
    """
    sizes = [_bytes(*match) for match in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result) if match[1]]
    if started and kind != "all-reduce" and len(sizes) > 1:
        half = len(sizes) // 2
        return max(sum(sizes[:half]), sum(sizes[half:]))
    return sum(sizes)


def _bytes(dtype: str, shape: str) -> int:
    count = 1
    for size in shape.split(","):
        count *= int(size)
    bits = re.search(r"\d+", dtype)
    return count * WIDTHS.get(dtype, max(int(bits[0]) // 8, 1) if bits else 1)
