"""lmms-eval runs our models through its entry point: same answers, scores, routes and costs as `visor evaluate`.

lmms-eval needs an environment of its own, with this package's dependencies (tests/export/test_lmms_eval.py):

    lmms/bin/pip install -e ".[torch]"
    LMMS_EVAL_PYTHON=$PWD/lmms/bin/python launch/test.sh --all tests/evaluate/test_lmms_eval.py

The tasks are the harness's own, with their prompts and metrics; only their data are local files.
"""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluate.benchmarks import hub_tables
from visor_jax.config import as_config
from visor_jax.errors import RequestError
from visor_jax.evaluate import lmms_manifests
from visor_jax.evaluate.benchmarks import named_benchmark
from visor_jax.evaluate.benchmarks.run import evaluate_benchmarks, open_tables
from visor_jax.evaluate.lmms_settings import NO_STOP, Settings, cut, read_settings
from visor_jax.export import torch_export
from visor_jax.loading import load
from visor_jax.testing import tiny_config
from visor_jax.workdir.folder import Workdir

PYTHON = os.environ.get("LMMS_EVAL_PYTHON", "")
ROOT = Path(__file__).parents[2]
# Our name -> the harness's task and the columns of its answers, which some rows get from the model itself.
TASKS = {
    "docvqa": ("docvqa/docvqa_val", "answers"),
    "chartqa": ("chartqa/chartqa", "answer"),
    "ocrbench": ("ocrbench/ocrbench", "answer"),
    "realworldqa": ("realworldqa/realworldqa", "answer"),
    "mme": ("mme/mme", ""),
    "pope": ("pope/pope", ""),
}
COSTS = ("decoder_flops", "prompt_decoder_flops", "flops", "cache_bytes", "prompt_cache_bytes")
SIZES = ("visual_tokens", "text_tokens", "tiles", "complete")
TASK = """\
include: {original}
task: visor_{name}
dataset_path: parquet
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: {files}}}}}
"""


# --- without lmms-eval ------------------------------------------------------------------------------------------------


def test_settings_of_a_task() -> None:
    assert read_settings({"until": [NO_STOP]}, 1024, 3) == Settings(1024)
    greedy = {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9, "do_sample": False, "num_beams": 1}
    assert read_settings(greedy, 1024, 3) == Settings(16)
    sampled = {"temperature": 0.7, "top_p": 0.9, "until": "\n", "image_aspect_ratio": "original", "top_k": None}
    assert read_settings(sampled, 64, 3) == Settings(64, 0.7, 0.9, ("\n",), 3)
    with pytest.raises(RequestError, match="num_beams=4: expected 1"):
        read_settings({"num_beams": 4}, 64, 0)
    with pytest.raises(RequestError, match="top_k=50: expected top_p"):
        read_settings({"temperature": 1.0, "top_k": 50}, 64, 0)


@given(st.text("abc"), st.lists(st.text("ab", min_size=1), max_size=3))
def test_a_cut_text_ends_before_the_first_stop(text: str, until: list[str]) -> None:
    whole = cut(text, until)
    assert text.startswith(whole) and not any(stop in whole for stop in until)
    assert whole == text or any(text[len(whole) :].startswith(stop) for stop in until)


def test_entry_point_and_manifests_name_what_exists() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    assert points == {"visor": f"{lmms_manifests.__name__}:{lmms_manifests.manifests.__name__}"}
    for path in lmms_manifests.CLASSES.values():
        module, _, name = path.rpartition(".")
        assert f"class {name}(" in (ROOT / Path(*module.split("."))).with_suffix(".py").read_text()


# --- with it ----------------------------------------------------------------------------------------------------------


def python(arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in lmms-eval's environment, offline, with this checkout and its entry points."""
    information = tmp_path / "site" / "visor_jax-0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: visor-jax\nVersion: 0\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (information / "entry_points.txt").write_text("[lmms_eval.models]\n" + lines)
    places = {
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}",
    }
    environment = {**os.environ, **places}
    command = [PYTHON, *arguments]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=540)


def lmms_eval(model: str, settings: Mapping[str, Any], tasks: Path, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the harness's results and its samples by task."""
    names = ",".join(path.stem for path in sorted(tasks.glob("*.yaml")))
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    command = ["-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", names, "--batch_size", "2"]
    done = python([*command, "--include_path", str(tasks), "--output_path", str(out), "--log_samples"], tasks.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    (results,) = out.rglob("*_results.json")
    samples = {}
    for path in out.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        samples[path.stem.partition("_samples_visor_")[2]] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(results.read_text()), samples


def write_tasks(run: Path, data: Path, tasks: Path) -> None:
    """Writes tables of which the model of `run` answers every other question right, and the tasks that read them."""
    model, budget = load(run), "auto"
    done = python(["-c", "import lmms_eval; print(lmms_eval.__path__[0])"], tasks.parent)
    folder = Path(done.stdout.splitlines()[-1]) / "tasks"
    tasks.mkdir()
    for name, (original, column) in TASKS.items():
        benchmark, rows = named_benchmark(name), hub_tables.rows_of(name, 6)
        for row in rows[::2] if column else ():
            answer = model.answer(
                row["image"]["bytes"], benchmark.item(row).prompt, budget, benchmark.max_new_tokens
            ).text
            row[column] = [answer.strip()] if isinstance(row[column], list) else answer.strip()
        files = hub_tables.write(name, data / benchmark.repo.rpartition("/")[2], rows)
        written = TASK.format(
            name=name,
            original=folder / f"{original}.yaml",
            split=benchmark.split,
            files=json.dumps(list(map(str, files))),
        )
        (tasks / f"visor_{name}.yaml").write_text(written)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="LMMS_EVAL_PYTHON names no python with lmms-eval")
def test_the_harness_and_we_agree(tiny_copy: Path, tmp_path: Path) -> None:
    write_tasks(tiny_copy, tmp_path / "hub_data", tmp_path / "tasks")
    config = as_config(tiny_config())
    tables = open_tables(list(TASKS), str(tmp_path / "hub_data"))
    model = load(tiny_copy)
    ours = evaluate_benchmarks(config, model, Workdir(tiny_copy), tables, budgets=["auto"])["benchmarks"]
    torch_export.write_folder(tmp_path / "export", model, stage="policy", dtype="float32", max_shard_bytes=10**9)
    for name, folder in (("visor", tiny_copy), ("visor_torch", tmp_path / "export")):
        theirs, samples = lmms_eval(name, {"pretrained": folder}, tmp_path / "tasks", tmp_path / name)
        for benchmark in TASKS:
            check(ours[benchmark], theirs["results"][f"visor_{benchmark}"], samples[benchmark], tiny_copy)
        throughput = theirs["throughput"]
        print(json.dumps(throughput, indent=1))


def check(ours: dict[str, Any], theirs: dict[str, Any], samples: list[dict[str, Any]], run: Path) -> None:
    """Compares the scores of a benchmark, and the answers, routes and costs of its questions."""
    name, split = ours["benchmark"], ours["split"]
    lines = (run / "eval" / f"of_{name}" / f"{split}.predictions.jsonl").read_text().splitlines()
    for line, sample in zip(map(json.loads, lines), samples, strict=True):
        (answer,), (counts,) = sample["filtered_resps"], sample["token_counts"]
        assert answer.strip() == line["answer"].strip()
        for field in ("budget", "route", *COSTS, *SIZES, "problem"):
            assert counts[field] == line[field], (name, line["row"], field)
    print(name, ours["budgets"]["auto"]["metrics"], theirs)
