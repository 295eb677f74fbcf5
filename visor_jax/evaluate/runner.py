"""Evaluates a trained model on a held-out split: accuracy and cost of every viable budget and the policy.

`evaluate` returns the object that `visor evaluate --json` prints. It also writes it to `eval/<split>.json`
(`eval/<name>/<split>.json` for other data than the run's own), with the dial's curve, the routes by task, and a few
example pictures for the report.
"""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from visor_jax.budget import Bits, Budget, budget_name
from visor_jax.config import Config, ConfigLike, as_config
from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.fingerprint import fingerprint_of_split
from visor_jax.data.questions import Questions, single_questions
from visor_jax.data.sample import still
from visor_jax.data.skips import SkipLog
from visor_jax.data.sources import source_kind, source_label
from visor_jax.errors import RequestError, printable
from visor_jax.evaluate.chunks import ChunkStore
from visor_jax.evaluate.features import FeatureStore
from visor_jax.evaluate.scoring import Scores, choices, score
from visor_jax.evaluate.summary import budget_row, dense_row, level_weights, per_sample_flops, routing_flops
from visor_jax.files.read_write import write_bytes, write_json
from visor_jax.loading import Visor
from visor_jax.scale.distributed import once
from visor_jax.scale.mesh import scoring_mesh
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.supervision import beat

EXAMPLES_PER_TASK = 2


def evaluate(
    config: ConfigLike,
    model: Visor,
    workdir: Workdir,
    *,
    split: str = "test",
    budgets: Sequence[str] | None = None,
    name: str = "",
) -> dict[str, Any]:
    """Scores `model` on a split and writes `eval/<split>.json`.

    Args:
      budgets: names of the budgets to evaluate; None means every viable one, and "auto" if the model has a policy.
      name: name of the data if not the run's own; results go to this folder below `eval/`.

    Raises:
      RequestError: a budget is unknown or needs a policy, or there is no usable question.
    """
    config = as_config(config)
    requested, folder = requested_budgets(model, budgets), workdir.path / "eval" / name  # reports mistakes first
    skips = SkipLog()
    questions = single_questions(config, split, config.evaluate.samples, skips)
    rows = list(dict.fromkeys([*model.viable_budgets, *(bits for bits in requested.values() if bits is not None)]))
    batches = questions.batches(config.evaluate.batch_size)
    mesh, dtype = scoring_mesh(config), config.model.dtype
    levels, routed = source_kind(config).levels, model.has_policy
    identity = evaluation_identity(config, model, workdir, split)
    features = FeatureStore.of(config, workdir)
    chunks = chunks_of(config, model, workdir, identity, name)
    scores = score(
        model.params,
        batches,
        rows,
        model.arch,
        mesh=mesh,
        dtype=dtype,
        routed=routed,
        levels=levels,
        chunks=chunks,
        features=features,
    )
    result = {
        "benchmark": source_label(config),
        "split": split,
        "stage": model.stage,
        "identity": identity,
        "skipped": skips.by_reason(),
        "budgets": {name: one_budget(model, scores, rows, bits) for name, bits in requested.items()},
        "levels": {task: scores.levels[task] for task in sorted(set(scores.tasks)) if task in scores.levels},
        "dense": dense_row(model.arch, scores),
    }
    if model.has_policy:
        picked = policy_picks(model, scores, 0.0)
        result["dial"] = [{"dial": d, **dial_point(model, scores, d)} for d in config.evaluate.dials]
        result["routes"] = routes_by_task(scores, picked)
        result["examples"] = once(lambda: write_examples(folder, model, scores, picked, questions))
    once(lambda: write_json(folder / f"{split}.json", result))
    chunks.remove()
    return result


def chunks_of(config: Config, model: Visor, workdir: Workdir, identity: dict[str, Any], name: str = "") -> ChunkStore:
    """Returns the scored chunks of the evaluation with this identity."""
    with_features = FeatureStore.of(config, workdir) is not None
    return ChunkStore(workdir, f"eval/{name}", identity, model.stage, with_features=with_features)


def evaluation_identity(config: ConfigLike, model: Visor, workdir: Workdir, split: str) -> dict[str, Any]:
    """Identifies what an evaluation depends on: the run's model, the settings, and the current data."""
    config = as_config(config)
    pictures = fingerprint_of_split(config, split)
    return workdir.identity(config, "evaluate", model=model.stage, pictures=pictures)


def requested_budgets(model: Visor, names: Sequence[str] | None) -> dict[str, Bits | None]:
    """Maps budget name -> bits; "auto" -> None."""
    if model.arch.plan == "dense":
        return {"full": ()}
    if names is None:
        viable: dict[str, Bits | None] = {budget_name(bits): bits for bits in model.viable_budgets}
        return {**viable, "auto": None} if model.has_policy else viable
    parsed = [Budget.parse(name) for name in names]
    if "auto" in map(str, parsed) and not model.has_policy:
        raise RequestError(f"budget=auto: stage {model.stage!r} has no trained policy; name other budgets")
    bits = [None if str(b) == "auto" else b.resolve(model.arch.num_slots, model.viable_budgets) for b in parsed]
    return {"auto" if b is None else budget_name(b): b for b in bits}


def one_budget(model: Visor, scores: Scores, rows: list[Bits], bits: Bits | None) -> dict[str, Any]:
    """Returns the result of one budget, or of the policy if `bits` is None; `rows` are the budgets of `scores`."""
    if bits is None:
        return dial_rows(model, scores, 0.0)
    row = rows.index(bits)
    return budget_row(model.arch, scores, scores.correct[row], per_sample_flops(model.arch, bits, scores))


def viable_costs(model: Visor, scores: Scores) -> np.ndarray:
    """Returns decoder FLOPs [viable, N]."""
    return np.stack([per_sample_flops(model.arch, bits, scores) for bits in model.viable_budgets])


def policy_picks(model: Visor, scores: Scores, dial: float) -> np.ndarray:
    """Returns the index into `model.viable_budgets` that the policy picks for every sample [N]."""
    return choices(scores, viable_costs(model, scores).T, dial)


def dial_rows(model: Visor, scores: Scores, dial: float) -> dict[str, Any]:
    """Returns the result of the policy's choices at a dial value; the FLOPs include the policy's."""
    picked, samples = policy_picks(model, scores, dial), np.arange(len(scores.tasks))
    flops = viable_costs(model, scores)[picked, samples] + routing_flops(model.arch, scores)
    return budget_row(model.arch, scores, scores.correct[picked, samples], flops)


def dial_point(model: Visor, scores: Scores, dial: float) -> dict[str, Any]:
    """Returns accuracy and costs at one dial value, a point of the report's curve."""
    row = dial_rows(model, scores, dial)
    picked, samples = policy_picks(model, scores, dial), np.arange(len(scores.tasks))
    accuracy = float(np.sum(scores.correct[picked, samples] * level_weights(scores.tasks, scores.levels)))
    return {"accuracy": accuracy, **{k: row[k] for k in ("easy", "hard", "decoder_gflops", "end_to_end_gflops")}}


def routes_by_task(scores: Scores, picked: np.ndarray) -> dict[str, dict[str, float]]:
    """Maps task -> {budget name: fraction of its samples}."""
    names = [budget_name(scores.budgets[i]) for i in picked]
    routes = {}
    for task in sorted(set(scores.tasks)):
        counts = Counter(name for name, t in zip(names, scores.tasks, strict=True) if t == task)
        routes[task or "all"] = {name: count / counts.total() for name, count in sorted(counts.items())}
    return routes


def write_examples(
    folder: Path, model: Visor, scores: Scores, picked: np.ndarray, questions: Questions
) -> list[dict[str, Any]]:
    """Answers a few questions of every task and writes their pictures to `examples/` in the folder.

    Of several pictures the first is written, of a video its first frame; "image" is "" if there is none.
    """
    num_examples, examples = Counter[str](), []
    for index, (id, task) in enumerate(zip(scores.ids, scores.tasks, strict=True)):
        if num_examples[task] >= EXAMPLES_PER_TASK:
            continue
        beat()
        num_examples[task] += 1
        sample, bits = questions.find(id), model.viable_budgets[picked[index]]
        prompted = with_system(model, sample.system)
        answer = prompted.answer(list(sample.images), sample.turns[0].question, Budget.of(bits), max_new_tokens=16)
        name = f"examples/{index}.png" if sample.images else ""
        if sample.images:
            write_bytes(folder / name, png(still(sample.images[0])))
        examples.append(
            {
                "index": index,
                "image": name,
                "question": sample.turns[0].question.replace(IMAGE_MARKER, "").strip(),
                "answer": sample.turns[0].answer,
                "prediction": answer.text,
                "budget": budget_name(bits),
                "task": task,
                "decoder_gflops": answer.decoder_flops / 1e9,
            }
        )
    return examples


def with_system(model: Visor, system: str) -> Visor:
    """Returns the model with a record's own system text, if it has one."""
    if not system:
        return model
    model = copy.copy(model)
    model.system = system
    return model


def png(image: np.ndarray) -> bytes:
    """Encodes an image (uint8 [height, width, 3]) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def print_budgets(result: dict[str, Any]) -> None:
    """Prints a table of accuracy and cost of every budget."""
    dense = result["dense"]
    graded, rows = bool(result["levels"]), []
    unit, factor = flops_unit(row["decoder_gflops"] for row in result["budgets"].values())
    for name, row in result["budgets"].items():
        accuracies = [percent(row["easy"]), percent(row["hard"])] if graded else [percent(mean(row["tasks"].values()))]
        saving = dense["decoder_gflops"] / row["decoder_gflops"], dense["end_to_end_gflops"] / row["end_to_end_gflops"]
        costs = [f"{row['decoder_gflops'] * factor:.2f}", f"{saving[0]:.2f}x", f"{saving[1]:.2f}x"]
        rows.append([name, *accuracies, *costs])
    title = f"{result['benchmark']}, {result['split']} split: {row['samples']} questions"
    columns = ["budget", *(("easy %", "hard %") if graded else ("right %",))]
    print_table(title, [*columns, f"decoder {unit}", "saving, decoder", "saving, end to end"], rows)


def flops_unit(gflops: Iterable[float]) -> tuple[str, float]:
    """Returns the largest unit in which every number of GFLOPs is at least 1, and the factor that converts to it."""
    smallest = min(gflops)
    units = [("TFLOP", 1e-3), ("GFLOP", 1.0), ("MFLOP", 1e3)]
    return next(((name, factor) for name, factor in units if smallest * factor >= 1), units[-1])


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    def cell(text: str) -> Text:
        return Text(printable(text))  # not parsed as markup, which names of tasks may contain

    table = Table(title=cell(title))
    for index, column in enumerate(columns):
        table.add_column(cell(column), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(cell, row))
    Console().print(table)
