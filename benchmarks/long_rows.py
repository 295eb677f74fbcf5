"""Whether long rows have to be split over chips (sequence parallelism): bytes and time of one row per chip, by formula.

    python benchmarks/long_rows.py [--json]

In: the shipped configurations on their topologies, one row of 8,832 visual positions, 1,024 text positions and up to
37 tiles per chip, the smallest batch without splitting a row; the formulas of `visor plan` (`visor_jax.planning`), in
the costliest stage, `full`. Out: bytes of one chip, what of them is this row's, the time of a step, and what a split of
rows over four chips would change: the row's bytes, and the time to exchange keys and values. Nothing was run on
hardware.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from visor_jax.config import apply_overrides, architecture, load_config
from visor_jax.planning.memory import chip_bytes
from visor_jax.planning.roofline import estimate
from visor_jax.planning.workload import decoder_shape, mesh_of, workload
from visor_jax.scale.topologies import GIB, parse_topology

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SPLIT = 4
STAGE = "full"
# Gathers of keys and values in a joint layer: forward, again in the recomputed forward, and their gradients' sum.
EXCHANGES = 3


class Case(NamedTuple):
    """A configuration, a topology, and overrides of its mesh."""

    config: str
    topology: str
    mesh: tuple[str, ...] = ()


CASES = (
    Case("llava_ov_0p5b", "v5e:4x4"),
    Case("llava_ov_1p5b", "v6e:4x4"),
    Case("llava_ov_7b", "v5p:4x4x4"),
    Case("llava_ov_7b", "v5e:16x16", ("mesh.replica=2", "mesh.fsdp=128")),
    Case("llava_ov_7b", "v5e:16x16", ("mesh.fsdp=64", "mesh.tensor=4")),
)


def figures(case: Case) -> dict[str, Any]:
    """Returns the figures of a case with one row per chip, or per `tensor` chips."""
    topology = parse_topology(case.topology)
    plain = ("data.pack_window=0", "data.pool_rows=1", "data.pool_tiles=0", "train.accumulate=1")
    plain += ("data.visual_length=8832", "data.text_length=1024", "train.tower_remat=full")  # the largest sample
    plain += ("train.remat=full", "data.batch_size=256", "evaluate.batch_size=256", *case.mesh)
    config = load_config(CONFIGS / f"{case.config}.py", [f"--config.{line}" for line in plain])
    ways = mesh_of(config, topology).row_ways
    single, double = (apply_overrides(config, [f"--config.data.batch_size={rows * ways}"]) for rows in (1, 2))
    work = workload(single, STAGE, topology)
    total = sum(chip_bytes(single, STAGE, topology, work).values())
    row = sum(chip_bytes(double, STAGE, topology, workload(double, STAGE, topology)).values()) - total
    mesh, arch = mesh_of(single, topology), architecture(single, STAGE)
    joint = sum(place.kind == "self" for place in arch.layers)
    positions = config.data.visual_length + config.data.text_length
    exchanged = EXCHANGES * joint * positions * 2 * 2 * decoder_shape(arch).kv_width / mesh.tensor
    return {
        "config": case.config,
        "topology": case.topology,
        "mesh": mesh.sizes,
        "gib_available": topology.chip.hbm_bytes / GIB,
        "gib": total / GIB,
        "gib_of_the_row": row / GIB,
        "seconds": estimate(work.ops, work.collectives, topology).seconds,
        "gib_if_split": (total - row + row / SPLIT) / GIB,
        "seconds_to_exchange": exchanged / topology.gather_bandwidth(SPLIT),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the figures as a table in Markdown."""
    lines = [
        "| model, topology (replica x fsdp x tensor) | GiB available | GiB with one row | of it the row's | step |"
        " GiB if four chips split the row | exchange of keys and values |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in rows:
        sizes = " x ".join(str(size) for size in x["mesh"].values())
        lines.append(
            f"| {x['config'].removeprefix('llava_ov_')}, {x['topology']} ({sizes}) | {x['gib_available']:.1f} |"
            f" {x['gib']:.1f} | {x['gib_of_the_row']:.1f} | {x['seconds']:.2f} s | {x['gib_if_split']:.1f} |"
            f" {1000 * x['seconds_to_exchange']:.1f} ms |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    args = parser.parse_args(arguments)
    rows = [figures(case) for case in CASES]
    print(table(rows))
    if args.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
