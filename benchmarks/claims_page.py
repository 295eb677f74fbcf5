"""Writes docs/claims.md from the results of `claims.py`: tables, the claims one by one, and figures.

In: the folder of the results; those of longer training in folders below it, as `steps_x3`. Out: the page, `claims.png`,
`claims_start.png` and a picture such as `claims_x3.png` for each of these folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from claims_statistics import LEVELS, Cell, Result, Results, mean_curve
from claims_table import ADAPTIVE, DROPS, REDUCTIONS, STARTS, VARIANTS, WITHOUT_TASKS, Variant
from matplotlib.axes import Axes

from visor_jax.files.read_write import write_bytes, write_text
from visor_jax.report import figures
from visor_jax.workdir.provenance import default_fields

# (claim, first variant and budget, second variant and budget, levels)
Side = tuple[str, str]
HARD = ("hard", "all hard")  # those that count, and all
CLAIMS: tuple[tuple[str, Side, Side, tuple[str, ...]], ...] = (
    ("easy questions need no slot", ("visor", "full"), ("visor", "empty"), ("easy",)),
    ("hard questions fall without slots", ("visor", "full"), ("visor", "empty"), ("middle", *HARD)),
    ("one slot brings most of it back", ("visor", "full"), ("visor", "one"), HARD),
    ("the policy answers as well as all slots", ("visor", "auto"), ("visor", "full"), ("easy", "middle", *HARD)),
    ("the adaptive model answers as well as a dense one", ("visor", "full"), ("dense", "full"), LEVELS),
    ("training cross-attention alone does not replace slots", ("visor", "one"), ("cross", "empty"), ("easy", *HARD)),
    ("nor does it with twice the steps", ("visor", "one"), ("cross_twice", "empty"), ("easy", *HARD)),
    ("nor do four cross-attention layers", ("visor", "one"), ("slots_0_cross_4", "empty"), ("easy", *HARD)),
    ("a model of several budgets is as good without slots", ("visor", "empty"), ("cross", "empty"), ("easy", *HARD)),
    (
        "a slot in the third layer is no better than one in the last",
        ("visor", "one"),
        ("slots_1_cross_2", "full"),
        HARD,
    ),
    ("one slot beats dense on tokens packed by 4", ("visor", "one"), ("dense_packed_4", "full"), LEVELS),
    ("one slot beats dense on tokens packed by 2", ("visor", "one"), ("dense_packed_2", "full"), LEVELS),
    ("no slot beats dense on tokens packed by 4", ("visor", "empty"), ("dense_packed_4", "full"), LEVELS),
    *(
        (
            f"one slot beats dense on a fourth of the tokens: {method}",
            ("visor", "one"),
            (f"dense_{method}_4", "full"),
            LEVELS,
        )
        for method in (*REDUCTIONS, "m3")
    ),
    *(
        (f"one slot beats dense with tokens dropped by {method}", ("visor", "one"), (f"dense_{method}", "full"), LEVELS)
        for method in DROPS
    ),
    *(
        (f"packing costs a dense model nothing: by {by}", (f"dense_packed_{by}", "full"), ("dense", "full"), LEVELS)
        for by in (2, 4)
    ),
    *(
        (f"fewer tokens cost VISOR nothing: {name}", (f"visor_{name}", "full"), ("visor", "full"), LEVELS)
        for name in ("packed_2", "packed_4", "vispruner_4")
    ),
    *(
        (f"trained alone is no better: {budget}", ("visor", budget), (f"alone_{budget}", budget), ("easy", *HARD))
        for budget in ("empty", "0b10", "0b01", "full")
    ),
    ("trained alone, two slots are no better than one", ("alone_full", "full"), ("alone_0b10", "0b10"), HARD),
    *(
        (f"another start is as good: {VARIANTS[name].title}", (name, budget), ("visor", budget), ("middle", *HARD))
        for name in STARTS
        if name != "visor"
        for budget in ("empty", "0b10", "full")
    ),
    (
        "the router serves tasks that it has not seen",
        ("router", "auto"),
        ("visor", "auto"),
        tuple(f"task={task}" for task in WITHOUT_TASKS),
    ),
)


def write(folder: Path, docs: Path) -> None:
    """Writes the page and its figures.

    Args:
      folder: of the results.
      docs: where the page is written.
    """
    results = Results(folder)
    longer = {path.name.removeprefix("steps_x"): Results(path) for path in sorted(folder.glob("steps_x*"))}
    curves = start_runs(results)
    write_text(docs / "claims.md", page(results, longer, curves))
    write_bytes(docs / "claims.png", cost_figure(results))
    for scale, runs in longer.items():
        write_bytes(docs / f"claims_x{scale}.png", cost_figure(runs))
    if curves:
        write_bytes(docs / "claims_start.png", start_figure(curves))


def start_runs(results: Results) -> dict[str, dict[int, Result]]:
    """Returns the runs of each way to start, {variant: {seed: result}}, of the seeds that all these ways have."""
    found = {name: results.by_variant[name] for name in STARTS if name in results.by_variant}
    common = set.intersection(*(set(runs) for runs in found.values())) if found else set()
    return {name: {seed: runs[seed] for seed in sorted(common)} for name, runs in found.items() if common}


def page(results: Results, longer: Mapping[str, Results], curves: Mapping[str, Mapping[int, Result]]) -> str:
    """Returns the page's Markdown.

    Args:
      results: of the configured number of steps.
      longer: those of more steps, {how many times as many: results}.
      curves: what `start_runs` returns.
    """
    seeds = results.seeds()
    lines = [
        *introduction(results),
        "## The claims one by one",
        *claim_table(results),
    ]
    for group in dict.fromkeys(variant.group for variant in VARIANTS.values()):
        lines += group_table(results, group)
    lines += dial_table(results)
    if curves:
        of = next(iter(curves.values()))
        lines += ["![Hard accuracy against steps](claims_start.png)", ""]
        lines += [
            "Accuracy on all hard questions of each step's own fresh pages, all slots on: warm-up, full, universal."
        ]
        lines += [f"Every line is of seed{'s' * (len(of) > 1)} {', '.join(map(str, of))}.", ""]
    for scale, runs in longer.items():
        lines += longer_section(scale, runs, results)
    runs = results.by_variant
    missing = {name: [str(seed) for seed in seeds if seed not in runs.get(name, {})] for name in VARIANTS}
    named = [f"{name} (seed{'s' * (len(of) > 1)} {', '.join(of)})" for name, of in missing.items() if of]
    lines += ["## Not run", "; ".join(named) or "Nothing is missing.", ""]
    return "\n".join(lines)


def introduction(results: Results) -> list[str]:
    """Returns the page's first lines: where its numbers are from, and which questions count as hard."""
    questions = results.questions
    named = ", ".join(f"{task} ({kind})" if kind else task for task, kind in questions["counts"]) or "none"
    return [
        "# The claims, measured",
        "",
        "Made by `python benchmarks/claims.py`; every number is a mean over the seeds of its row (of "
        f"{', '.join(map(str, results.seeds()))}), of the test",
        "split, in percent, with a 95 % interval from a bootstrap over seeds and questions. Few seeds make it too",
        "narrow, and it gives 0 and 100 % no width. All",
        f"variants start from the same dense base (parameters sha256 {questions['base_sha256'][:12]}) and see the same",
        "questions. FLOPs are counted by formula up to the first answer token. CPU seconds are of a variant's own",
        "stages. The policy learns to choose the cheapest budget that reaches"
        f" {100 * (1 - label_tolerance(results)):.0f} % of the full budget's score.",
        "Bilinear packing has no rows: on a page's 8 x 8 patches it is the mean",
        "(`pytest tests/data/test_feature_maps.py -k bilinear`).",
        "",
        f"**hard** are the hard questions of those tasks and kinds of pages of which the base alone, on"
        f" {questions['split']} pages of seed {questions['seed']},",
        f"answers {100 * questions['threshold']:.0f} % or more; this was fixed before any other run. **other** are all"
        " other hard questions. hard:",
        f"{named}.",
        "",
        "![Accuracy against decoder FLOPs](claims.png)",
        "",
    ]


def label_tolerance(results: Results) -> float:
    """Returns `label.tolerance` of VISOR's runs: the default, unless their configuration has another one."""
    runs = results.by_variant.get("visor", {}).values()
    stated = next((run["identity"]["config"] for run in runs), {})
    return stated.get("label.tolerance", default_fields()["label.tolerance"])


def longer_section(scale: str, results: Results, configured: Results) -> list[str]:
    """Returns the section about runs with `scale` times as many steps in every stage.

    Args:
      configured: the results of the configured number of steps.
    """
    groups = dict.fromkeys(variant.group for variant in VARIANTS.values())
    return [
        f"## {scale} times as many steps",
        f"`python benchmarks/claims.py --steps-scale={scale}`: everything else is as above. Seeds:"
        f" {', '.join(map(str, results.seeds()))}.",
        "These runs were added after the first ones, in which hard accuracy still rose fast when training ended, with",
        "VISOR, whose cross-attention is new, more than with packed tokens. Variants without a row were not trained",
        f"for so long. The policy also has {scale} times as many labels: a longer stage would learn the same ones by",
        "heart.",
        "",
        f"![Accuracy against decoder FLOPs after {scale} times as many steps](claims_x{scale}.png)",
        "",
        *claim_table(results),
        *(dense_table(results, configured) if "dense" not in results.by_variant else []),
        *(line for group in groups for line in group_table(results, group, level=3)),
        *dial_table(results, level=3),
    ]


def claim_table(results: Results) -> list[str]:
    """Returns the table of differences."""
    return [
        "Differences in points: the first minus the second. A difference whose interval contains 0 shows nothing.",
        "",
        "| claim | first | second | level | difference | interval | seeds |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
        *claim_rows(results),
        *matched_rows(results),
        "",
    ]


def dense_table(results: Results, configured: Results) -> list[str]:
    """Returns the table of differences from the dense model of the configured number of steps, if it was run."""
    if "dense" not in configured.by_variant:
        return []
    rows = []
    for budget in ("empty", "one", "full", "auto"):
        for level in LEVELS:
            if difference := results.difference(("visor", budget), ("dense", "full"), level, configured):
                rows.append(row(f"visor {budget}", level, *interval(difference, signed=True)))
    return [
        "VISOR minus the dense model that was fine-tuned for the configured number of steps. More steps might improve",
        "the dense model too. **hard** favors it: these are the questions that its base answers well.",
        "",
        "| budget | level | difference | interval | seeds |",
        "| --- | --- | ---: | ---: | ---: |",
        *rows,
        "",
    ]


def claim_rows(results: Results) -> list[str]:
    """Returns the table's rows of `CLAIMS`, as far as both sides were run."""
    rows = []
    for claim, first, second, levels in CLAIMS:
        for level in levels:
            if (difference := results.difference(first, second, level)) is not None:
                names = (" ".join(first), " ".join(second))
                rows.append(row(claim, *names, level.replace("task=", ""), *interval(difference, signed=True)))
    return rows


def matched_rows(results: Results) -> list[str]:
    """Returns, for each dense variant on fewer tokens, the costliest budget of VISOR that costs no more.

    The budget is chosen by its cost, not by its accuracy on these questions.
    """
    rows = []
    for name in (
        "dense_packed_2",
        "dense_packed_4",
        *(f"dense_{method}_4" for method in (*REDUCTIONS, "m3")),
        *(f"dense_{method}" for method in DROPS),
    ):
        if name not in results.by_variant or "visor" not in results.by_variant:
            continue
        limit = results.mean(name, "full", "decoder_gflops")
        costs = {b: results.mean("visor", b, "decoder_gflops") for b in results.budgets("visor")}
        within = [b for b, cost in costs.items() if cost <= limit]
        if not within:
            continue
        nearest = max(within, key=costs.__getitem__)
        for level in HARD:
            if difference := results.difference(("visor", nearest), (name, "full"), level):
                claim = f"VISOR at no more decoder FLOPs beats {'packed' if 'packed' in name else 'reduced'} tokens"
                rows.append(row(claim, f"visor {nearest}", f"{name} full", level, *interval(difference, signed=True)))
    return rows


def group_table(results: Results, group: str, level: int = 2) -> list[str]:
    """Returns the heading (of `level`) and table of a group of variants; nothing if none was run."""
    rows = []
    for name, variant in VARIANTS.items():
        for budget in results.budgets(name) if variant.group == group else ():
            cells = [results.cell(name, budget, level) for level in LEVELS]
            run = next(iter(results.by_variant[name].values()))
            whole = results.dense_costs(name)
            costs = [results.mean(name, budget, field) for field in ("decoder_gflops", "end_to_end_gflops")]
            shares = [100 * costs[0] / whole["decoder_gflops"], 100 * costs[1] / whole["end_to_end_gflops"]]
            count = next((len(cell.seeds) for cell in cells if cell is not None), 0)
            steps, seconds = model_steps(variant, run), cpu_seconds(results, name)
            rows.append(
                row(variant.title, budget, *(" ".join(interval(cell)[:2]) for cell in cells), f"{1e3 * costs[0]:.2f}",
                    f"{shares[0]:.0f} %", f"{shares[1]:.0f} %", steps, str(count), f"{seconds:,.0f}")
            )  # fmt: skip
    if not rows:
        return []
    levels = " | ".join(LEVELS)
    return [
        f"{'#' * level} {group}",
        f"| variant | budget | {levels} | decoder MFLOP | of dense | end to end, of dense | steps | seeds | CPU s |",
        "| --- | --- |" + " ---: |" * (len(LEVELS) + 6),
        *rows,
        "",
    ]


def dial_table(results: Results, level: int = 2) -> list[str]:
    """Returns the heading (of `level`) and table of VISOR's policy at every dial value; nothing if it was not run."""
    runs = [run for run in results.by_variant.get("visor", {}).values() if run.get("dial")]
    if not runs:
        return []
    fixed = [run["budgets"]["full"] for run in runs]
    full = mean_of(fixed, "decoder_gflops")
    fields, rows = ("easy", "middle", "hard"), []
    for points in zip(*(run["dial"] for run in runs), strict=True):
        cost, dial = mean_of(points, "decoder_gflops"), points[0]["dial"]
        rows.append(
            row(f"{dial:+g}", *(f"{100 * mean_of(points, field):.1f}" for field in fields),
                f"{1e3 * cost:.2f}", f"{100 * cost / full:.0f} %", str(len(runs)))
        )  # fmt: skip
    return [
        f"{'#' * level} The policy's dial",
        "The same model and policy; a higher dial prefers more expensive budgets, 0 is `auto`. Here, all hard questions"
        " are one level.",
        "",
        "| dial | easy | middle | all hard | decoder MFLOP | of full | seeds |",
        "| --- |" + " ---: |" * 6,
        *rows,
        row(
            "full",
            *(f"{100 * mean_of(fixed, field):.1f}" for field in fields),
            f"{1e3 * full:.2f}",
            "100 %",
            str(len(runs)),
        ),
        "",
    ]


def mean_of(rows: Iterable[Mapping[str, float]], field: str) -> float:
    """Returns the mean of a field over rows."""
    return float(np.mean([row[field] for row in rows]))


def model_steps(variant: Variant, run: Result) -> str:
    """Returns the optimizer steps of a run, and which run it continues.

    Those of the policy, which leave the model as it is, do not count.
    """
    own = f"{sum(steps for stage, steps in run['steps'].items() if stage != 'policy'):,}"
    if variant.after:
        return f"{own}, after {variant.after[0]}'s {variant.after[1][-1]}"
    return f"{own}, after {variant.start[0]}'s {variant.start[1]}" if variant.start else own


def cpu_seconds(results: Results, name: str) -> float:
    """Returns the mean CPU seconds of a variant's runs."""
    runs = results.by_variant[name].values()
    return sum(sum(run["cpu_seconds"].values()) for run in runs) / len(runs)


def row(*cells: str) -> str:
    """Returns one row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def interval(cell: Cell | None, *, signed: bool = False) -> tuple[str, str, str]:
    """Returns a cell's mean, its interval and its number of seeds as text."""
    if cell is None:
        return "-", "", ""
    mean, low, high = (100 * value for value in (cell.mean, cell.low, cell.high))
    if signed:
        return f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}", str(len(cell.seeds))
    return f"{mean:.1f}", f"({low:.1f} to {high:.1f})", str(len(cell.seeds))


# --- figures ----------------------------------------------------------------------------------------------------------

MARKS = {
    "visor": ("o", "VISOR, one model"), "base": ("s", "dense base"), "dense": ("D", "dense, same steps"),
    "cross": ("v", "cross-attention only"), "cross_twice": ("^", "the same, twice the steps"),
    "dense_packed_2": ("P", "dense, packed by 2"), "dense_packed_4": ("X", "dense, packed by 4"),
    "visor_packed_2": (">", "VISOR, packed by 2"), "visor_packed_4": ("<", "VISOR, packed by 4"),
    "dense_divprune_4": ("1", "dense, DivPrune to 1/4"), "dense_vispruner_4": ("2", "dense, VisPruner to 1/4"),
    "dense_visionzip_4": ("3", "dense, VisionZip to 1/4"), "dense_hired_4": ("4", "dense, HiRED to 1/4"),
    "visor_vispruner_4": ("d", "VISOR, VisPruner to 1/4"),
    "dense_m3_4": ("8", "dense, M3 at 1/4"), "dense_shuffled_4": ("p", "dense, 4 side by side"),
    "dense_fastv": ("+", "dense, FastV"), "dense_pyramiddrop": ("x", "dense, PyramidDrop"),
    "dense_sparsevlm": ("h", "dense, SparseVLM"),
}  # fmt: skip


@figures.styled
def cost_figure(results: Results) -> bytes:
    """Draws accuracy against decoder FLOPs, easy and hard side by side, as PNG."""
    drawing, axes = figures.figure(4.4, width=10.6, columns=2)
    for place, level in zip(axes, ("easy", "hard"), strict=True):
        draw_costs(place, results, level)
    handles, labels = axes[1].get_legend_handles_labels()
    if handles:
        axes[1].legend(handles, labels, fontsize=8, loc="lower right")
    return figures.png(drawing)


def draw_costs(axes: Axes, results: Results, level: str) -> None:
    """Draws the variants of `MARKS`, with their intervals; the fixed budgets of VISOR are joined."""
    for number, (name, (marker, label)) in enumerate(MARKS.items()):
        points = []
        for budget in results.budgets(name):
            if (cell := results.cell(name, budget, level)) is not None:
                points.append((1e3 * results.mean(name, budget, "decoder_gflops"), cell, budget))
        if not points:
            continue
        color = figures.LEVELS[level] if name == "visor" else figures.SHADES[""](number / len(MARKS))
        fixed = sorted((cost, 100 * cell.mean) for cost, cell, budget in points if budget != "auto")
        axes.plot(*zip(*fixed, strict=True), "-" if name.startswith("visor") else "", color=color, lw=1.2)
        for index, (cost, cell, budget) in enumerate(points):
            mark = "*" if budget == "auto" else marker
            spread = [[100 * max(0.0, cell.mean - cell.low)], [100 * max(0.0, cell.high - cell.mean)]]
            axes.errorbar([cost], [100 * cell.mean], spread, fmt=mark, color=color, ms=10 if mark == "*" else 6,
                          lw=1, label=label if index == 0 else None)  # fmt: skip
    axes.set_title(f"{level} questions")
    axes.set_xlabel("decoder MFLOP per question")
    axes.set_ylabel("right answers, %")


@figures.styled
def start_figure(curves: Mapping[str, Mapping[int, Result]]) -> bytes:
    """Draws hard accuracy against steps through all stages, one line per way to start (`start_runs`), as PNG."""
    drawing, [axes] = figures.figure(4.0, width=8.0)
    for number, (name, runs) in enumerate(curves.items()):
        before, points = 0, list[tuple[float, float]]()
        for stage in ADAPTIVE:
            points += [(before + step, 100 * value) for step, value in mean_curve(list(runs.values()), stage)]
            before += next(iter(runs.values()))["steps"].get(stage, 0)
            if number == 0:
                axes.axvline(before, color=figures.FAINT, lw=0.8, ls=":")
        color = figures.SHADES[""](number / max(len(curves) - 1, 1))
        label = "copy, gate 1 (VISOR)" if name == "visor" else VARIANTS[name].title
        axes.plot(*np.transpose(points), color=color, label=label)
    axes.set_xlabel("step (dotted: the ends of warm-up, full and universal)")
    axes.set_ylabel("all hard questions, right answers, %")
    axes.legend(fontsize=8.5)
    return figures.png(drawing)
