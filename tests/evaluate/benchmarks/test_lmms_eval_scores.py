"""Prompts and scores equal those of lmms-eval's own functions, on 1,000 generated answers for each benchmark.

lmms-eval needs an environment of its own; tests/export/test_lmms_eval.py says how to make one:

    LMMS_EVAL_PYTHON=$PWD/lmms/bin/python launch/test.sh --all tests/evaluate/benchmarks/test_lmms_eval_scores.py

Only functions of its tasks run there, no model. docs/benchmarks.md lists where this package differs on purpose.
"""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
from typing import Any

import pytest

from tests.evaluate.benchmarks import hub_tables
from visor_jax.evaluate.benchmarks import MODULES, named_benchmark
from visor_jax.evaluate.benchmarks.base import Item

PYTHON = os.environ.get("LMMS_EVAL_PYTHON", "")
COUNT = 1000
# Task files whose prompts are compared; the functions are those that they name.
TASKS = {
    "docvqa": "docvqa/docvqa_val.yaml",
    "infovqa": "infovqa/infovqa_val.yaml",
    "chartqa": "chartqa/chartqa.yaml",
    "textvqa": "textvqa/textvqa_val.yaml",
    "ocrbench": "ocrbench/ocrbench.yaml",
    "ai2d": "ai2d/ai2d.yaml",
    "ai2d_no_mask": "ai2d/ai2d_no_mask.yaml",
    "vstar": "vstar_bench/vstar_bench.yaml",
    "mme": "mme/mme.yaml",
    "mmstar": "mmstar/mmstar.yaml",
    "pope": "pope/pope.yaml",
    "gqa": "gqa/gqa.yaml",
    "scienceqa": "scienceqa/scienceqa_img.yaml",
    "realworldqa": "realworldqa/realworldqa.yaml",
    "mmbench": "mmbench/mmbench_en_dev_static.yaml",
    "mmmu": "mmmu/mmmu_val.yaml",
    "seedbench": "seedbench/seedbench.yaml",
}
PROGRAM = """
import copy, importlib, inspect, json, sys
from pathlib import Path
import yaml
import lmms_eval
from lmms_eval.api.metrics import anls, exact_match_hf_evaluate

class Loader(yaml.SafeLoader):
    pass

Loader.add_constructor("!function", lambda loader, node: node.value)
folder = Path(lmms_eval.__file__).parent / "tasks"

def task_of(path):
    task = yaml.load(path.read_text(), Loader)
    return (task_of(path.parent / task.pop("include")) | task) if "include" in task else task

def exact(prediction, reference):
    kwargs = {"ignore_case": True, "ignore_punctuation": True}
    return exact_match_hf_evaluate([prediction.strip()], [reference], **kwargs)["exact_match"]

def chosen_in_mmbench(doc, answer):
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    item = dict(doc, prediction=answer)
    found = utils.mmbench_evaluator.prefetch_answer(copy.deepcopy(item))
    return found or extract_mcq_answer(answer, choices=sorted(utils.mmbench_evaluator.build_choices(item)))

def mmmu(doc, answer):
    import ast
    if doc["question_type"] == "multiple-choice":
        index2ans, letters = utils.get_multi_choice_info(ast.literal_eval(doc["options"]))
        return utils.parse_multi_choice_response(answer, letters, index2ans) == doc["answer"]
    reference = doc["answer"]
    reference = ast.literal_eval(reference) if reference.startswith("[") else reference
    return utils.eval_open(reference, utils.parse_open_response(answer))

SCORES = {
    "docvqa": lambda doc, answer: anls(doc["answers"], [answer.strip()])["anls"],
    "chartqa": lambda doc, answer: utils.chartqa_process_results(doc, [answer])["relaxed_overall"],
    "textvqa": lambda doc, answer: utils.textvqa_process_results(copy.deepcopy(doc), [answer])["exact_match"],
    "ocrbench": lambda doc, answer: utils.ocrbench_process_results(doc, [answer])["ocrbench_accuracy"]["score"],
    "ai2d": lambda doc, answer: exact(
        utils.MultiChoiceRegexFilter().apply([[answer]], [doc])[0], utils.ai2d_doc_to_target(doc, "mcq")
    ),
    "vstar": lambda doc, answer: utils.vstar_process_results(doc, [answer])["vstar_overall_acc"]["score"],
    "mme": lambda doc, answer: next(iter(utils.mme_process_results(doc, [answer]).values()))["score"],
    "mmstar": lambda doc, answer: utils.mmstar_process_results(doc, [answer])["average"]["score"],
    "pope": lambda doc, answer: utils.pope_process_results(doc, [answer])["pope_accuracy"]["score"],
    "gqa": lambda doc, answer: exact(answer, doc["answer"]),
    "scienceqa": lambda doc, answer: utils.sqa_process_results(doc, [answer])["exact_match"],
    "realworldqa": lambda doc, answer: utils.realworldqa_process_results(doc, [answer])["exact_match"],
    "mmbench": lambda doc, answer: chosen_in_mmbench(doc, answer) == doc["answer"],
    "mmmu": mmmu,
    "seedbench": lambda doc, answer: utils.seed_aggregation_result(
        [utils.seed_process_result(doc, [answer])["seed_all"]]
    ),
}
SCORES |= {"infovqa": SCORES["docvqa"], "ai2d_no_mask": SCORES["ai2d"]}

name, path = sys.argv[1:]
task = task_of(folder / path)
module = task["doc_to_text"].partition(".")[0]
utils = importlib.import_module(f"lmms_eval.tasks.{path.partition('/')[0]}.{module}")
if name == "mmmu":
    from lmms_eval.tasks._task_utils import mmmu_mcq_utils
    mmmu_mcq_utils.random.choice = lambda choices: ""  # nothing is drawn at random
ask = getattr(utils, task["doc_to_text"].partition(".")[2])
kwargs = task.get("lmms_eval_specific_kwargs", {}).get("default")
results = []
for line in sys.stdin:
    doc, answer = json.loads(line)
    prompt = ask(doc) if len(inspect.signature(ask).parameters) == 1 else ask(doc, kwargs)
    results.append([prompt, float(SCORES[name](doc, answer))])
print(json.dumps(results))
"""


def text_row(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row without its pictures, which no metric reads."""
    return {key: value for key, value in row.items() if not (key.startswith("image") and not isinstance(value, str))}


def generated(rng: random.Random, item: Item) -> str:
    """Returns an answer: right, nearly right, with a sentence around it, a letter, a number, or noise."""
    references = [item.reference] if isinstance(item.reference, str) else list(item.reference)
    reference = rng.choice(references)
    letter, options = rng.choice("ABCDE"), item.facts.get("options", {})
    options = list(options.values()) if isinstance(options, dict) else options
    number = f"{rng.uniform(-3, 60):.{rng.randrange(4)}f}"
    plain = [
        reference,
        reference.upper(),
        reference[:-1],
        letter,
        letter.lower(),
        number,
        f"{number}%",
        "yes",
        "No",
        "Y",
    ]
    plain += [*options, rng.choice(["red", "one", "1,200", "the dakota", "none", "2e1", ".5", "x ^ 2 + 1", "a"])]
    answer = rng.choice(plain)
    forms = ["{}", "{}", "{}", "{}.", "({})", "{}. tree", "the answer is {}", "The answer is {} because B is red"]
    forms += [
        "{}: yes",
        "{}) no",
        "So it = {}",
        "I choose {}!",
        "{}\n{}",
        "It could be that the result of all this is {}",
    ]
    answer = rng.choice(forms).replace("{}", answer)
    if rng.random() < 0.25:
        place = rng.randrange(len(answer) + 1)
        answer = answer[:place] + rng.choice(string.printable) + answer[place:]
    return answer.strip()


def pairs(name: str) -> list[tuple[dict[str, Any], str]]:
    rng, benchmark = random.Random(name), named_benchmark(name)
    rows = hub_tables.rows_of(name, 20)
    if name == "mmbench":  # where an option is missing, lmms-eval takes "nan" for its text
        rows = [row for row in rows if "nan" not in (row["C"], row["D"])]
    if name == "chartqa":
        rows = [{**row, "answer": rng.choice([row["answer"], "12%", "0", "3.5", "-7", "Blue"])} for row in rows]
    chosen = [rng.choice(rows) for _ in range(COUNT)]
    return [(row, generated(rng, benchmark.item(row))) for row in chosen]


def theirs(name: str, asked: list[tuple[dict[str, Any], str]]) -> list[tuple[str, float]]:
    lines = "\n".join(json.dumps([text_row(row), answer]) for row, answer in asked)
    command = [PYTHON, "-c", PROGRAM, name, TASKS[name]]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="LMMS_EVAL_PYTHON names no python with lmms-eval")
@pytest.mark.parametrize("name", sorted(MODULES))
def test_prompts_and_scores_are_those_of_lmms_eval(name: str) -> None:
    benchmark, asked = named_benchmark(name), pairs(name)
    different, right = [], 0
    for (row, answer), (prompt, score) in zip(asked, theirs(name, asked), strict=True):
        item = benchmark.item(row)
        assert item.prompt == prompt
        (ours,) = benchmark.score(answer, item).values()
        right += ours > 0
        if ours != pytest.approx(score):
            different.append((answer, item.reference, ours, score))
    assert not different, f"{len(different)} of {COUNT}: {different[:5]}"
    assert 20 <= right <= COUNT - 20, "the generated answers tell right from wrong"


def test_every_benchmark_is_compared() -> None:
    assert TASKS.keys() == MODULES.keys()
