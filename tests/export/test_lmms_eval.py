"""lmms-eval runs our models: through its entry point (`--model visor`, `visor_torch`), and as `--model huggingface`.

lmms-eval requires other versions of this project's pinned dependencies, so it needs a separate environment:

    python3 -m venv lmms && lmms/bin/pip install lmms-eval==0.7.3 torch==2.14.1 torchvision==0.29.1 "filelock<4"  # 7 GB
    lmms/bin/pip install -e .
    LMMS_EVAL_PYTHON=$PWD/lmms/bin/python launch/test.sh --all tests/export/test_lmms_eval.py

The tasks of the entry point's test are the harness's own, with their prompts and metrics; only their data are local.
"""

import base64
import io
import json
import os
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.evaluate.benchmarks import hub_tables
from visor_jax import testing
from visor_jax.evaluate.benchmarks import named_benchmark
from visor_jax.evaluate.benchmarks.base import Line
from visor_jax.evaluate.benchmarks.predictions import Opened, answered
from visor_jax.evaluate.benchmarks.run import figures, open_tables
from visor_jax.evaluate.measure import requested_budgets
from visor_jax.export import torch_export
from visor_jax.loading import Visor, load

PYTHON = os.environ.get("LMMS_EVAL_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LMMS_EVAL_PYTHON names no python with lmms-eval")
QUESTIONS = ["Which digit?", " What is left of A? ", "How many?", "Which\ncolor?"]
TASK = """\
task: visor_probe
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
UTILS = """\
import base64, io
from PIL import Image

def pictures(doc):
    return [Image.open(io.BytesIO(base64.b64decode(doc["picture"]))).convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
# Answers in the same environment without the harness, with the processor's template.
DIRECT = """\
import base64, io, json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, data = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for line in open(data):
    doc = json.loads(line)
    inputs = processor(Image.open(io.BytesIO(base64.b64decode(doc["picture"]))), doc["question"])
    tokens = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1]:]
    print(json.dumps(processor.tokenizer.decode(tokens, skip_special_tokens=True)))
"""


def run(arguments: list[str], tmp_path: Path, path: str = "") -> str:
    """Returns the output of a command in lmms-eval's environment, offline and with its caches below `tmp_path`.

    Args:
      path: of further packages.
    """
    places = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run(
        [PYTHON, *arguments], env={**os.environ, **places}, cwd=tmp_path, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def write_task(folder: Path) -> Path:
    """Writes the task's folder; returns its JSON Lines file of questions with one picture each."""
    rows = []
    for number, question in enumerate(QUESTIONS):
        file = io.BytesIO()
        Image.fromarray(testing.random_picture(20 + number, 33, number)).save(file, "PNG")
        picture = base64.b64encode(file.getvalue()).decode()
        rows.append({"question": question, "picture": picture, "answer": "A"})
    folder.mkdir()
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "visor_probe.yaml").write_text(TASK.format(data=data))
    (folder / "utils.py").write_text(UTILS)
    return data


def test_lmms_eval_drives_an_exported_folder(visor_folder, tmp_path):
    data = write_task(tmp_path / "task")
    settings = f"pretrained={visor_folder},device=cpu,device_map=cpu,trust_remote_code=True"
    command = ["-m", "lmms_eval", "--model", "huggingface", "--model_args", settings, "--tasks", "visor_probe"]
    command += ["--include_path", str(tmp_path / "task"), "--batch_size", "2", "--output_path", str(tmp_path / "out")]
    run([*command, "--log_samples"], tmp_path)
    (samples,) = (tmp_path / "out").rglob("*_samples_visor_probe.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(logged) == len(QUESTIONS)
    (tmp_path / "direct.py").write_text(DIRECT)
    direct = run([str(tmp_path / "direct.py"), str(visor_folder), str(data)], tmp_path).splitlines()
    answers = {row["doc_id"]: row["filtered_resps"] for row in logged}
    # The harness strips the answers that it scores and logs.
    expected = [json.loads(line).strip() for line in direct]
    assert [answers[number].strip() for number in range(len(QUESTIONS))] == expected


# --- through the entry point ------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
COUNT = 6  # questions of each task
SEED = 3  # of parameters whose policy picks several budgets
# Our name -> the harness's task, the column of its answers, and the reported numbers that both have: ours -> theirs.
# `pope`'s yes_ratio differs on purpose (docs/benchmarks.md).
SHARED = {
    "docvqa": ("docvqa/docvqa_val", "answers", {"anls": "anls"}),
    "infovqa": ("infovqa/infovqa_val", "answers", {"anls": "anls"}),
    "chartqa": (
        "chartqa/chartqa",
        "answer",
        {name: name for name in ("relaxed_overall", "relaxed_human_split", "relaxed_augmented_split")},
    ),
    "textvqa": ("textvqa/textvqa_val", "answers", {"exact_match": "exact_match"}),
    "ocrbench": ("ocrbench/ocrbench", "answer", {"final_score": "ocrbench_accuracy"}),
    "realworldqa": ("realworldqa/realworldqa", "answer", {"exact_match": "exact_match"}),
    "vstar": ("vstar_bench/vstar_bench", "", {"overall_acc": "vstar_overall_acc"}),
    "mme": ("mme/mme", "", {name: name for name in ("mme_perception_score", "mme_cognition_score")}),
    "pope": ("pope/pope", "", {name: f"pope_{name}" for name in ("accuracy", "precision", "recall")}),
}
SCALES = {"ocrbench": 1000, "vstar": 1 / 100}  # ours over theirs
LOCAL_TASK = """\
include: {original}
task: visor_{name}
dataset_path: parquet
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: {files}}}}}
"""


def entry_points(folder: Path) -> str:
    """Writes this checkout's entry points as an installation would; returns PYTHONPATH with both."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    information = folder / "visor_jax-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: visor-jax\nVersion: 0\n")
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (information / "entry_points.txt").write_text("[lmms_eval.models]\n" + lines)
    return f"{folder}:{ROOT}"


def write_shared(model: Visor, data: Path, tasks: Path, originals: Path) -> None:
    """Writes tables of which `model` answers every other question right, and the tasks that read them.

    One question of ChartQA is too long for the model.
    """
    tasks.mkdir()
    for name, (original, column, _) in SHARED.items():
        benchmark, rows = named_benchmark(name), hub_tables.rows_of(name, COUNT)
        for row in rows[::2] if column else ():
            prompt = benchmark.item(row).prompt
            answer = model.answer(row["image"]["bytes"], prompt, "auto", benchmark.max_new_tokens).text.strip()
            row[column] = [answer] * len(row[column]) if isinstance(row[column], list) else answer
        if name == "chartqa":
            rows[1]["question"] = "why " * 100_000
        files = hub_tables.write(name, data / benchmark.repo.rpartition("/")[2], rows)
        listed = json.dumps([str(file) for file in files])
        fields = {"name": name, "original": originals / f"{original}.yaml", "split": benchmark.split, "files": listed}
        (tasks / f"visor_{name}.yaml").write_text(LOCAL_TASK.format(**fields))


def ours(model: Visor, name: str, data: Path, budget: str) -> tuple[list[Line], dict[str, Any]]:
    """Returns our predictions of a benchmark, and the row of the budget as `visor evaluate` has it."""
    (table,) = open_tables([named_benchmark(name)], str(data))
    opened = [Opened(row, item, table.pictures(row)) for row, item in enumerate(table.items)]
    budgets = requested_budgets(model, [budget])
    lines = answered(table.benchmark, model, budgets, opened)
    result = figures(table.benchmark, model, lines, budgets)
    (row,) = result["budgets"].values()
    return lines, {**row, "shares": result.get("shares", {budget: 1.0})}


def theirs(
    command: list[str], settings: Mapping[str, Any], tmp_path: Path, path: str
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Returns the harness's results, and its samples by our name of the task."""
    out = tmp_path / "out" / "_".join(command)
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    names = ",".join(f"visor_{name}" for name in SHARED)
    command = ["-m", "lmms_eval", "--model", *command, "--model_args", arguments, "--tasks", names]
    run(
        [*command, "--include_path", str(tmp_path / "tasks"), "--output_path", str(out), "--log_samples"],
        tmp_path,
        path,
    )
    (results,) = out.rglob("*_results.json")
    samples = {}
    for file in out.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[file.stem.partition("_samples_visor_")[2]] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(results.read_text()), samples


def compare(lines: list[Line], row: dict[str, Any], name: str, results: dict[str, Any], samples: list[Any]) -> None:
    """Compares answers, routes and costs of a benchmark's questions, its reported numbers and its mean costs."""
    for line, sample in zip(lines, samples, strict=True):
        (counts,) = sample["token_counts"]
        assert sample["filtered_resps"].strip() == line["answer"].strip(), (name, line["row"])
        common = counts.keys() & line.keys()
        assert {key: counts[key] for key in common} == {key: line[key] for key in common}
        assert {"budget", "route", "problem"} <= common and (line["problem"] or {"flops", "cache_bytes"} <= common)
        assert counts["input_tokens"] == line["visual_tokens"] + line["text_tokens"] and counts["device"] == "cpu"
    for own, their in SHARED[name][2].items():
        score = results["results"][f"visor_{name}"][f"{their},none"]
        assert score * SCALES.get(name, 1) == pytest.approx(row["metrics"][own]), (name, own)
    logged = {key.partition(".")[2]: value for key, value in results["throughput"].items() if f"visor_{name}." in key}
    costs = {key: row[key] for key in ("decoder_gflops", "end_to_end_gflops", "cache_bytes")}
    expected = {**costs, **{f"share_of_{route}": share for route, share in row["shares"].items()}}
    assert logged == pytest.approx(expected)


@pytest.mark.slow
def test_scores_routes_and_costs_are_ours(jax_model: Visor, tmp_path: Path) -> None:
    folder, data, path = tmp_path / "exported", tmp_path / "data", entry_points(tmp_path / "site")
    folder.mkdir()
    model = jax_model.with_params(testing.random_params(jax_model.arch, SEED))
    torch_export.write_folder(folder, model, stage="policy", dtype="float32", max_shard_bytes=10**9)
    model = load(folder)
    originals = Path(run(["-c", "import lmms_eval; print(lmms_eval.__path__[0])"], tmp_path).splitlines()[-1]) / "tasks"
    write_shared(model, data, tmp_path / "tasks", originals)
    expected = {name: ours(model, name, data, "auto") for name in SHARED}
    assert len({line["route"] for lines, _ in expected.values() for line in lines if line["route"]}) > 1
    assert sum(row["metrics"][next(iter(SHARED[name][2]))] > 0 for name, (_, row) in expected.items()) >= 6
    settings = {"pretrained": folder, "max_new_tokens": named_benchmark("textvqa").max_new_tokens}
    for command in (["visor"], ["visor_torch", "--batch_size", "2"]):
        results, samples = theirs(command, settings, tmp_path, path)
        for name, (lines, row) in expected.items():
            compare(lines, row, name, results, samples[name])


# Requests as the harness makes them, to each of our models; a line of JSON for each result or error.
REQUESTS = """\
import json, sys
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from PIL import Image
from visor_jax.errors import RequestError

def tried(ask):
    try:
        print(json.dumps(ask()))
    except RequestError as error:
        print(json.dumps(str(error)))

def request(number, prompt, settings, visual):
    arguments = (prompt, settings, lambda doc: doc, number, "probe", "test")
    return Instance("generate_until", arguments, number, {"task": "probe", "doc_id": number, "repeats": 1}), visual

def answers(model, *pairs):
    model.task_dict["probe"] = {"test": [visual for _, visual in pairs]}
    return [[x.text, x.token_counts.to_dict()["route"]] for x in model.generate_until([one for one, _ in pairs])]

name, folder = sys.argv[1:]
make = lambda arguments: get_model(name).create_from_arg_string(f"pretrained={folder}{arguments}")
for arguments in (",budget=7", ",budget=auto,dtype=int8"):
    tried(lambda: make(arguments) and "")
model, picture = make(",budget=0b10,max_new_tokens=9"), [Image.new("RGB", (40, 30), "red")]
sampled = {"temperature": 5.0, "do_sample": True, "max_new_tokens": 9}
two = [request(0, "Why?", sampled, picture), request(1, "Why?", {"until": ["\\n\\n"]}, [])]
tried(lambda: answers(model, *two))
tried(lambda: answers(model, two[0], two[0]))
tried(lambda: answers(model, request(0, "Why?", {}, ["movie.mp4"])))
tried(lambda: answers(model, request(0, "<image> <image>", {}, picture)))
tried(lambda: model.loglikelihood([]))
tried(lambda: model.generate_until_multi_round([]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["visor", "visor_torch"])
def test_requests_with_settings_and_mistakes(name: str, visor_folder: Path, tmp_path: Path) -> None:
    output = run(["-c", REQUESTS, name, str(visor_folder)], tmp_path, entry_points(tmp_path / "site"))
    budget, dtype, two, repeats, video, markers, likelihood, rounds = map(json.loads, output.splitlines()[-8:])
    assert "budget '7'" in budget and dtype == "dtype='int8': expected float32, bfloat16, float16"
    model = load(visor_folder)
    assert [route for _, route in two] == ["0b10", "0b10"] and two[1][0] == model.answer(None, "Why?", "0b10", 9).text
    (first, _), (second, _) = repeats
    assert first == two[0][0] and first != second, "repeats of a sample differ, and runs do not"
    assert video == "--tasks=probe: sample 0 has a str; expected PIL pictures only"
    assert markers.startswith("--tasks=probe: no question can be asked; the first: not_askable: ")
    assert "loglikelihood" in likelihood and "generate_until_multi_round" in rounds
