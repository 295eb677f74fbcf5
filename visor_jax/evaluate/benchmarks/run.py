"""Evaluates a model on public benchmarks in local folders: the reported numbers and the cost of every budget.

`evaluate_benchmarks` returns the object that `visor evaluate --benchmark=NAME --json` prints. The result of each
benchmark is written to `eval/of_<name>/<split>.json`, its predictions to `<split>.predictions.jsonl` beside it, and a
few pictures to `examples/`. What a killed run has answered is in chunks, which are removed when all benchmarks are
complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from visor_jax.architecture import Architecture
from visor_jax.budget import bit_string
from visor_jax.config import Config
from visor_jax.cost import dense_cache_bytes, dense_decoder_flops, visual_flops
from visor_jax.errors import RequestError
from visor_jax.evaluate.against import OtherPredictions, comparison
from visor_jax.evaluate.benchmarks.base import Benchmark, Line, mean
from visor_jax.evaluate.benchmarks.examples import write_examples
from visor_jax.evaluate.benchmarks.folder import Table
from visor_jax.evaluate.benchmarks.predictions import Budgets, PredictionStore, pack, predict
from visor_jax.evaluate.harness import answers_record, check_place, harness
from visor_jax.evaluate.intervals import CONFIDENCE, interval_of_values, with_levels
from visor_jax.evaluate.latency import median_place, time_answers
from visor_jax.evaluate.measure import requested_budgets
from visor_jax.evaluate.summary import level_means, shares
from visor_jax.files.read_write import write_bytes, write_json
from visor_jax.loading import Visor
from visor_jax.scale.distributed import once
from visor_jax.workdir.folder import Workdir, stage_fields
from visor_jax.workdir.provenance import plain, tokenizer_checksum

ANSWERS_DEPEND_ON = ("model.", "tokenizer.")  # fields of the configuration; parameters and viable budgets besides


def evaluate_benchmarks(
    config: Config,
    model: Visor,
    workdir: Workdir,
    tables: Sequence[Table],
    *,
    budgets: Sequence[str] | None = None,
    limit: int | None = None,
    name: str = "",
    against: Mapping[str, OtherPredictions] | None = None,
) -> dict[str, Any]:
    """Evaluates a model on benchmarks and writes their results.

    Args:
      config: the run's; its `evaluate.batch_size` is the number of questions of a chunk.
      model: of a complete stage of `workdir`.
      tables: the benchmarks (`open_tables`).
      budgets: names of the budgets to evaluate; None: every viable one, and "auto" if the model has a policy.
      limit: of the number of questions of each benchmark; None: all.
      name: of the folder below `eval/of_<benchmark>/` for a result that is not a whole one; "": none.
      against: another run's predictions, by benchmark (`open_predictions`); None: there is no comparison.

    Returns:
      what `visor evaluate --json` prints: the rows of "budgets" hold all benchmarks, "benchmarks" has each by itself.

    Raises:
      RequestError: a budget is unknown, needs a policy or has none of `against` to be compared with, or no question
        of a benchmark can be asked.
    """
    requested = requested_budgets(model, budgets)
    for other in (against or {}).values():
        other.paired_with(list(requested))  # reports mistakes first
    for table in tables:
        check_place(workdir.path / folder_of(table, name) / f"{table.benchmark.split}.json", asked_of(table))
    stores, results, differences = [], {}, {}
    for table in tables:
        benchmark, count = table.benchmark, min(len(table), limit or len(table))
        folder, identity = folder_of(table, name), identity_of(config, model, table)
        stores.append(PredictionStore(workdir, folder, identity, model.stage))
        lines = predict(table, model, requested, stores[-1], count=count, batch_size=config.evaluate.batch_size)
        result = {
            "benchmark": benchmark.name,
            "asked_of": asked_of(table),
            "split": benchmark.split,
            "stage": model.stage,
            "plan": model.arch.plan,
            "model": model.fingerprint,
            **definition_of(benchmark),
            "identity": identity,
            "questions": {"asked": count, "of": len(table)},
            "harness": harness_of(model, table),
            **figures(benchmark, model, lines, requested),
            **timing(model, table, lines, requested, config.evaluate.timing_rounds),
        }
        of_examples = partial(write_examples, workdir.path / folder, model, table, lines, shown_budget(requested))
        # Only process 0 has the examples: their maps would be too large a message for the others, which write nothing.
        once(lambda result=result, examples=of_examples: result.update(examples=examples()))
        if against:
            other = against[benchmark.name]
            differences[benchmark.name] = other.compared(lines)
            own = {benchmark.name: differences[benchmark.name]}
            result["against"] = comparison([other], list(requested), own, result["levels"])
        results[benchmark.name] = result
        once(partial(write, workdir, folder, result, lines))
    for store in stores:
        store.remove()
    result = combined(results)
    if against:
        result["against"] = comparison(list(against.values()), list(requested), differences, result["levels"])
    return result


def folder_of(table: Table, name: str) -> str:
    """Returns the folder of a benchmark's result, below the workdir."""
    return f"eval/of_{table.benchmark.name}/{name}".rstrip("/")


def asked_of(table: Table) -> str:
    """Returns what the questions come from, for `check_place`."""
    return f"the benchmark {table.benchmark.name}"


def open_tables(benchmarks: Sequence[Benchmark], data: str) -> list[Table]:
    """Opens benchmarks.

    Args:
      benchmarks: the benchmarks.
      data: the folder of their repository in the hub's layout, or one that holds a folder for each repository.

    Raises:
      RequestError: files, columns or rows do not fit.
    """
    return [Table(benchmark, data) for benchmark in benchmarks]


def write(workdir: Workdir, folder: str, result: dict[str, Any], lines: Sequence[Line]) -> None:
    """Writes the result of a benchmark and its predictions."""
    path = workdir.path / folder / f"{result['split']}.predictions.jsonl"
    write_bytes(path, pack(lines))
    result["answers"] = answers_record(path)
    write_json(workdir.path / folder / f"{result['split']}.json", result)


def definition_of(benchmark: Benchmark) -> dict[str, Any]:
    """Returns what a reader of the result must know of a benchmark, whose file may be a user's and gone.

    "file" is the name of that file, "" if the package defines the benchmark.
    """
    headline = {"name": benchmark.headline, "maximum": benchmark.headline_max}
    return {"repository": benchmark.repo, "file": benchmark.file, "headline": headline}


def identity_of(config: Config, model: Visor, table: Table) -> dict[str, Any]:
    """Identifies what the predictions depend on, besides the parameters of the stage and the budgets."""
    tree = plain(config)
    fields = {key: value for key, value in stage_fields(tree, "evaluate").items() if key.startswith(ANSWERS_DEPEND_ON)}
    return {
        "benchmark": table.benchmark.name,
        **({"source": table.benchmark.source} if table.benchmark.source else {}),
        "files": table.fingerprint(),
        "config": fields,
        "tokenizer": tokenizer_checksum(tree),
        "viable": [bit_string(bits) for bits in model.viable_budgets],
    }


def harness_of(model: Visor, table: Table) -> dict[str, Any]:
    """Returns the harness of a benchmark's answers."""
    first, benchmark = table.items[0], table.benchmark
    settings = {"max_new_tokens": benchmark.max_new_tokens, "dtype": str(model.dtype)}
    return harness(model, first.prompt, len(first.pictures), system=model.system, **settings)


def shown_budget(requested: Budgets) -> str:
    """Returns the budget whose answers are shown as examples: "auto", or else the one with the most slots."""
    return "auto" if "auto" in requested else max(requested, key=lambda name: sum(requested[name] or ()))


def timing(
    model: Visor, table: Table, lines: Sequence[Line], requested: Budgets, rounds: int
) -> dict[str, dict[str, Any]]:
    """Returns {"timing": the times of one question, of median length}; {} without rounds. Process 0 measures them."""
    asked = [line for line in lines if line["budget"] == lines[0]["budget"] and not line["problem"]]
    if not rounds:
        return {}
    sizes = [line["visual_tokens"] + line["text_tokens"] for line in asked]
    place = median_place(sizes)
    line = asked[place]

    def measured() -> dict[str, Any]:
        pictures, prompt = table.pictures(line["row"]), table.items[line["row"]].prompt
        timed = partial(model.timed_answer, pictures, prompt)
        times = time_answers(timed, requested, room=model.arch.text.max_positions - sizes[place], rounds=rounds)
        question = {name: line[name] for name in ("row", "tiles", "visual_tokens", "text_tokens")}
        return {"dtype": str(model.dtype), "question": question, **times}

    return {"timing": once(measured)}


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(benchmark: Benchmark, model: Visor, lines: Sequence[Line], requested: Budgets) -> dict[str, Any]:
    """Returns the fields of a benchmark's result that follow from its predictions.

    "budgets" has the rows of `evaluate --json`, with all reported numbers under "metrics".
    """
    by_budget = {name: [line for line in lines if line["budget"] == name] for name in requested}
    levels, first = {benchmark.name: benchmark.level}, next(iter(by_budget.values()))
    problems = Counter(line["problem"].partition(":")[0] for line in first if line["problem"])
    if not any(line["route"] for line in first):
        raise RequestError(f"--data: no question of {benchmark.name} can be asked; the first: {first[0]['problem']}")
    picked = [line["route"] for line in by_budget.get("auto", ()) if line["route"]]
    return {
        "problems": dict(sorted(problems.items())),
        "levels": levels,
        "budgets": {name: budget_row(benchmark, model, of_budget) for name, of_budget in by_budget.items()},
        "dense": dense_row(model, first),
        "intervals": intervals(benchmark, by_budget),
        **({"routes": {benchmark.name: shares(picked)}, "shares": shares(picked)} if picked else {}),
    }


def budget_row(benchmark: Benchmark, model: Visor, lines: Sequence[Line]) -> dict[str, Any]:
    """Returns one entry of "budgets"."""
    metrics = benchmark.report(lines)
    tasks = {benchmark.name: benchmark.accuracy(metrics)}
    return {
        **level_means(tasks, {benchmark.name: benchmark.level}),
        "tasks": tasks,
        "metrics": metrics,
        **mean_costs(model.arch, lines),
        "samples": len(lines),
    }


def mean_costs(arch: Architecture, lines: Sequence[Line]) -> dict[str, float]:
    """Returns GFLOPs and cache bytes: means over the questions that were answered, up to the first new token."""
    asked = [line for line in lines if not line["problem"]]
    return {
        "decoder_gflops": mean(line["prompt_decoder_flops"] for line in asked) / 1e9,
        "end_to_end_gflops": mean(line["prompt_decoder_flops"] + tower(arch, line) for line in asked) / 1e9,
        "cache_bytes": mean(line["prompt_cache_bytes"] for line in asked),
    }


def dense_row(model: Visor, lines: Sequence[Line]) -> dict[str, float]:
    """Returns GFLOPs and cache bytes per question of a dense decoder of the same shape.

    It reads all visual tokens, also if the model does not.
    """
    arch, asked = model.arch.whole, [line for line in lines if not line["problem"]]
    sizes = [(line["whole_visual_tokens"], line["text_tokens"]) for line in asked]
    flops = [dense_decoder_flops(arch, *size) for size in sizes]
    towers = [visual_flops(arch, line["tiles"], line["whole_visual_tokens"]) for line in asked]
    return {
        "decoder_gflops": mean(flops) / 1e9,
        "end_to_end_gflops": mean(map(sum, zip(flops, towers, strict=True))) / 1e9,
        "cache_bytes": mean(dense_cache_bytes(arch, *size, model.dtype.itemsize) for size in sizes),
    }


def tower(arch: Architecture, line: Line) -> float:
    """Returns the FLOPs from a question's pictures to its visual tokens."""
    return visual_flops(arch, line["tiles"], line["visual_tokens"])


def intervals(benchmark: Benchmark, by_budget: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """Returns the intervals of the headline: {"confidence", "budgets": {budget: {"tasks": {benchmark: [low, high]}}}}.

    The budget's level has the same one. Of no question that counts it is [0, 1].
    """
    rows = {}
    for budget, lines in by_budget.items():
        groups: dict[str, list[float]] = {}
        for unit in benchmark.units(lines):
            groups.setdefault(f"{benchmark.name}/{unit.group}", []).append(unit.value)
        limits = list(interval_of_values(groups) if groups else (0.0, 1.0))
        rows[budget] = {"tasks": {benchmark.name: limits}, benchmark.level: limits}
    return {"confidence": CONFIDENCE, "budgets": rows}


def combined(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the results of benchmarks as one: levels and costs are means over them, each counting equally."""
    every = list(results.values())
    levels = {name: level for result in every for name, level in result["levels"].items()}
    costs, rows, limits = ("decoder_gflops", "end_to_end_gflops", "cache_bytes"), {}, {}
    for name in every[0]["budgets"]:
        of_budget = [result["budgets"][name] for result in every]
        tasks = {task: accuracy for row in of_budget for task, accuracy in row["tasks"].items()}
        rows[name] = {
            **level_means(tasks, levels),
            "tasks": tasks,
            **{cost: mean(row[cost] for row in of_budget) for cost in costs},
            "samples": sum(row["samples"] for row in of_budget),
        }
        of_tasks = {
            task: limit for result in every for task, limit in result["intervals"]["budgets"][name]["tasks"].items()
        }
        limits[name] = with_levels(tasks, of_tasks, levels)
    routes = {task: of_task for result in every for task, of_task in result.get("routes", {}).items()}
    return {
        "benchmark": ", ".join(results),
        "split": ", ".join(dict.fromkeys(result["split"] for result in every)),
        **{field: every[0][field] for field in ("stage", "plan") if field in every[0]},
        "levels": levels,
        "budgets": rows,
        "dense": {cost: mean(result["dense"][cost] for result in every) for cost in costs},
        "intervals": {"confidence": CONFIDENCE, "budgets": limits},
        "harness": every[0]["harness"],
        **({"routes": routes} if routes else {}),
        "benchmarks": results,
    }
