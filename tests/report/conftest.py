"""A workdir like that of a complete run, with invented numbers, so that the report's tests need no training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visor_jax.evaluate.benchmarks import named_benchmark
from visor_jax.files.read_write import write_json
from visor_jax.workdir.folder import FORMAT

MME = {"mme_perception_score": 1250.5, "mme_cognition_score": 300.0, "existence": 190.0, "count": 60.0, "ocr": 42.5}
BENCHMARK_COSTS, LIMITS = {"empty": 0.013, "full": 0.031, "auto": 0.02}, [0.4, 0.6]
LEVELS = {"bg": "easy", "colour": "easy", "digit": "easy", "shape": "easy"}
LEVELS |= dict.fromkeys(["below", "card", "far", "follow1", "follow2", "follow3"], "hard")
COSTS = {"empty": 0.0131, "0b100": 0.0192, "0b110": 0.0253, "full": 0.0314}  # GFLOP
TOWER, DENSE = 0.0045, 0.0702
EASY, GUESS = 0.99, {"card": 0.6, "below": 0.3, "far": 0.33, "follow1": 0.28, "follow2": 0.3, "follow3": 0.27}
CLIMB = {"follow2": (0.93, 0.992, 0.993), "follow3": (0.8, 0.96, 0.971)}


def accuracy(task: str, slots: int) -> float:
    if LEVELS[task] == "easy":
        return EASY + 0.002 * slots
    return GUESS[task] if slots == 0 else CLIMB.get(task, (0.985, 0.991, 0.993))[slots - 1]


def budget_row(slots: int, cost: float) -> dict[str, Any]:
    tasks = {task: accuracy(task, slots) for task in sorted(LEVELS)}
    means = {
        level: float(np.mean([a for task, a in tasks.items() if LEVELS[task] == level])) for level in ("easy", "hard")
    }
    costs = {"decoder_gflops": cost, "end_to_end_gflops": cost + TOWER}
    return {**means, "tasks": tasks, **costs, "samples": 1000}


def routes() -> dict[str, dict[str, float]]:
    hard = {"0b100": 0.9, "0b110": 0.06, "empty": 0.04}
    chains = {"0b110": 0.82, "0b100": 0.12, "full": 0.06}
    return {
        task: {"empty": 0.99, "0b100": 0.01} if LEVELS[task] == "easy" else chains if task > "follow1" else hard
        for task in sorted(LEVELS)
    }


def evaluation(folder: Path) -> dict[str, Any]:
    budgets = {name: budget_row(slots, cost) for slots, (name, cost) in enumerate(COSTS.items())}
    dial = []
    for place, position in enumerate((-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)):
        cost, hard = 0.0135 + 0.0012 * place, 0.5 + 0.487 * (1 - 0.16**place)
        point = {"dial": position, "accuracy": (0.99 + hard) / 2, "easy": 0.99, "hard": hard}
        dial.append({**point, "decoder_gflops": cost, "end_to_end_gflops": cost + TOWER})
    budgets["auto"] = budget_row(2, 0.0171)
    rng, examples = np.random.default_rng(0), []
    for index in range(20):
        task, name = sorted(LEVELS)[index % len(LEVELS)], f"examples/{index}.png"
        patches = rng.integers(40, 256, (9, 9, 3)).astype(np.uint8)
        (folder / "examples").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(patches, np.ones((8, 8, 1), np.uint8))).save(folder / name)
        budget = max(routes()[task].items(), key=lambda item: item[1])[0]
        words = {"question": f"Which digit is below {index}?", "answer": f"{index} red", "task": task}
        words["prediction"] = "7 red" if index == 13 else words["answer"]
        examples.append(
            {"index": index, "image": name, **words, "budget": budget, "decoder_gflops": COSTS[budget] + 0.0004}
        )
    return {
        "benchmark": "almanac",
        "split": "test",
        "budgets": budgets,
        "levels": {task: LEVELS[task] for task in sorted(LEVELS)},
        "dense": {"decoder_gflops": DENSE, "end_to_end_gflops": DENSE + TOWER},
        "dial": dial,
        "routes": routes(),
        "examples": examples,
    }


def benchmark_result(folder: Path, name: str) -> dict[str, Any]:
    """The result of a benchmark as `visor evaluate --benchmark` writes it, with a picture, times and a comparison."""
    benchmark, numbers = named_benchmark(name), {"docvqa": {"anls": 0.5}, "mme": MME}[name]
    accuracy, costs = benchmark.accuracy(numbers), {"end_to_end_gflops": 0.04, "cache_bytes": 2e6}
    row = {benchmark.level: accuracy, "tasks": {name: accuracy}, "metrics": numbers, "samples": 12, **costs}
    (folder / "examples").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), "blue").save(folder / "examples" / "0.png")
    example = {"image": "examples/0.png", "question": "<b>Which?</b>", "answer": "blue | navy", "prediction": "red"}
    example |= {"index": 0, "right": False, "score": 0.25, "budget": "full", "task": name, "decoder_gflops": 0.03}
    difference = {"accuracy": 0.5, "other": 0.75, "difference": -0.25, "low": -0.4, "high": -0.1, "p": 0.012}
    times = {"seconds_to_first_token": [0.01, 0.0125, 0.02], "tokens_per_second": [40.0, 50.0, 60.0]}
    return {
        "benchmark": name,
        "split": benchmark.split,
        "stage": "policy",
        "identity": {"config": {"model.plan": "visor"}},
        "questions": {"asked": 12, "of": 12},
        "harness": {
            "name": "visor_jax", "git_revision": "0123abc", "versions": {"jax": "0.10.2"}, "decoding": "greedy",
            "max_new_tokens": 32, "dtype": "float32", "system": "", "first_prompt": "<image>\n<script>What?</script>",
        },
        "problems": {},
        "levels": {name: benchmark.level},
        "budgets": {budget: {**row, "decoder_gflops": cost} for budget, cost in BENCHMARK_COSTS.items()},
        "dense": {"decoder_gflops": DENSE, **costs},
        "intervals": {
            "confidence": 0.95,
            "budgets": {budget: {"tasks": {name: LIMITS}, benchmark.level: LIMITS} for budget in BENCHMARK_COSTS},
        },
        "routes": {name: {"empty": 0.25, "full": 0.75}},
        "shares": {"empty": 0.25, "full": 0.75},
        "timing": {
            "dtype": "float32", "device": "cpu", "rounds": 5, "new_tokens": 32,
            "budgets": {"empty": times, "full": times},
            "question": {"row": 0, "tiles": 1, "visual_tokens": 65, "text_tokens": 11},
        },
        "against": {
            "files": ["other/validation.predictions.jsonl"],
            "budgets": {"full": {"budget": "dense", "tasks": {name: difference}, benchmark.level: difference}},
        },
        "examples": [example],
    }  # fmt: skip


def user_benchmark(folder: Path, name: str = "receipts", level: str = "hard") -> dict[str, Any]:
    """The result of a benchmark that a user's file defines, with maps on its example."""
    text = (
        json.dumps(benchmark_result(folder, "docvqa")).replace('"docvqa"', f'"{name}"').replace('"hard"', f'"{level}"')
    )
    value = json.loads(text) | {"repository": "our-shop/<i>receipts</i>", "file": "my <receipts>.py", "split": "test"}
    layers = [{"layer": layer, "on_tile": 0.5, "patches": [[layer, 100], [0, 7]]} for layer in (1, 4)]
    maps = {"relevance": [[0, 50], [100, 0]], "attention": layers}
    value["examples"] = [value["examples"][0] | maps]
    return value | {"headline": {"name": "anls", "maximum": 1.0}, "harness": value["harness"] | {"name": "visor_jax"}}


def questions_result(folder: Path, split: str = "test") -> dict[str, Any]:
    """The result of `visor evaluate --data=FILE`."""
    value = evaluation(folder)
    for name in ("dial", "routes"):
        del value[name]
    limits = {"tasks": {task: [0.85, 0.95] for task in LEVELS}, "easy": [0.9, 0.96], "hard": [0.9, 0.96]}
    value["intervals"] = {"confidence": 0.95, "budgets": dict.fromkeys(value["budgets"], limits)}
    more = {
        "benchmark": "llava",
        "split": split,
        "file": "mine <1>.json",
        "stage": "policy",
        "skipped": {"missing_file": 2},
    }
    return value | more


def metrics(stage: str, steps: int) -> str:
    rng = np.random.default_rng(len(stage))
    names = ["agreement"] if stage == "policy" else sorted(LEVELS)
    lines = []
    for step in range(1, steps + 1):
        done = 1 - np.exp(-4 * step / steps)
        budget = ("empty", "0b100", "0b110", "full")[rng.integers(4)] if stage == "universal" else "full"
        loss = 2.5 * (1.02 - done) * rng.uniform(1, 1.2) * (2 if budget == "empty" else 1)
        lost = stage == "full" and step == 7
        shown = rng.choice(len(names), size=min(4, len(names)), replace=False)
        row = {f"accuracy/{names[i]}": float(np.clip(done - 0.1 * rng.random() * i / 4, 0, 1)) for i in shown}
        lines.append({"step": step, "loss": None if lost else float(loss), "budget": budget, **row, "seconds": 0.1})
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_everything(folder: Path) -> Path:
    """The workdir of a run with all stages and passes."""
    write_json(folder / "eval" / "test.json", evaluation(folder / "eval"))
    for stage, steps in {"base": 400, "warmup": 300, "full": 300, "universal": 400, "policy": 200}.items():
        (folder / stage).mkdir(parents=True)
        (folder / stage / "metrics.jsonl").write_text(metrics(stage, steps))
        write_json(folder / stage / "complete.json", {"step": steps})
    subsets = []
    for number in sorted(range(8), key=lambda n: (n.bit_count(), n)):
        bits, slots = f"0b{number:03b}", number.bit_count()
        row = budget_row(slots, 0.0131 + 0.0061 * slots)
        kept = {k: row[k] for k in ("easy", "hard", "tasks", "decoder_gflops")}
        subsets.append({"budget": bits, "name": bits, "accuracy": row["hard"], "loss": 1.2 - 0.3 * slots, **kept})
    viable = ["0b000", "0b100", "0b110", "0b111"]
    write_json(folder / "search" / "viable.json", {"num_slots": 3, "viable": viable, "subsets": subsets})
    counts = {"empty": 1700, "0b100": 1500, "0b110": 700, "full": 196}
    by_task = {task: {b: round(400 * share) for b, share in share_of.items()} for task, share_of in routes().items()}
    labels = {"counts": counts, "by_task": by_task, "samples": 4096, "tolerance": 0.01}
    write_json(folder / "labels" / "labels.json", labels)
    write_json(folder / "goodput.json", {"init": 6.2, "compile": 48.0, "step": 301.5, "data_wait": 12.5, "save": 3.1})
    stages = ["base", "warmup", "full", "search", "universal", "label", "policy"]
    config = {
        "name": "almanac_mini",
        "seed": 0,
        "stages": stages,
        "model": {"plan": "visor", "text": {"num_layers": 9}},
    }
    versions = {"python": "3.11.9", "jax": "0.10.2"}
    record = {"config": config, "versions": versions, "git_revision": "0123abc-dirty", "format": FORMAT}
    write_json(folder / "config.json", record)
    comparisons = [{"prompt": "one picture", "budget": name} for name in (*COSTS, "auto")]
    proof = {"bound": 1e-5, "max_logit_difference": 3.1e-6, "greedy_tokens_equal": True, "new_tokens": 64}
    proof |= {"computed_in": "float32", "budgets": [*COSTS, "auto"], "comparisons": comparisons}
    write_json(folder / "export" / "parity.json", proof)
    return folder


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    return write_everything(tmp_path / "run")


@pytest.fixture
def benchmarks_only(tmp_path: Path) -> Path:
    """A run that was evaluated on two benchmarks only, on one of them in part."""
    run = tmp_path / "run"
    docvqa, mme = run / "eval" / "of_docvqa", run / "eval" / "of_mme" / "partial"
    write_json(docvqa / "validation.json", benchmark_result(docvqa, "docvqa") | {"problems": {"embedded": 2}})
    write_json(mme / "test.json", benchmark_result(mme, "mme") | {"questions": {"asked": 12, "of": 2374}})
    return run


@pytest.fixture
def edit_evaluation(full_run: Path) -> Callable[[Callable[[dict[str, Any]], Any]], None]:
    """Changes `eval/test.json` of `full_run` in place."""

    def edit(change: Callable[[dict[str, Any]], Any]) -> None:
        path = full_run / "eval" / "test.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return edit
