"""Writes the report: one self-contained HTML page, and the picture of accuracy against cost for a README.

In: an evaluated workdir. Out: `report/index.html` and `report/accuracy_cost.png`. Every number on the page comes from a
file of the workdir; parts that were not run are marked. The templates escape text from data sets, pictures and figures
are data URIs, and the page's security policy forbids scripts and network access.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from visor_jax.files.read_write import write_bytes, write_text
from visor_jax.report import figures
from visor_jax.report.accuracy import (
    accuracy_table,
    controls_table,
    dial_rows,
    headline,
    is_dense,
    kinds_table,
    timing_note,
)
from visor_jax.report.benchmarks import (
    against_table,
    benchmark_overview,
    benchmark_part,
    harness_rows,
    questions_part,
)
from visor_jax.report.caveats import caveats
from visor_jax.report.examples import by_level, cards
from visor_jax.report.facts import Facts, all_budgets, read_facts, tasks_by_level
from visor_jax.report.numbers import DARK, LIGHT, brief, data_uri, shade_colors
from visor_jax.report.training import goodput_rows, label_counts, search_table, training
from visor_jax.workdir.fault_points import fault_point
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.provenance import flat_fields
from visor_jax.workdir.supervision import beat


def write_report(workdir: Workdir) -> Path:
    """Writes the report of an evaluated workdir.

    Returns:
      The path of `report/index.html`.

    Raises:
      RequestError: there is no evaluation, or a file of the workdir is damaged.
    """
    facts = read_facts(workdir)
    beat()
    fault_point("report")
    page = workdir.path / "report" / "index.html"
    html = render(facts)
    picture = figures.readme_picture(facts.evaluation, all_budgets(facts), tasks_by_level(facts.evaluation))
    write_bytes(page.parent / "accuracy_cost.png", picture)
    # JSON can contain lone surrogates, which UTF-8 cannot encode.
    write_text(page, html.encode("utf-8", "replace").decode("utf-8"))
    return page


def render(facts: Facts) -> str:
    """Renders the page's HTML."""
    environment = Environment(
        loader=PackageLoader("visor_jax.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    evaluation, tasks, budgets = facts.evaluation, tasks_by_level(facts.evaluation), all_budgets(facts)
    record, colors = facts.record or {}, figures.budget_colors(budgets)
    return environment.get_template("page.html.j2").render(
        title=record.get("config", {}).get("name", "run"),
        evaluation=evaluation,
        on_own_data=facts.on_own_data,
        headline=headline(evaluation),
        table=accuracy_table(evaluation, tasks),
        timing=timing_note(evaluation),
        harness=harness_rows(evaluation) if facts.on_own_data else [],
        against=against_table(evaluation),
        cost_curve=data_uri(figures.cost_curve(evaluation), "svg+xml"),
        dial=dial_rows(evaluation),
        controls=controls_table(evaluation, tasks),
        kinds=kinds_table(evaluation),
        overview=benchmark_overview(facts),
        benchmarks=[benchmark_part(one, colors) for one in facts.benchmarks],
        questions=[questions_part(one, colors) for one in facts.questions],
        unread=facts.unread,
        routes=shares_figure(evaluation.get("routes"), budgets, tasks),
        examples=by_level(cards(evaluation, facts.pictures, tasks, colors)),
        stages=[training(stage, tasks) for stage in facts.stages],
        search=search_table(facts.search, evaluation),
        labels=facts.labels,
        label_counts=label_counts(facts.labels, budgets),
        only_right=record.get("config", {}).get("label", {}).get("only_right", False),
        label_figure=shares_figure(facts.labels and facts.labels["by_task"], budgets, tasks),
        goodput=goodput_rows(facts.goodput),
        parity=facts.parity,
        caveats=caveats(facts),
        dense_run=is_dense(evaluation),
        provenance={"revision": record.get("git_revision", ""), "versions": sorted(record.get("versions", {}).items())},
        fields=[(name, brief(value)) for name, value in flat_fields(record.get("config", {}))],
        levels=figures.LEVELS,
        shades={"light": shade_colors(LIGHT), "dark": shade_colors(DARK)},
    )


def shares_figure(
    by_task: Mapping[str, Mapping[str, float]] | None, budgets: Sequence[str], tasks: Sequence[tuple[str, str]]
) -> str | None:
    """Returns the drawing of shares by task as a data URI; None if there are none."""
    return data_uri(figures.shares(by_task, budgets, tasks), "svg+xml") if by_task else None
