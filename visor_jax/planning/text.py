"""The plan of a run as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visor_jax.planning.roofline import ASSUMPTIONS
from visor_jax.scale.topologies import GB, Topology


def show(result: Mapping[str, Any], topology: Topology) -> str:
    """Returns the plan: a line per stage, its largest costs, and every assumption."""
    chip, mesh = topology.chip, result["mesh"]
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    lines = [f"{topology.label}: {topology.chips} x {chip.name}, mesh {sizes}; {result['note']}"]
    for name, stage in result["stages"].items():
        lines += [_headline(name, stage), *_details(stage)]
    for name, figures in result["passes"].items():
        lines += _pass(name, figures)
    lines.append("assumptions of the estimated times:")
    lines += [f"  {name}: {meaning}" for name, meaning in ASSUMPTIONS.items()]
    return "\n".join(lines)


def _headline(name: str, stage: Mapping[str, Any]) -> str:
    fits = "fits" if stage["fits"] else "DOES NOT FIT"
    held, room = stage["bytes_per_chip"] / GB, stage["bytes_available"] / GB
    end = "" if stage["machine_code"] else ", machine code not generated"
    how = f"compiled in {stage['compile_seconds']:.0f} s{end}" if stage["compiled"] else "by formula, not compiled"
    return f"{name}: {fits}, {held:.1f} of {room:.1f} GB per chip ({how})"


def _details(stage: Mapping[str, Any]) -> list[str]:
    shares = sorted(stage["time_shares"].items(), key=lambda item: -item[1])[:5]
    used = ", ".join(f"{what} {share:.0%}" for what, share in stage["used"].items())
    price = f", {stage['dollars']:,.0f} dollars" if stage["dollars"] is not None else ""
    kinds = ", ".join(f"{kind} {x['bytes'] / GB:.2f}" for kind, x in stage["collectives"].items())
    return [
        f"  GB per chip: {', '.join(f'{kind} {size / GB:.2f}' for kind, size in stage['bytes'].items())}",
        f"  {_number(stage['flops_per_step'] / 1e12)} useful TFLOP per step,"
        f" {_number(stage['flops_executed_per_step'] / 1e12)}"
        f" executed; used: {used}",
        f"  about {_number(stage['seconds_per_step'])} s per step, MFU {stage['mfu']:.1%};"
        f" {', '.join(f'{part} {share:.0%}' for part, share in shares)}",
        f"  collectives per chip and step in GB: {kinds or 'none'}",
        f"  about {stage['samples_per_day']:,.0f} samples per day; {stage['samples']:,} samples take"
        f" {stage['chip_hours']:,.0f} chip-hours{price}; largest batch about {stage['largest_batch_size']}",
    ]


def _pass(name: str, figures: Mapping[str, Any]) -> list[str]:
    """Returns the lines of search or label."""
    used = ", ".join(f"{what} {share:.0%}" for what, share in figures["used"].items())
    lines = [
        f"{name}: {figures['questions']:,} questions under {figures['budgets']} budgets (by formula); used: {used}"
    ]
    flops = {"each budget alone": figures["decoder_tflop_alone"], "with shared layers": figures["decoder_tflop"]}
    decoder = ", ".join(f"{_number(x)} {how}" for how, x in flops.items() if x is not None)
    lines.append(f"  TFLOP: tower {_number(figures['tower_tflop'])}, decoder {decoder}")
    ways = {
        "each budget alone": figures["alone"],
        "with shared layers": figures["shared"],
        f"with search.early_stopping at least (all but one subset of each count stopped after"
        f" {figures.get('first_look')} questions)": figures.get("stopped_at_once"),
    }
    for how, cost in ways.items():
        if cost is not None:
            price = f", {cost['dollars']:,.0f} dollars" if cost["dollars"] else ""
            lines.append(
                f"  {how}: about {_number(cost['hours'])} hours, {_number(cost['chip_hours'])} chip-hours{price}"
            )
    return lines


def _number(value: float) -> str:
    """Returns three digits that count of a small value, and no fraction of a large one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
