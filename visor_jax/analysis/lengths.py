"""Decoder FLOPs against the number of visual tokens, a line per budget, by formula (VISOR paper, figure 10)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.figure import Figure

from visor_jax.analysis import drawing
from visor_jax.analysis.base import Row, Run, RunAnalysis
from visor_jax.budget import budget_name
from visor_jax.cost import decoder_flops, dense_decoder_flops
from visor_jax.report import figures

LENGTHS = (64, 128, 256, 729, 1458, 2916, 5832, 7290, 11664, 23328)  # visual tokens; a tile of SigLIP has 729
TEXT_TOKENS = 80
MARKERS = "osD^vP*Xph"


def rows(run: Run) -> list[Row]:
    """Returns one row per length and budget; the dense plan comes first."""
    table = []
    for num_visual in LENGTHS:
        flops = {"dense": dense_decoder_flops(run.arch, num_visual, TEXT_TOKENS)}
        if run.arch.num_slots:
            flops |= {budget_name(bits): decoder_flops(run.arch, bits, num_visual, TEXT_TOKENS) for bits in run.budgets}
        about = {"visual_tokens": num_visual, "text_tokens": TEXT_TOKENS}
        table += [{**about, "budget": name, "decoder_gflops": value / 1e9} for name, value in flops.items()]
    return table


@figures.styled
def draw(run: Run, table: Sequence[Row]) -> Figure:
    """Draws both axes on logarithmic scales."""
    del run
    figure, [axes] = figures.figure(3.9)
    names = list(dict.fromkeys(row["budget"] for row in table))
    colors = {"dense": figures.FAINT, **figures.budget_colors([name for name in names if name != "dense"])}
    for name, marker in zip(names, itertools.cycle(MARKERS)):
        points = [(row["visual_tokens"], row["decoder_gflops"]) for row in table if row["budget"] == name]
        style = "--" if name == "dense" else "-"
        axes.plot(*zip(*points, strict=True), style, color=colors[name], marker=marker, mec=figures.INK, mew=0.4,
                  ms=4.5, label=name)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    drawing.plain_ticks(axes)
    axes.set_xlabel("visual tokens (log scale)")
    axes.set_ylabel("decoder GFLOP (log scale)")
    axes.set_title(f"Cost against visual tokens, {TEXT_TOKENS} text tokens")
    axes.legend(ncols=1 + (len(names) > 5))
    return figure


ANALYSIS = RunAnalysis("lengths", rows, draw)
