"""lmms-eval runs our models: through its entry point (`--model visor`, `visor_torch`), and as `--model huggingface`.

lmms-eval requires other versions of this project's pinned dependencies, so it needs a separate environment:

    python3 -m venv lmms && lmms/bin/pip install lmms-eval==0.7.3 torch==2.14.1 torchvision==0.29.1 "filelock<4"  # 7 GB
    lmms/bin/pip install -e .
    LMMS_EVAL_PYTHON=$PWD/lmms/bin/python launch/test.sh --all tests/export/test_lmms_eval*.py

test_lmms_eval_tasks.py runs the harness's own tasks.
"""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.export.lmms_eval_harness import entry_points, needs_lmms_eval, run
from visor_jax import testing
from visor_jax.loading import load

pytestmark = needs_lmms_eval
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
