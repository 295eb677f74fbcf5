"""The plans of docs/plan.md: which settings fit, estimated MFU, and what bounds it. Needs libtpu (extra `aot`), no TPU.

    python benchmarks/plan.py [NAME ...] [--all-stages]   # compiles, minutes each: benchmarks/results/plan/NAME.json
    python benchmarks/plan.py --table                     # prints the tables of docs/plan.md from these files

Plans the costliest stage, `full`, whose program is also that of `universal`; the others take less of everything.

Bytes and collectives are the compiler's; times are estimates. Nothing is run on hardware.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness

from visor_jax.planning.records import RECORDS, compare

ROOT = Path(__file__).resolve().parent.parent
RESULTS = harness.RESULTS / "plan"
_V5E_256 = tuple(
    f"--config.{setting}"
    for setting in (
        *("mesh.tensor=2", "data.batch_size=256", "train.accumulate=2"),
        *("train.remat=attention", "train.tower_remat=mlp"),
    )
)
# name: (configuration, topology, overrides). Without overrides the configuration is planned as it is shipped.
PLANS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "0p5b_v5e_4x4": ("llava_ov_0p5b", "v5e:4x4", ()),
    "1p5b_v6e_4x4": ("llava_ov_1p5b", "v6e:4x4", ()),
    "7b_v5p_4x4x4": ("llava_ov_7b", "v5p:4x4x4", ()),
    "7b_v5p_4x4x4_replicas": ("llava_ov_7b", "v5p:4x4x4", ("--config.mesh.replica=4",)),
    "7b_v5e_16x16": ("llava_ov_7b", "v5e:16x16", _V5E_256),
    "7b_h100x64": ("llava_ov_7b", "h100x64", ()),
}
STAGES_SHOWN = ("warmup", "full", "universal", "policy")


def run(name: str, stages: Sequence[str]) -> None:
    """Plans one entry of `PLANS` and writes its JSON; `stages` are flags."""
    config, topology, overrides = PLANS[name]
    flags = [f"--config=configs/{config}.py", f"--topology={topology}", *overrides, *stages, "--json"]
    command = [sys.executable, "-P", "-m", "visor_jax", "plan", *flags]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    harness.save({"config": config, "overrides": list(overrides), **result}, RESULTS / f"{name}.json")


def tables() -> Iterator[str]:
    """Yields the lines of the tables of docs/plan.md."""
    heads = ("Plan", "Stage", "Fits", "GB per chip (weights, optimizer, rest)", "MFU", "Seconds per step")
    yield f"| {' | '.join((*heads, 'Samples per day', 'Chip-hours', 'Largest parts of the time'))} |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- |"
    for name, (config, topology, _) in PLANS.items():
        if not (file := RESULTS / f"{name}.json").exists():
            continue
        plan = json.loads(file.read_text())
        mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
        title = f"{config.removeprefix('llava_ov_')} on {topology} ({mesh})"
        for stage in STAGES_SHOWN:
            if stage in plan["stages"]:
                yield f"| {title} | {stage} | {' | '.join(columns(plan['stages'][stage]))} |"
                title = ""


def columns(stage: dict[str, Any]) -> Iterator[str]:
    """Yields the figures of one stage."""
    held = stage["bytes"]
    rest = stage["bytes_per_chip"] - held["weights"] - held["optimizer"]
    how = "" if stage["compiled"] else " (formula)"
    yield ("yes" if stage["fits"] else "no") + how
    yield (
        f"{stage['bytes_per_chip'] / 1e9:.1f} of {stage['bytes_available'] / 1e9:.1f}"
        f" ({held['weights'] / 1e9:.1f}, {held['optimizer'] / 1e9:.1f}, {rest / 1e9:.1f})"
    )
    yield f"{stage['mfu']:.1%}"
    yield f"{stage['seconds_per_step']:.2f}"
    yield f"{stage['samples_per_day']:,.0f}"
    yield f"{stage['chip_hours']:,.0f}"
    largest = sorted(stage["time_shares"].items(), key=lambda item: -item[1])[:2]
    yield ", ".join(f"{part} {share:.0%}" for part, share in largest)


def records() -> Iterator[str]:
    """Yields the lines of the table of published records."""
    yield "| Record | Published tokens/s per chip | Estimated | Error | Estimated MFU | Assumed, because unpublished |"
    yield "| --- | ---: | ---: | ---: | ---: | --- |"
    for record in RECORDS:
        found, error = compare(record)
        published = record.tokens_per_second
        yield (
            f"| {record.name} | {published:,.0f} | {published * (1 + error):,.0f} | {error:+.1%} | {found.mfu:.1%}"
            f" | {record.settings} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PLANS)}; default: all")
    parser.add_argument("--all-stages", action="store_true", help="not only `full`: up to 15 minutes each")
    parser.add_argument("--table", action="store_true", help="print the tables from the files")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in PLANS]:
        parser.error(f"unknown plan {unknown[0]!r}; known are {', '.join(PLANS)}")
    if args.table:
        print("\n".join([*tables(), "", *records()]))
        return
    for name in args.names or PLANS:
        run(name, () if args.all_stages else ("--stage=full",))


if __name__ == "__main__":
    main()
