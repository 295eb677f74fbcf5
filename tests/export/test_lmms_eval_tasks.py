"""lmms-eval's own tasks for all public benchmarks: answers, scores, routes and costs equal those of `visor evaluate`.

The harness runs its task files as they are. It starts in a folder that holds the hub's repositories under their names,
where `datasets` finds local tables with the hub's columns before it asks the hub; GQA's second data set too.

One model answers with letters and one with yes, so that all questions are answered right and wrong. test_lmms_eval.py
says how to make lmms-eval's environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.evaluate.benchmarks import hub_tables
from tests.evaluate.benchmarks.hub_rows import Row
from tests.export.lmms_eval_harness import LIMIT, entry_points, needs_lmms_eval, run
from visor_jax import testing
from visor_jax.evaluate.benchmarks import MODULES, mmmu, named_benchmark
from visor_jax.evaluate.benchmarks.base import Benchmark, Line
from visor_jax.evaluate.benchmarks.predictions import Opened, answered
from visor_jax.evaluate.benchmarks.run import figures, open_tables
from visor_jax.evaluate.measure import requested_budgets
from visor_jax.export import torch_export
from visor_jax.loading import Visor, load

pytestmark = [needs_lmms_eval, pytest.mark.slow, pytest.mark.timeout(2 * LIMIT)]
COUNT, RIGHT = 6, 4  # questions of each task, and how many of them are made right
NEW_TOKENS = 32  # of tasks that do not say


@dataclass(frozen=True)
class Task:
    """How a task of the harness and our benchmark compare.

    Attributes:
      name: of the task.
      column: of the right answer in the benchmark's table.
      numbers: ours -> theirs, the headline first.
      values: what the column may hold; (): the model's own answer.
      scale: our numbers over theirs.
      states_new_tokens: whether the task says how many.
    """

    name: str
    column: str
    numbers: Mapping[str, str]
    values: Sequence[Any] = ()
    scale: float = 1.0
    states_new_tokens: bool = True


def named(*names: str, prefix: str = "") -> dict[str, str]:
    return {name: prefix + name for name in names}


EXACT, INDICES = named("exact_match"), ("0", "1", "2", "3")
TASKS = {
    "docvqa": Task("docvqa_val", "answers", named("anls")),
    "infovqa": Task("infovqa_val", "answers", named("anls")),
    "chartqa": Task("chartqa", "answer", named("relaxed_overall", "relaxed_human_split", "relaxed_augmented_split")),
    "textvqa": Task("textvqa_val", "answers", EXACT, states_new_tokens=False),
    "ocrbench": Task("ocrbench", "answer", {"final_score": "ocrbench_accuracy"}, scale=1000),
    "ai2d": Task("ai2d", "answer", EXACT, INDICES),
    "ai2d_no_mask": Task("ai2d_no_mask", "answer", EXACT, INDICES),
    "vstar": Task("vstar_bench", "label", {"overall_acc": "vstar_overall_acc"}, "ABCD", scale=1 / 100),
    "mme": Task("mme", "answer", named("mme_perception_score", "mme_cognition_score"), ("Yes", "No")),
    "mmstar": Task("mmstar", "answer", named("average", "coarse perception", "math"), "ABCD", states_new_tokens=False),
    # `yes_ratio` differs on purpose (docs/benchmarks.md).
    "pope": Task(
        "pope",
        "answer",
        named("accuracy", "precision", "recall", prefix="pope_") | {"f1": "pope_f1_score"},
        ("yes", "no"),
    ),
    "gqa": Task("gqa", "answer", EXACT),
    "scienceqa": Task("scienceqa_img", "answer", EXACT, (0, 1, 2, 3)),
    "realworldqa": Task("realworldqa", "answer", EXACT),
    # The task without "static" asks a judge about answers that name no option.
    "mmbench": Task("mmbench_en_dev_static", "answer", {"accuracy": "gpt_eval_score"}, "AB", scale=1 / 100),
    "mmmu": Task("mmmu_val", "answer", named("mmmu_acc"), "ABCD"),
    "seedbench": Task(
        "seedbench", "answer", named("seed_all", "seed_image", "seed_video"), "ABCD", states_new_tokens=False
    ),
}

# Seed of a model's random parameters -> the tasks that it is asked, of each of which it answers some questions right.
YES_OR_NO = ("mme", "pope")
MODELS = {6: tuple(name for name in TASKS if name not in YES_OR_NO), 27: YES_OR_NO}


def in_few_words(model: Visor, seed: int) -> Visor:
    """Returns the model with random parameters, but its answers are a letter, yes or no; seldom other words."""
    params, end = testing.random_params(model.arch, seed), model.tokenizer.end_token_id
    embedding, head = params["embed_tokens"]["embedding"], params["lm_head"]["kernel"]  # [vocab, D], [D, vocab]
    directions = np.random.default_rng(seed).choice([-1.0, 1.0], embedding.shape).astype(np.float32)
    followers = set[int]()
    for pair in (("A", "B"), ("C", "D"), ("yes", "no")):
        first, second = ([*model.tokenizer.encode(text), end] for text in pair)
        head[:, first[0]] *= 4
        head[:, second[0]] = -head[:, first[0]]  # one of the two is always likely
        for before, after in [*pairwise(first), *pairwise(second)]:
            embedding[before] += 5 * directions[after]
            followers.add(after)
    for after in followers:  # ... and the token before it decides it
        head[:, after] += directions[after] / 2
    return model.with_params(params)


# --- data -------------------------------------------------------------------------------------------------------------


def write_card(repo: Path) -> None:
    """Writes the card of a repository, which names its configurations and splits as the hub's does."""
    configs, described = [], []
    for file in sorted(repo.rglob("*.parquet")):
        inside = file.relative_to(repo)
        config = inside.parts[0] if inside.parts[0] not in ("data", inside.name) else "default"
        split = inside.name.partition("-")[0] if "-" in inside.name else "val"
        configs.append({"config_name": config, "data_files": [{"split": split, "path": str(inside)}]})
        schema = pq.read_schema(file)
        if "image" in schema.names and schema.field("image").type == "binary":  # MMStar: its card says what it is
            kinds = {name: "image" if name == "image" else "string" for name in schema.names if name != "meta_info"}
            kinds["index"] = "int64"
            features: list[Any] = [{"name": name, "dtype": kind} for name, kind in kinds.items()]
            parts = [{"name": field.name, "dtype": "string"} for field in schema.field("meta_info").type]
            described.append({"config_name": config, "features": [*features, {"name": "meta_info", "struct": parts}]})
    card = {"configs": configs, **({"dataset_info": described} if described else {})}
    (repo / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")  # JSON is YAML


def compared(name: str) -> Benchmark:
    """Returns our benchmark, with the harness's number of new tokens where the task says none."""
    benchmark = named_benchmark(name)
    return benchmark if TASKS[name].states_new_tokens else replace(benchmark, max_new_tokens=NEW_TOKENS)


def our_lines(model: Visor, name: str, hub: Path) -> list[Line]:
    """Returns our predictions of a benchmark."""
    benchmark = compared(name)
    (table,) = open_tables([benchmark], str(hub / benchmark.repo))
    opened = [Opened(row, item, table.pictures(row)) for row, item in enumerate(table.items)]
    return answered(benchmark, model, requested_budgets(model, ["auto"]), opened)


def answered_right(name: str, row: Row, answer: str) -> Row:
    """Returns a row whose right answer is `answer`; the row as it is if nothing that it may hold is that answer."""
    benchmark, task = named_benchmark(name), TASKS[name]
    values = task.values or ([answer] * len(row[task.column]) if isinstance(row[task.column], list) else answer,)
    if row.get("question_type") == mmmu.OPEN:
        values = (answer,)
    for value in values:
        changed = {**row, task.column: value}
        (score,) = benchmark.score(answer, benchmark.item(changed)).values()
        if score:
            return changed
    return row


def plain_rows(name: str) -> list[Row]:
    """Returns the rows of a table before the model has answered."""
    rows = hub_tables.rows_of(name, 4 * COUNT if name == "mmmu" else COUNT)
    if name == "mmmu":  # of several right answers the harness takes their list for the text of one
        of_kind = {mmmu.OPEN: {"answer": "24/7"}, mmmu.MULTIPLE_CHOICE: {"options": "['$6', '<image 2>', '$8', '$9']"}}
        rows = [{**row, **of_kind[row["question_type"]]} for row in rows]
    if name == "scienceqa":  # as many options as the model has letters, here and in MMMU
        rows = [{**row, "choices": ["hard", "soft", "stretchy", "sticky"]} for row in rows]
    if name == "chartqa":
        rows[RIGHT]["question"] = "why " * 100_000  # too long for the model
    return rows


def names_option(row: Row, answer: str) -> bool:
    """Whether an answer to a question of MMMU names an option; if not, the harness draws one at random."""
    options = mmmu.texts_in(row["options"])
    return row["question_type"] == mmmu.OPEN or bool(mmmu.chosen_option(answer, options))


def write_table(model: Visor, name: str, hub: Path) -> None:
    """Writes a table of which `model` answers the first questions right, if it can."""
    folder, rows = hub / named_benchmark(name).repo, plain_rows(name)
    hub_tables.write(name, folder, rows)
    answers = [line["answer"].strip() for line in our_lines(model, name, hub)]
    answered_rows = list(zip(rows, answers, strict=True))
    if name == "mmmu":
        answered_rows = [(row, answer) for row, answer in answered_rows if names_option(row, answer)][:COUNT]
        assert len({row["question_type"] for row, _ in answered_rows}) == 2
    assert len(answered_rows) == COUNT
    right = [answered_right(name, row, answer) for row, answer in answered_rows[:RIGHT]]
    hub_tables.write(name, folder, [*right, *(row for row, _ in answered_rows[RIGHT:])])


# --- both sides -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What both models of the harness are compared with.

    Attributes:
      exported: the folder of the model.
      hub: the repositories.
      path: PYTHONPATH of the harness.
      lines: our predictions by benchmark.
      rows: the rows of their results, with the shares of the routes.
    """

    exported: Path
    hub: Path
    path: str
    lines: Mapping[str, list[Line]]
    rows: Mapping[str, dict[str, Any]]


@pytest.fixture(scope="module", params=MODELS, ids=["letters", "yes_or_no"])
def case(jax_model: Visor, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Case:
    folder, tasks = tmp_path_factory.mktemp("tasks"), MODELS[request.param]
    exported, hub = folder / "exported", folder / "hub"
    exported.mkdir()
    model = in_few_words(jax_model, request.param)
    torch_export.write_folder(exported, model, stage="policy", dtype="float32", max_shard_bytes=10**9)
    model = load(exported)
    for name in tasks:
        write_table(model, name, hub)
    for repo in {hub / named_benchmark(name).repo for name in tasks}:
        write_card(repo)
    lines = {name: our_lines(model, name, hub) for name in tasks}
    rows = {}
    for name, of_name in lines.items():
        result = figures(compared(name), model, of_name, requested_budgets(model, ["auto"]))
        rows[name] = {**result["budgets"]["auto"], "shares": result["shares"]}
    return Case(exported, hub, entry_points(folder / "site"), lines, rows)


def theirs(command: list[str], case: Case) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Returns the harness's results, and its samples by task."""
    out = case.hub.parent / "out" / "_".join(command)
    settings = f"pretrained={case.exported},max_new_tokens={NEW_TOKENS}"
    command = ["-m", "lmms_eval", "--model", *command, "--model_args", settings]
    command += [
        "--tasks",
        ",".join(TASKS[name].name for name in case.lines),
        "--output_path",
        str(out),
        "--log_samples",
    ]
    run(command, case.hub, case.path)
    (results,) = (file for file in out.rglob("*_results.json") if file.parent.name != "submissions")  # MMBench's own
    samples = {}
    for file in out.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[file.stem.partition("_samples_")[2]] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(results.read_text()), samples


def logged_of(name: str, answer: str) -> str:
    """Returns what the harness logs of an answer: stripped, and of AI2D's "B. tree" the letter, which is scored."""
    letter = re.match(r"\s*([A-Z])\.", answer) if name.startswith("ai2d") else None
    return letter[1] if letter else answer.strip()


def compare(name: str, case: Case, results: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> None:
    """Compares answers, routes and costs of a benchmark's questions, its reported numbers and its mean costs."""
    task, row = TASKS[name], case.rows[name]
    for line, sample in zip(case.lines[name], samples[task.name], strict=True):
        (counts,) = sample["token_counts"]
        assert sample["filtered_resps"].strip() == logged_of(name, line["answer"]), (name, line["row"])
        common = counts.keys() & line.keys()
        assert {key: counts[key] for key in common} == {key: line[key] for key in common}
        assert {"budget", "route", "problem"} <= common and (line["problem"] or {"flops", "cache_bytes"} <= common)
        assert counts["input_tokens"] == line["visual_tokens"] + line["text_tokens"] and counts["device"] == "cpu"
    scores = {key.partition(",")[0]: value for key, value in results["results"][task.name].items()}
    for own, their in task.numbers.items():
        # MMMU's accuracy is rounded to five digits.
        assert scores[their] * task.scale == pytest.approx(row["metrics"][own], abs=5e-6), (name, own)
    prefix = f"avg_{task.name}."
    logged = {key.removeprefix(prefix): value for key, value in results["throughput"].items() if key.startswith(prefix)}
    costs = {key: row[key] for key in ("decoder_gflops", "end_to_end_gflops", "cache_bytes")}
    expected = {**costs, **{f"share_of_{route}": share for route, share in row["shares"].items()}}
    assert logged == pytest.approx(expected)


def test_questions_are_answered_right_and_wrong(case: Case) -> None:
    for name, lines in case.lines.items():
        scores = [next(iter(line["scores"].values())) for line in lines]
        assert min(scores) == 0, name
        assert case.rows[name]["metrics"][next(iter(TASKS[name].numbers))] > 0, name
    routes = {line["route"] for lines in case.lines.values() for line in lines if line["route"]}
    assert len(routes) > 1 or tuple(case.lines) == YES_OR_NO


def test_all_benchmarks_are_compared() -> None:
    assert TASKS.keys() == MODULES.keys()


@pytest.mark.parametrize("command", [["visor"], ["visor_torch", "--batch_size", "2"]], ids=["visor", "visor_torch"])
def test_scores_routes_and_costs_are_ours(command: list[str], case: Case) -> None:
    results, samples = theirs(command, case)
    for name in case.lines:
        compare(name, case, results, samples)
