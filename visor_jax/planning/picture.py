"""What a picture costs: tiles, visual tokens and FLOPs by budget, and of VISOR with reduced tokens (VISOR-TR).

In: an `Architecture`, the picture's size, the text tokens of its prompt. Out: numbers for JSON, and lines to print.
Every saving is relative to the dense plan on all visual tokens. No JAX import.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from visor_jax.architecture import Architecture, ReductionArchitecture
from visor_jax.budget import budget_name, by_count
from visor_jax.cost import decoder_flops, dense_decoder_flops, reduction_flops, visual_flops
from visor_jax.data.anyres import tile_count, visual_token_count

KEPT = 0.25  # share of the visual tokens of the reductions below
TOKEN_REDUCTIONS = ("packing 2", "packing 4", "visionzip", "vispruner")  # with which the paper combines VISOR


def with_reduction(arch: Architecture, name: str) -> Architecture:
    """Returns `arch` with one of `TOKEN_REDUCTIONS`."""
    if name.startswith("packing"):
        return replace(arch, anyres=replace(arch.anyres, packing=int(name.split()[1])))
    return replace(arch, reduction=ReductionArchitecture(name, KEPT))


def reads_less(arch: Architecture) -> str:
    """Returns the name of what makes the decoder read fewer visual tokens; "" if nothing does."""
    names = [f"packing {arch.anyres.packing}"] if arch.anyres.packing > 1 else []
    names += [name for name in (arch.reduction.method, arch.dropping.method) if name != "none"]
    return ", ".join(names)


def picture_costs(arch: Architecture, size: tuple[int, int], text_tokens: int) -> dict[str, Any]:
    """Returns the cost of a picture of (height, width) pixels, in GFLOP by budget.

    "dense" is the dense plan on all visual tokens; "dense, NAME" the dense plan on those that a configured reduction
    leaves.
    "reduced" has the same numbers with each of `TOKEN_REDUCTIONS`, for a VISOR plan that reads all tokens.
    """
    all_tokens = arch.whole
    tiles, before = tile_count(size, arch), visual_token_count(size, all_tokens)
    result = _costs(arch, size, text_tokens)
    if less := reads_less(arch):
        alone = replace(arch, plan="dense")
        result["decoder_gflops"][f"dense, {less}"] = (
            decoder_flops(alone, (), result["visual_tokens"], text_tokens) / 1e9
        )
    result["decoder_gflops"]["dense"] = dense_decoder_flops(all_tokens, before, text_tokens) / 1e9
    if arch.reduction.method != "none":
        result["reduction_gflops"] = reduction_flops(arch, tiles, result["visual_tokens"]) / 1e9
    if arch.plan == "visor" and not less:
        result["reduced"] = {name: _costs(with_reduction(arch, name), size, text_tokens) for name in TOKEN_REDUCTIONS}
    return result


def _costs(arch: Architecture, size: tuple[int, int], text_tokens: int) -> dict[str, Any]:
    tiles, tokens = tile_count(size, arch), visual_token_count(size, arch)
    budgets = by_count(arch.num_slots) if arch.plan == "visor" else []
    decoder = {budget_name(bits): decoder_flops(arch, bits, tokens, text_tokens) / 1e9 for bits in budgets}
    tower = visual_flops(arch, tiles, tokens) / 1e9
    return {"tiles": tiles, "visual_tokens": tokens, "tower_gflops": tower, "decoder_gflops": decoder}


def lines(costs: dict[str, Any], arch: Architecture, size: tuple[int, int], text_tokens: int) -> Iterator[str]:
    """Yields `costs` as text."""
    tower, decoder = costs["tower_gflops"], costs["decoder_gflops"]
    of_it = ""
    if "reduction_gflops" in costs:
        of_it = f" ({readable(costs['reduction_gflops'])} of it for the reduction {arch.reduction.method!r})"
    yield f"{costs['tiles']} tiles, {costs['visual_tokens']} visual tokens, tower {readable(tower)}{of_it};" + (
        f" with {text_tokens} text tokens:"
    )
    all_tokens = arch.whole
    dense = decoder["dense"]
    dense_tower = visual_flops(all_tokens, costs["tiles"], visual_token_count(size, all_tokens)) / 1e9
    width = max(map(len, decoder))
    for name, gflops in decoder.items():
        end_to_end = (dense + dense_tower) / (gflops + (dense_tower if name == "dense" else tower))
        yield f"  {name:<{max(width, 14)}} decoder {readable(gflops):>14}  {dense / gflops:6.1f}x" + (
            f"  end to end {end_to_end:5.2f}x"
        )
    if reduced := costs.get("reduced"):
        yield "saving of the decoder with reduced visual tokens (VISOR-TR), by budget:"
        names = [name for name in decoder if name != "dense"]
        columns = [max(len(name), 7) for name in names]
        yield f"  {'':<11} tokens " + " ".join(f"{name:>{n}}" for name, n in zip(names, columns, strict=True))
        for how, of in {"all": costs, **reduced}.items():
            savings = (f"{dense / of['decoder_gflops'][name]:.1f}x" for name in names)
            yield f"  {how:<11} {of['visual_tokens']:>6} " + " ".join(
                f"{saving:>{n}}" for saving, n in zip(savings, columns, strict=True)
            )


def readable(gflops: float) -> str:
    """Formats a number of GFLOP with its unit."""
    return f"{gflops * 1e3:,.2f} MFLOP" if gflops < 1 else f"{gflops:,.1f} GFLOP"
