"""Compares transformers' dense prefill with this model's under several budgets.

    python benchmarks/prefill.py [--rounds 3] [--visual 1485 2929 7290] [--text 60] [--device cpu|gpu]

Two processes at the shape of LLaVA-OneVision-0.5B with random weights, one with PyTorch and one with JAX, take turns:
each runs one case while the other waits for its input, in random order in every round. A case is one prompt's prefill
with its cache, up to the logits of the first new token, or the vision tower over one tile. Ratios are taken within a
round; "end to end" adds the seconds of the tower in that round once per tile of the picture. Out:
`benchmarks/results/prefill_<device>.json`, `docs/prefill_<device>.md` and the picture `docs/prefill_<device>.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np

from visor_jax.files.read_write import write_bytes, write_text

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "llava_ov_0p5b.py"
SLOTS = (8, 4, 2, 1, 0)  # numbers of slots of the measured budgets
GOALS = {"2 slots": 8.6, "8 slots": 2.9, "dense": 1.0}  # times faster than transformers, decoder only, longest prompt
THEIRS = "transformers, dense"
Case = tuple[str, int]  # (what runs, visual tokens); ("tower", 1) is one tile


def tiles_of(visual: int) -> int:
    """Returns the number of tiles for `visual` tokens: known sizes of `data.anyres`, or 729 tokens per tile."""
    return {1485: 2, 2929: 5, 7290: 16}.get(visual, -(-visual // 729))


# --- the two workers --------------------------------------------------------------------------------------------------


def serve(cases: Callable[[Case], Callable[[], Any]]) -> None:
    """Reads cases [kind, visual] line by line from stdin; prints the seconds of one run of each.

    A case is prepared when it is first requested.
    """
    prepared: dict[Case, Callable[[], Any]] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        kind, visual = json.loads(line)
        run = prepared.get((kind, visual))
        if run is None:
            run = prepared[kind, visual] = cases((kind, visual))
        print(harness.seconds(run), flush=True)


def torch_cases(args: argparse.Namespace) -> Callable[[Case], Callable[[], Any]]:
    """Returns transformers' cases, with its fastest attention."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    from visor_jax.config import architecture, load_config

    arch = architecture(load_config(CONFIG, []))
    text, vision = arch.text, arch.vision
    if args.tiny:
        text, vision = tiny(arch).text, tiny(arch).vision
    device, dtype = ("cuda", torch.bfloat16) if args.device == "gpu" else ("cpu", torch.float32)
    language = Qwen2Config(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers, num_attention_heads=text.num_heads, num_key_value_heads=text.num_kv_heads,
        tie_word_embeddings=True, max_position_embeddings=32768,
    )  # fmt: skip
    siglip = SiglipVisionConfig(
        image_size=vision.tile_size, patch_size=vision.patch_size, hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size, num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads, vision_use_head=False,
    )  # fmt: skip
    decoder, tower = Qwen2ForCausalLM(language).eval(), SiglipVisionModel(siglip).eval()
    for module in (decoder, tower):
        module.set_attn_implementation("sdpa")
        torch.nn.Module.to(module, device, dtype)

    def prepare(case: Case) -> Callable[[], Any]:
        kind, visual = case
        if kind == "tower":
            tile = torch.randn(1, 3, vision.tile_size, vision.tile_size, dtype=dtype, device=device)
            forward = partial(tower, pixel_values=tile)
        else:
            stream = torch.randn(1, visual + args.text, text.hidden_size, dtype=dtype, device=device)
            forward = partial(decoder, inputs_embeds=stream, use_cache=True, logits_to_keep=1)

        def run() -> None:
            with torch.inference_mode():
                forward()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return prepare


def tiny(arch: Any) -> Any:
    """Returns an architecture of small widths, for a quick check."""
    text = dataclasses.replace(arch.text, num_layers=24, hidden_size=64, intermediate_size=96, vocab_size=500)
    text = dataclasses.replace(text, num_heads=4, num_kv_heads=2, head_dim=16)
    vision = dataclasses.replace(arch.vision, num_layers=1, hidden_size=32, intermediate_size=48, num_heads=2)
    return dataclasses.replace(arch, text=text, vision=vision)


def jax_cases(args: argparse.Namespace) -> Callable[[Case], Callable[[], Any]]:
    """Returns our cases; every budget has its own specialized program."""
    import jax
    import jax.numpy as jnp

    from visor_jax.budget import by_count
    from visor_jax.config import architecture, load_config
    from visor_jax.evaluate.latency import prefill_program, random_prompt
    from visor_jax.model.decoder import unstack_layers
    from visor_jax.model.encoders.siglip import tower
    from visor_jax.model.layers import in_dtype
    from visor_jax.model.visor import init_params
    from visor_jax.scale import compiler_options as compiling

    arch = architecture(load_config(CONFIG, []))
    arch = tiny(arch) if args.tiny else arch
    dtype = jnp.float32 if args.device == "cpu" else jnp.bfloat16
    params = unstack_layers(jax.jit(lambda key: in_dtype(init_params(arch, key), dtype))(jax.random.key(0)))
    options = compiling.options(params)
    encode = jax.jit(
        lambda p, tile: tower(p["vision"], {"tiles": tile}, arch.vision, arch.anyres), compiler_options=options
    )

    def prepare(case: Case) -> Callable[[], Any]:
        kind, visual = case
        if kind == "tower":
            tile = jnp.zeros((1, 1, arch.vision.tile_size, arch.vision.tile_size, 3), jnp.uint8)

            def run() -> None:
                jax.block_until_ready(encode(params, tile))

            return run
        planned = dataclasses.replace(arch, plan="dense") if kind == "dense" else arch
        num_on = 0 if kind == "dense" else int(kind.split()[0])
        bits = by_count(planned.num_slots)[num_on]
        return prefill_program(params, planned, bits, random_prompt(planned, visual, args.text, dtype))

    return prepare


# --- the driver -------------------------------------------------------------------------------------------------------


class Worker:
    """Runs one framework in a separate process."""

    def __init__(self, kind: str, arguments: Sequence[str]):
        passive = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # threads wait without spinning
        command = [sys.executable, str(Path(__file__).resolve()), f"--worker={kind}", *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **passive}, cwd=ROOT
        )
        self.read_line()

    def read_line(self) -> str:
        """Returns the worker's next line; raises SystemExit if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"prefill.py: the worker ended with status {self.process.wait()}")
        return line.strip()

    def seconds(self, case: Case) -> float:
        """Runs one case and returns its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return float(self.read_line())


def measured(
    args: argparse.Namespace,
    arguments: Sequence[str],
    frameworks: Sequence[str] = ("torch", "jax"),
    slots: Sequence[int] = SLOTS,
) -> list[dict[str, float]]:
    """Returns one dict per round: "<framework>|<kind>|<visual>" -> seconds."""
    workers = {kind: Worker(kind, arguments) for kind in frameworks}
    kinds = {"torch": ["dense"], "jax": ["dense", *(f"{count} slots" for count in slots)]}
    cases: list[tuple[str, Case]] = [(name, ("tower", 1)) for name in frameworks]
    cases += [(name, (kind, visual)) for visual in args.visual for name in frameworks for kind in kinds[name]]
    measures = {f"{name}|{case[0]}|{case[1]}": partial(workers[name].seconds, case) for name, case in cases}
    times = harness.interleaved(measures, args.rounds, progress=lambda done: print(f"round {done}", flush=True))
    for worker in workers.values():
        worker.process.communicate()
    return [{name: float(seconds[index]) for name, seconds in times.items()} for index in range(args.rounds)]


def rows_of(rounds: list[dict[str, float]], visual: int) -> list[dict[str, Any]]:
    """Returns per contender median seconds, and the speedup over transformers, decoder only and end to end."""
    tiles, rows = tiles_of(visual), []
    contenders = [
        (THEIRS, "torch", "dense"),
        ("dense", "jax", "dense"),
        *(("1 slot" if n == 1 else f"{n} slots", "jax", f"{n} slots") for n in SLOTS),
    ]

    def seconds_of(framework: str, kind: str, visual: int) -> np.ndarray:
        return np.array([times[f"{framework}|{kind}|{visual}"] for times in rounds])

    reference, reference_tower = seconds_of("torch", "dense", visual), tiles * seconds_of("torch", "tower", 1)
    for name, framework, kind in contenders:
        seconds, tower = seconds_of(framework, kind, visual), tiles * seconds_of(framework, "tower", 1)
        rows.append(
            {
                "name": name,
                "visual": visual,
                "tiles": tiles,
                "seconds": harness.quartiles(seconds)[1],
                "faster": harness.quartiles(reference / seconds, (0, 50, 100)),
                "faster_end_to_end": harness.quartiles((reference + reference_tower) / (seconds + tower), (0, 50, 100)),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Returns the Markdown page: one row per contender and number of visual tokens."""
    lines = [
        f"# Prefill against transformers, {args.device}",
        "",
        f"Made by `python benchmarks/prefill.py --rounds {args.rounds} --device {args.device}`: LLaVA-OneVision-0.5B's",
        f"shape, random weights, {args.text} text tokens, cache included. Times faster than transformers' dense",
        "prefill (sdpa attention) in the same round: median, minimum to maximum. End to end adds one tower per tile.",
        "",
        "| visual tokens | | seconds | times faster, decoder | times faster, end to end |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        ratios = [f"{m:.2f} ({a:.2f} to {b:.2f})" for a, m, b in (row["faster"], row["faster_end_to_end"])]
        lines.append(f"| {row['visual']:,} | {row['name']} | {row['seconds']:.2f} | {' | '.join(ratios)} |")
    longest = [row for row in rows if row["visual"] == max(args.visual)]
    goals = [
        f"{name} {row['faster'][1]:.1f}x of {GOALS[name]}x" for row in longest for name in GOALS if row["name"] == name
    ]
    return "\n".join([*lines, "", f"Goals at {max(args.visual):,} visual tokens: {', '.join(goals)}.", ""])


def draw(rows: list[dict[str, Any]], args: argparse.Namespace) -> bytes:
    """Draws seconds against visual tokens, one line per contender, as PNG."""
    from visor_jax.report import figures

    figure, [axes] = figures.figure(4.2, width=7.4)
    for name in dict.fromkeys(row["name"] for row in rows):
        visual, seconds = zip(*((row["visual"], row["seconds"]) for row in rows if row["name"] == name), strict=True)
        ls, marker = ("--", "s") if name == THEIRS else ("-", "o")
        axes.plot(visual, seconds, label=name, ms=4, ls=ls, marker=marker)
    axes.set(xlabel="visual tokens", ylabel="seconds, decoder only", yscale="log")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figures.png(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visual", type=int, nargs="+", default=[1485, 2929, 7290])
    parser.add_argument("--text", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="cpu", help="transformers: cpu or gpu")
    parser.add_argument("--tiny", action="store_true", help="small widths, for a quick check")
    parser.add_argument("--out", type=Path, default=ROOT, help="root of benchmarks/results and docs")
    parser.add_argument("--worker", choices=("torch", "jax"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        serve({"torch": torch_cases, "jax": jax_cases}[args.worker](args))
        return
    shared = ["--device", args.device, "--text", str(args.text), *(["--tiny"] if args.tiny else [])]
    rounds = measured(args, shared)
    rows = [row for visual in args.visual for row in rows_of(rounds, visual)]
    results, docs = args.out / "benchmarks" / "results", args.out / "docs"
    harness.save({"rows": rows, "rounds": rounds}, results / f"prefill_{args.device}.json")
    write_text(docs / f"prefill_{args.device}.md", table(rows, args))
    write_bytes(docs / f"prefill_{args.device}.png", draw(rows, args))
    print(table(rows, args))


if __name__ == "__main__":
    main()
