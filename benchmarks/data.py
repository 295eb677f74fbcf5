"""How fast the input pipeline feeds: samples and tiles per second by source and workers, and what a pod needs.

    python benchmarks/data.py [--samples 64] [--steps 4] [--rounds 3] [--workers 0 1 2] [--json] [--out FILE]

In: pictures of the sizes in `benchmarks/lengths.csv`, drawn as JPEG files into a temporary folder, and the tiles of
`configs/llava_ov_7b.py`. Out: the rate of reading, decoding, tiling and tokenizing alone on one core; the rate of
packed batches by source and number of worker processes (contenders take turns; median and quartiles); and by
arithmetic the rate that one host of a v5e-256 must reach so that no chip waits, with the verdict. Rates depend on the
machine; the arithmetic does not.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from visor_jax.architecture import Architecture
from visor_jax.config import architecture, load_config
from visor_jax.cost import decoder_flops, dense_decoder_flops, tower_flops
from visor_jax.data.collate import Example, RowShape
from visor_jax.data.media import EmbeddedPicture
from visor_jax.data.packing import PoolShape
from visor_jax.data.pipeline import ExampleStream
from visor_jax.data.pools import PoolSettings, make_packed_pipeline
from visor_jax.data.records import parse_record
from visor_jax.data.sample import Part, Sample, Sheet, Source
from visor_jax.data.sheets import encode_record
from visor_jax.data.sources import named_kind
from visor_jax.data.sources.array_record import write_array_record
from visor_jax.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent
POOL = PoolShape(rows=4, tiles=66, visual=8832, text=4096)
MEAN_VISUAL, MEAN_TILES, MEAN_TEXT = 3140, 6.287, 287  # of lengths.csv
# A v5e-256 has 64 hosts of 4 chips, 197 bfloat16 TFLOP/s each, and 112 virtual CPUs per host.
CHIPS_PER_HOST, CHIP_FLOPS, HOST_CPUS = 4, 197e12, 112


def draw_pictures(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Draws pictures of the mixture's sizes and returns LLaVA records about them; some records are text only."""
    with (ROOT / "lengths.csv").open(encoding="utf-8", newline="") as file:
        rows = random.Random(seed).sample(list(csv.DictReader(file)), count)
    rng, records = np.random.default_rng(seed), []
    for index, row in enumerate(rows):
        width, height = int(row["width"]), int(row["height"])
        text = " ".join(rng.choice(["red", "of", "page", "7", "left"], int(row["text_tokens"]) // 2 + 1))
        record: dict[str, Any] = {"id": f"{index:06d}"}
        question = text
        if width:
            small = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(folder / f"{index:06d}.jpg", quality=90)
            record["image"], question = f"{index:06d}.jpg", f"<image>\n{text}"
        record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
        records.append(record)
    return records


def llava(folder: Path, records: list[dict[str, Any]]) -> dict[str, str]:
    (folder / "set.json").write_text(json.dumps(records), encoding="utf-8")
    return {"source": "llava", "path": "set.json"}


def messages(folder: Path, records: list[dict[str, Any]]) -> dict[str, str]:
    """The layout of ms-swift and TRL: `messages` and `images`."""
    roles = {"human": "user", "gpt": "assistant"}
    lines = [
        {
            "messages": [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]],
            "images": [record["image"]] if "image" in record else [],
        }
        for record in records
    ]
    (folder / "messages.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return {"source": "messages", "path": "messages.jsonl"}


def parquet(folder: Path, records: list[dict[str, Any]]) -> dict[str, str]:
    """The columns of lmms-lab/LLaVA-OneVision-Data, with the pictures' bytes inside."""
    rows = []
    for record in records:
        name = record.get("image")
        image = {"bytes": (folder / name).read_bytes(), "path": name} if name else None
        rows.append({"id": record["id"], "image": image, "conversations": record["conversations"], "data_source": ""})
    pq.write_table(pa.Table.from_pylist(rows), folder / "set.parquet", row_group_size=100)
    return {"source": "parquet", "path": "set.parquet"}


def array_record(folder: Path, records: list[dict[str, Any]]) -> dict[str, str]:
    parsed = [parse_record(record, number) for number, record in enumerate(records)]
    names = [[str(name) for name in record.pictures] for record in parsed]
    inside = [
        replace(record, pictures=tuple(EmbeddedPicture((folder / name).read_bytes(), name) for name in record_names))
        for record, record_names in zip(parsed, names, strict=True)
    ]
    write_array_record(folder / "set.array_record", zip(inside, names, strict=True))
    return {"source": "array_record", "path": "set.array_record"}


# source -> writes the records into a folder and returns the fields of `config.data` that read them
WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], dict[str, str]]] = {
    "llava": llava,
    "messages": messages,
    "parquet": parquet,
    "array_record": array_record,
}


def open_source(folder: Path, fields: dict[str, str]) -> Source:
    given = [f"data.{name}={value}" for name, value in {**fields, "root": str(folder), "test_fraction": "0.0"}.items()]
    config = load_config(ROOT.parent / "configs" / "llava_ov_7b.py", given)
    return named_kind(fields["source"]).open(config, "train")


def encoder(arch: Architecture) -> Callable[[Sample | Sheet], Example]:
    limits = RowShape(37, POOL.visual, POOL.text)
    return partial(encode_record, tokenizer=load_tokenizer("almanac"), architecture=arch, row_shape=limits)


def encoding_rate(source: Source, encode: Callable[[Sample | Sheet], Example]) -> dict[str, float]:
    """Samples and tiles per second of one thread that reads, decodes, tiles and tokenizes."""
    began, tiles = time.perf_counter(), 0
    for index in range(len(source)):
        tiles += encode(source[index]).size.tiles
    seconds = time.perf_counter() - began
    return {"samples_per_s": len(source) / seconds, "tiles_per_s": tiles / seconds}


def feeding(source: Source, encode: Callable[[Sample | Sheet], Example], arch: Architecture, workers: int, steps: int):
    """A measure of the seconds per sample of packed batches; starting the workers is not counted."""

    def measure() -> float:
        settings = PoolSettings(POOL, num_pools=1, window=16, workers=workers)
        stream = ExampleStream([Part(source)], encode, seed=0)
        with make_packed_pipeline(stream, arch, settings) as batches:
            for _ in range(3):  # workers start, buffers fill
                next(batches)
            began = time.perf_counter()
            samples = sum(len(next(batches).ids) for _ in range(steps))
            return (time.perf_counter() - began) / samples

    return measure


def needed_per_host(arch: Architecture, mfu: float) -> dict[str, float]:
    """Samples per second that one host must prepare, where training runs at this share of the chips' peak."""
    bits = (True,) * arch.num_slots
    flops = {
        "dense": dense_decoder_flops(arch, MEAN_VISUAL, MEAN_TEXT),
        "visor, every slot on": decoder_flops(arch, bits, MEAN_VISUAL, MEAN_TEXT),
        "visor, every slot off": decoder_flops(arch, (False,) * arch.num_slots, MEAN_VISUAL, MEAN_TEXT),
    }
    tower = tower_flops(arch, 1) * MEAN_TILES
    step = {name: 3 * (decoder + tower) for name, decoder in flops.items()}  # backward costs two forward passes
    return {name: CHIPS_PER_HOST * CHIP_FLOPS * mfu / one for name, one in step.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    arch = architecture(load_config(ROOT.parent / "configs" / "llava_ov_7b.py"))
    encode = encoder(arch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = draw_pictures(folder, options.samples, seed=0)
        sources = {source: open_source(folder, write(folder, records)) for source, write in WRITERS.items()}
        alone = {source: encoding_rate(opened, encode) for source, opened in sources.items()}
        contenders = {
            f"{source}, {workers} workers": feeding(opened, encode, arch, workers, options.steps)
            for source, opened in sources.items()
            for workers in options.workers
        }
        times = harness.interleaved(contenders, options.rounds)
    needs = {
        name: needed_per_host(architecture(load_config(ROOT.parent / "configs" / f"{name}.py")), options.mfu)
        for name in ("llava_ov_0p5b", "llava_ov_7b")
    }
    slowest = min(rate["samples_per_s"] for rate in alone.values())
    return {
        "arguments": harness.arguments_of(options),
        "cores": os.cpu_count(),
        "one_core": alone,
        "samples_per_s": {name: harness.quartiles(1 / values) for name, values in times.items()},
        "host_needs_samples_per_s": needs,
        "cores_needed": {name: {way: rate / slowest for way, rate in rates.items()} for name, rates in needs.items()},
        "host_cpus": HOST_CPUS,
    }


def show(report: dict[str, Any]) -> None:
    for source, rate in report["one_core"].items():
        shown = f"{rate['samples_per_s']:.1f} samples/s, {rate['tiles_per_s']:.0f} tiles/s"
        print(f"{source:14}one core, encoding only: {shown}")
    for name, (low, middle, high) in report["samples_per_s"].items():
        print(f"{name:24}{middle:7.1f} samples/s ({low:.1f} to {high:.1f})")
    for name, rates in report["host_needs_samples_per_s"].items():
        for way, rate in rates.items():
            cores = report["cores_needed"][name][way]
            verdict = "enough" if cores < HOST_CPUS else "too few"
            print(
                f"{name}, {way}: a v5e-256 needs {rate:.0f} samples/s of each host, {cores:.1f} cores like this one;"
                f" it has {HOST_CPUS} virtual CPUs: {verdict}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="records that are drawn")
    parser.add_argument("--steps", type=int, default=4, help="batches that each measure takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the chips' peak that training is to reach")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="also write the object to this file")
    options = parser.parse_args()
    report = measure(options)
    if options.out:
        harness.save(report, options.out)
    print(json.dumps(report)) if options.json else show(report)


if __name__ == "__main__":
    main()
