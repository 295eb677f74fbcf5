"""lmms-eval evaluates an exported folder unchanged: `--model huggingface`, four questions of a test task.

lmms-eval requires other versions of this project's pinned dependencies, so it needs a separate environment:

    python3 -m venv lmms && lmms/bin/pip install lmms-eval==0.7.3 torch==2.14.1 torchvision==0.29.1 "filelock<4"  # 7 GB
    LMMS_EVAL_PYTHON=$PWD/lmms/bin/python launch/test.sh tests/export/test_lmms_eval.py
"""

import base64
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from visor_jax import testing

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


def run(arguments: list[str], tmp_path: Path) -> str:
    """Returns the output of a command in lmms-eval's environment, offline and with its caches below `tmp_path`."""
    places = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
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
