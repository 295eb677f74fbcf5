"""States what limits the figures of a page, as far as it follows from the stored results.

In: `Facts`. Out: sentences; each names the figure that it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator

from visor_jax.data.source_kind import LEVELS
from visor_jax.report.accuracy import is_dense
from visor_jax.report.facts import Facts, fixed_budgets, mixed_accuracy, tasks_by_level
from visor_jax.report.numbers import counted, percent
from visor_jax.report.results import OtherResult, Row


def caveats(facts: Facts) -> list[str]:
    """Returns the caveats of a page."""
    parts = (of_files, of_questions, of_seed, of_costs, of_controls, of_benchmarks, of_others, of_training)
    return [sentence for part in parts for sentence in part(facts)]


def of_files(facts: Facts) -> Iterator[str]:
    """Results that the page lacks, and answers that are not those of a result."""
    yield from (f"Not on this page: {reason}." for reason in facts.unread)
    yield from facts.doubts


def of_questions(facts: Facts) -> Iterator[str]:
    """How many questions there are, how wide the intervals, what was skipped."""
    evaluation, tasks = facts.evaluation, tasks_by_level(facts.evaluation)
    if facts.on_own_data and (size := size_of(evaluation)):
        yield f"{size}."
    if skipped := skipped_records(evaluation):
        yield f"Of the {evaluation['split']} split {skipped}."
    unleveled = [task for task, level in tasks if not level]
    if unleveled and len(unleveled) < len(tasks):
        yield f"Tasks without a level are in no mean of a level: {', '.join(task or 'all' for task in unleveled)}."


def size_of(evaluation: Row) -> str:
    """Returns how many questions there are, and how wide the intervals of tasks; "" if it is not known."""
    shown, tasks = headline_budget(evaluation), tasks_by_level(evaluation)
    samples = headline_row(evaluation).get("samples")
    if not samples:
        return ""
    limits = evaluation.get("intervals", {}).get("budgets", {}).get(shown) or {}
    widths = {task: (of_task[1] - of_task[0]) / 2 for task, of_task in limits.get("tasks", {}).items()}
    text = f"{counted(samples, 'question')} of {counted(len(tasks), 'task')}"
    if len(tasks) > 1:
        text += f", {samples / len(tasks):.0f} per task on average"
    if widths:
        task = max(widths, key=lambda name: widths[name])
        text += f"; the widest interval of a task under {shown} is ±{100 * widths[task]:.1f} points ({task or 'all'})"
    return text


def skipped_records(evaluation: Row) -> str:
    """Returns how many records could not be used, and why; "" if there are none."""
    skipped = {reason: count for reason, count in evaluation.get("skipped", {}).items() if count}
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    return f"{counted(sum(skipped.values()), 'record')} could not be used: {listed}" if skipped else ""


def of_seed(facts: Facts) -> Iterator[str]:
    """One run, one seed; local changes of the code."""
    if facts.record is None:
        yield "There is no config.json: configuration, seed and versions of this run are not known."
        return
    seed = facts.record["config"].get("seed")
    yield (
        f"One run{'' if seed is None else f' with seed {seed}'}. The intervals cover the choice of questions, not how"
        " another seed would have trained."
    )
    if (facts.record.get("git_revision") or "").endswith("-dirty"):
        yield "The code had local changes that are not recorded."


def of_costs(facts: Facts) -> Iterator[str]:
    """What is counted and what is measured."""
    evaluation = facts.evaluation
    results = [evaluation, *(one.result for one in (*facts.benchmarks, *facts.questions))]
    timed = [one for one in results if one.get("timing")]
    devices = sorted({one["timing"]["device"] for one in timed})
    if devices:
        yield (
            f"Times were measured on {', '.join(devices)}, one question by itself; they say nothing of other devices or"
            " of batches. FLOPs and cache bytes are counted by formula."
        )
    else:
        yield "No time was measured: FLOPs and cache bytes are counted by formula, and fewer FLOPs need not be faster."
    if not is_dense(evaluation) and "tasks" not in evaluation["dense"]:
        text = "No dense model was run for this page: its cost is counted by formula, its accuracy is not known"
        against = [one for one in results if one.get("against")]
        yield text + (", except where another run is compared with." if against else ".")


def of_controls(facts: Facts) -> Iterator[str]:
    """What is answered without the picture."""
    evaluation, shown = facts.evaluation, headline_budget(facts.evaluation)
    blind = evaluation.get("blind", {}).get(shown)
    if blind:
        levels = [f"{percent(blind[level])} % of {level} tasks" for level in LEVELS if blind.get(level) is not None]
        mixed = mixed_accuracy(blind, evaluation.get("levels", {}))
        yield (
            f"With a gray picture, {shown} still answers {', '.join(levels) or f'{percent(mixed)} %'} right: that much"
            " needs no picture."
        )
    elif facts.on_own_data:
        yield "No control without the picture was run: how much could be answered without it is not known."


def of_benchmarks(facts: Facts) -> Iterator[str]:
    """Parts of benchmarks, problems, other configurations."""
    for one in facts.benchmarks:
        questions, problems = one.result["questions"], one.result["problems"]
        if questions["asked"] < questions["of"]:
            yield f"{one.name}: only the first {questions['asked']} of {questions['of']} questions were asked."
        elif one.partial:
            yield f"{one.name}: of chosen budgets, an earlier stage or another configuration (from partial/)."
        if problems:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(problems.items()))
            count = sum(problems.values())
            verb = "counts" if count == 1 else "count"
            yield f"{one.name}: {counted(count, 'question')} could not be asked and {verb} as wrong: {listed}."
        if one.file:
            yield f"{one.name}: is defined by {one.file}, not by this package; how it scores is not checked here."
        if one.differing:
            yield differing(one)


def of_others(facts: Facts) -> Iterator[str]:
    """Further questions: parts, skipped records, other configurations; and the stages of all results."""
    for one in facts.questions:
        if one.partial:
            yield f"{one.name}: of chosen budgets, an earlier stage or another configuration (from partial/)."
        if size := size_of(one.result):
            yield f"{one.name}: {size}."
        if skipped := skipped_records(one.result):
            yield f"{one.name}: {skipped}."
        if one.differing:
            yield differing(one)
    others = (*facts.benchmarks, *facts.questions)
    stages = {one.result.get("stage") or "" for one in others} | {facts.evaluation.get("stage") or ""}
    if len(stages - {""}) > 1:
        yield f"Figures are of models of different stages: {', '.join(sorted(stages - {''}))}."


def differing(one: OtherResult) -> str:
    """Says that a result was measured with other settings."""
    return f"{one.name}: measured with other values of {', '.join(one.differing)} than this run's."


def of_training(facts: Facts) -> Iterator[str]:
    """Stages that stopped, steps that were not applied."""
    for stage in facts.stages:
        lost = sum(row.get("loss") is None for row in stage.rows)
        if stage.rows and not stage.complete:
            yield f"Stage {stage.name} is not complete."
        if lost:
            yield f"Stage {stage.name}: {counted(lost, 'step')} had a loss that was not finite."


def headline_budget(evaluation: Row) -> str:
    """Returns the budget that the page's first figures are of."""
    return "auto" if "auto" in evaluation["budgets"] else fixed_budgets(evaluation)[-1]


def headline_row(evaluation: Row) -> Row:
    """Returns its row."""
    return evaluation["budgets"][headline_budget(evaluation)]
