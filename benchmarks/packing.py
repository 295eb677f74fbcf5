"""How full packed batches are on the sample sizes of LLaVA-OneVision's single-image mixture; sizes only, no device.

    python benchmarks/packing.py [--json] [--steps 200] [--out benchmarks/results/packing.json]

In: `benchmarks/lengths.csv` (source, width, height, text tokens of 10,000 samples; 0 x 0 is text only) and the AnyRes
arithmetic of `configs/llava_ov_7b.py`. Out: for each setting the filled share of each limit, the share of the tower's
work spent on padding, and samples per step, for three ways to fill rows: one sample per row (37 tiles each), first come
first served within pools, and `visor_jax.data.packing`. The whole is a pure function of --seed.

With --json the last line is one object: `tower_padding` and `fill` at rows of 8,832 positions, `fill_long` at rows of
32,768, where a fill is that of the limit that is fullest over the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.config import architecture, load_config
from visor_jax.data import anyres
from visor_jax.data.collate import RowShape
from visor_jax.data.packing import PoolShape, fill_pool

ROOT = Path(__file__).resolve().parent
SETTINGS = {  # name -> (shape of a pool, window)
    "8,832": (PoolShape(rows=8, tiles=128, visual=8832, text=4096), 64),
    "8,832, four rows": (PoolShape(rows=4, tiles=66, visual=8832, text=4096), 64),
    "17,664": (PoolShape(rows=4, tiles=128, visual=17_664, text=4096), 64),
    "32,768": (PoolShape(rows=2, tiles=127, visual=32_768, text=8192), 64),
    "32,768, one row": (PoolShape(rows=1, tiles=64, visual=32_768, text=8192), 64),
}
ALONE = RowShape(tiles=37, visual=8832, text=4096)
Fill = Callable[[Sequence[RowShape], PoolShape], list[list[int]]]


def sample_sizes(arch: Architecture) -> list[RowShape]:
    """The size of each sample of `lengths.csv`."""
    sizes = []
    with (ROOT / "lengths.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            width, height, text = int(row["width"]), int(row["height"]), int(row["text_tokens"])
            tiles = anyres.tile_count((height, width), arch) if width else 0
            visual = anyres.visual_token_count((height, width), arch) if width else 0
            sizes.append(RowShape(tiles, visual, text))
    return sizes


def endless(sizes: Sequence[RowShape], seed: int) -> Iterator[RowShape]:
    """The samples in a new order in every epoch."""
    rng = np.random.default_rng(seed)
    while True:
        for index in rng.permutation(len(sizes)):
            yield sizes[index]


def first_come(sizes: Sequence[RowShape], shape: PoolShape) -> list[list[int]]:
    """The packing to beat: samples in order, each into the row that is open, until one does not fit into the last."""
    rows: list[list[int]] = [[] for _ in range(shape.rows)]
    used, tiles, row = RowShape(0, 0, 0), 0, 0
    for index, size in enumerate(sizes):
        while row < shape.rows:
            room = RowShape(shape.tiles - tiles, shape.visual - used.visual, shape.text - used.text)
            if room.holds(size):
                break
            row, used = row + 1, RowShape(0, 0, 0)
        if row == shape.rows:
            break
        rows[row].append(index)
        used, tiles = used + size, tiles + size.tiles
    return rows


def simulate(samples: Iterator[RowShape], shape: PoolShape, window: int, fill: Fill, steps: int) -> dict[str, float]:
    """Filled shares and samples per step of one pool over `steps` steps."""
    waiting: list[tuple[int, RowShape]] = []  # (step in which it was drawn, size)
    total, count, longest = RowShape(0, 0, 0), 0, 0
    for step in range(steps):
        while len(waiting) < window:
            waiting.append((step, next(samples)))
        taken = {index for row in fill([size for _, size in waiting], shape) for index in row}
        total = sum((waiting[index][1] for index in taken), total)
        count += len(taken)
        longest = max([longest, *(step - waiting[index][0] for index in taken)])
        waiting = [pair for index, pair in enumerate(waiting) if index not in taken]
    shares = {
        "tiles": total.tiles / (steps * shape.tiles),
        "visual": total.visual / (steps * shape.rows * shape.visual),
        "text": total.text / (steps * shape.rows * shape.text),
    }
    return {**shares, "fill": max(shares.values()), "samples_per_step": count / steps, "longest_wait": longest}


def one_per_row(sizes: Sequence[RowShape]) -> dict[str, float]:
    """Filled shares where each sample has a row of its own."""
    total = sum(sizes, RowShape(0, 0, 0))
    shares = {name: getattr(total, name) / (len(sizes) * getattr(ALONE, name)) for name in ("tiles", "visual", "text")}
    return {**shares, "fill": max(shares.values()), "samples_per_step": 1.0, "longest_wait": 0}


def unbalanced(sizes: Sequence[RowShape], shape: PoolShape, devices: int, steps: int, seed: int) -> float:
    """What a pod loses where pools are not balanced: 1 - mean / maximum of the tiles that `devices` pools use."""
    samples, used = endless(sizes, seed), np.zeros((devices, steps))
    open_shape = PoolShape(shape.rows, 37 * shape.rows, shape.visual, shape.text)
    for device in range(devices):
        waiting: list[RowShape] = []
        for step in range(steps):
            waiting += [next(samples) for _ in range(64 - len(waiting))]
            taken = {index for row in fill_pool(waiting, open_shape) for index in row}
            used[device, step] = sum(waiting[index].tiles for index in taken)
            waiting = [size for index, size in enumerate(waiting) if index not in taken]
    return float(1 - used.mean() / used.max(axis=0).mean())


def measure(steps: int, seed: int) -> dict[str, Any]:
    sizes = sample_sizes(architecture(load_config(ROOT.parent / "configs" / "llava_ov_7b.py")))
    found: dict[str, Any] = {"steps": steps, "seed": seed, "one sample per row": one_per_row(sizes), "settings": {}}
    for name, (shape, window) in SETTINGS.items():
        row: dict[str, Any] = {"pool": vars(shape), "window": window}
        for way, fill in (("first come", first_come), ("packed", fill_pool)):
            row[way] = simulate(endless(sizes, seed), shape, window, fill, steps)
            row[way]["tower_padding"] = 1 - row[way]["tiles"]
        found["settings"][name] = row
    short, long = found["settings"]["8,832"]["packed"], found["settings"]["32,768"]["packed"]
    shape = SETTINGS["8,832"][0]
    found["lost_without_tile_limit"] = unbalanced(sizes, shape, devices=16, steps=10, seed=seed)
    return {"tower_padding": short["tower_padding"], "fill": short["fill"], "fill_long": long["fill"], **found}


def show(found: dict[str, Any]) -> None:
    print(f"{'rows of':18}{'way':20}{'tiles':>8}{'visual':>8}{'text':>8}{'padding':>9}{'samples/step':>14}{'wait':>6}")
    alone = found["one sample per row"]
    rows = [("8,832", "one sample per row", {**alone, "tower_padding": 1 - alone["tiles"]})]
    rows += [(name, way, row[way]) for name, row in found["settings"].items() for way in ("first come", "packed")]
    for name, way, x in rows:
        print(
            f"{name:18}{way:20}{x['tiles']:8.1%}{x['visual']:8.1%}{x['text']:8.1%}{x['tower_padding']:9.1%}"
            f"{x['samples_per_step']:14.1f}{x['longest_wait']:6.0f}"
        )
    print(
        f"Pools of 8 rows without a limit of tiles: the fullest of 16 devices makes the others wait for"
        f" {found['lost_without_tile_limit']:.1%} of the tower's time."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=200, help="steps of each simulation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    options = parser.parse_args()
    found = measure(options.steps, options.seed)
    assert all(math.isfinite(found[name]) for name in ("tower_padding", "fill", "fill_long"))
    if options.out:
        harness.save(found, options.out)
    print(json.dumps(found)) if options.json else show(found)


if __name__ == "__main__":
    main()
