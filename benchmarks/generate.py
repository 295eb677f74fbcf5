"""Long answers: tokens per second, time to the first token and cache bytes per budget, against the dense plan.

    python benchmarks/generate.py --config configs/llava_ov_0p5b.py --image 640x480 --dtype bfloat16
    python benchmarks/generate.py --tiny --lengths 4,40 --repeats 2

Every budget (one of each number of slots) and the dense plan of the same shape answer the same prompt with random
weights, greedily and never ending, up to the longest of `--lengths`; in every round each answers once, so that a change
of load hits all alike. Speeds are decoding steps per second from the first token to the n-th, medians with quartiles;
`over_dense` is the ratio within a round. Cache bytes are those of the sample by the formula of `visor_jax.budget`, and
as held, padded to buckets. Out: `benchmarks/results/generate.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, budget_name, by_count, cache_bytes
from visor_jax.config import architecture, load_config
from visor_jax.data.collate import Example, encode_tokens
from visor_jax.generate.engine import Engine
from visor_jax.generate.sampling import Sampling
from visor_jax.generate.shapes import capacity_of, window_of
from visor_jax.testing import IMAGE_TOKEN, random_params, random_picture, tiny_architecture
from visor_jax.workdir import write_json

RESULT = Path(__file__).resolve().parent / "results" / "generate.json"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parsed(argv)
    arch = tiny_architecture(4) if args.tiny else architecture(load_config(args.config, []))
    prompt = random_prompt(arch, args.image, args.text)
    lengths = sorted(int(length) for length in args.lengths.split(","))
    runners = made(arch, args.dtype)
    for name, (engine, bits) in runners.items():  # compiles every capacity on the way
        times_of(engine, bits, prompt, args.rows, lengths)
        print(f"{name}: compiled", flush=True)
    rounds = [
        {name: times_of(engine, bits, prompt, args.rows, lengths) for name, (engine, bits) in runners.items()}
        for _ in range(args.repeats)
    ]
    result = {
        "arguments": {**vars(args), "out": str(args.out)},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "visual_tokens": prompt.size.visual,
        "budgets": {name: row_of(name, rounds, lengths) for name in runners},
    }
    for name, (engine, bits) in runners.items():
        add_bytes(result["budgets"][name], engine.arch, bits, prompt, np.dtype(args.dtype).itemsize)
    show(result)
    write_json(args.out, result)
    return result


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--config", help="of the model")
    size.add_argument("--tiny", action="store_true", help="a model of four layers, to see that this runs")
    parser.add_argument("--image", default="64x48", metavar="WIDTHxHEIGHT", help="of the random picture")
    parser.add_argument("--text", type=int, default=40, help="tokens of the prompt")
    parser.add_argument("--lengths", default="64,1024,8192", help="new tokens after which to look")
    parser.add_argument("--rows", type=int, default=1, help="the same prompt so many times in a batch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(argv)


def random_prompt(arch: Architecture, image: str, text: int) -> Example:
    width, height = (int(side) for side in image.split("x"))
    ids = np.random.default_rng(0).integers(IMAGE_TOKEN + 1, arch.text.vocab_size, text).tolist()
    return encode_tokens([*ids[:3], IMAGE_TOKEN, *ids[3:]], [random_picture(height, width)], IMAGE_TOKEN, arch)


def made(arch: Architecture, dtype: str) -> dict[str, tuple[Engine, Bits]]:
    """Name -> engine and budget; all budgets share one engine, the dense plan has its own."""

    def engine(arch: Architecture) -> Engine:
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_params(arch))
        return Engine(params, arch, 1, IMAGE_TOKEN)

    visor = engine(arch)
    found: dict[str, tuple[Engine, Bits]] = {budget_name(bits): (visor, bits) for bits in by_count(arch.num_slots)}
    return {**found, "dense": (engine(dataclasses.replace(arch, plan="dense")), ())}


def times_of(engine: Engine, bits: Bits, prompt: Example, rows: int, lengths: Sequence[int]) -> dict[int, float]:
    """Seconds from the prompt until the first token (under 1) and until the n-th, for each of `lengths`."""
    began, found = time.perf_counter(), {}
    looked = [engine.look(prompt, routed=False)] * rows
    for count, _ in enumerate(engine.tokens(looked, bits, Sampling(), (), lengths[-1]), 1):
        if count == 1 or count in lengths:
            found[count] = time.perf_counter() - began
    return found


def row_of(name: str, rounds: Sequence[dict[str, dict[int, float]]], lengths: Sequence[int]) -> dict[str, Any]:
    """One budget's figures over the rounds."""

    def speeds(name: str, length: int) -> np.ndarray:
        return np.array([(length - 1) / (times[name][length] - times[name][1]) for times in rounds])

    return {
        "seconds_to_first_token": quartiles(np.array([times[name][1] for times in rounds])),
        "lengths": {
            str(length): {
                "tokens_per_second": quartiles(speeds(name, length)),
                "over_dense": quartiles(speeds(name, length) / speeds("dense", length)),
            }
            for length in lengths
            if length > 1
        },
    }


def quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"q1": low, "median": median, "q3": high}


def add_bytes(row: dict[str, Any], arch: Architecture, bits: Bits, prompt: Example, itemsize: int) -> None:
    """The cache of one sample after each length: its own tokens', and as it is held."""
    window = window_of(prompt.size)
    for length, found in row["lengths"].items():
        tokens = prompt.size.text + int(length) - 1  # the last token is not fed back
        capacity = capacity_of(max(tokens, window.text + 1))
        found["cache_bytes"] = cache_bytes(arch, bits, prompt.size.visual, tokens, itemsize)
        found["held_bytes"] = cache_bytes(arch, bits, window.visual, capacity, itemsize)


def show(result: dict[str, Any]) -> None:
    for name, row in result["budgets"].items():
        for length, found in row["lengths"].items():
            speed, ratio = found["tokens_per_second"]["median"], found["over_dense"]["median"]
            print(f"{name:<12} {length:>5} tokens: {speed:9.1f} a second, {ratio:5.2f}x dense", end="; ")
            print(f"cache {found['cache_bytes']:,} bytes, {found['held_bytes']:,} held")


if __name__ == "__main__":
    main()
