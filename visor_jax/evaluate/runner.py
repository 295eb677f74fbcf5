"""Evaluates a trained model on a held-out split: accuracy and cost of every viable budget and the policy.

`evaluate` returns the object that `visor evaluate --json` prints. It also writes it to `eval/<split>.json`
(`eval/<name>/<split>.json` for other data than the run's own), with the dial's curve, the routes by task, and a few
example pictures for the report. `<split>.questions.json` beside it says which questions each budget answers. Of a
source with controls, the first questions are also asked about gray pictures and about those of other questions.
"""

from __future__ import annotations

import copy
import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visor_jax.budget import Bits, Budget, budget_name
from visor_jax.config import Config, ConfigLike, as_config
from visor_jax.data.chat_template import IMAGE_MARKER
from visor_jax.data.controls import CONTROLS, control_questions
from visor_jax.data.fingerprint import fingerprint_of_split
from visor_jax.data.questions import Place, Questions, single_questions
from visor_jax.data.sample import still
from visor_jax.data.skips import SkipLog
from visor_jax.data.source_kind import LEVELS
from visor_jax.data.sources import source_kind, source_label
from visor_jax.errors import RequestError
from visor_jax.evaluate.chunks import ChunkStore
from visor_jax.evaluate.features import FeatureStore
from visor_jax.evaluate.intervals import CONFIDENCE, budget_intervals
from visor_jax.evaluate.scoring import Scores, choices, score
from visor_jax.evaluate.summary import (
    budget_row,
    dense_row,
    kind_rows,
    level_weights,
    per_sample_flops,
    routing_flops,
)
from visor_jax.files.read_write import write_bytes, write_json
from visor_jax.loading import Visor
from visor_jax.scale.distributed import once
from visor_jax.scale.mesh import scoring_mesh
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.supervision import beat

log = logging.getLogger(__name__)

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
    identity = evaluation_identity(config, model, workdir, split)
    chunks = chunks_of(config, model, workdir, identity, name)
    scores = score_questions(config, model, questions, rows, chunks[""], FeatureStore.of(config, workdir))
    controls = score_controls(config, model, split, rows, chunks)
    result = {
        "benchmark": source_label(config),
        "split": split,
        "stage": model.stage,
        "identity": identity,
        "skipped": skips.by_reason(),
        "budgets": budget_rows(model, scores, rows, requested),
        **{control: budget_rows(model, of_control, rows, requested) for control, of_control in controls.items()},
        "levels": {task: scores.levels[task] for task in sorted(set(scores.tasks)) if task in scores.levels},
        "dense": dense_row(model.arch, scores),
    }
    result["intervals"] = intervals(result, {"budgets": scores, **controls})
    answered = {"budgets": question_rows(model, scores, rows, requested)}
    answered |= {control: question_rows(model, of_control, rows, requested) for control, of_control in controls.items()}
    kinds = [questions.facts(Place.of(id)).kind for id in scores.ids]
    if any(kinds):
        answered["budgets"]["kinds"] = kinds
        result["kinds"] = kind_rows(answered["budgets"], scores.levels)
    if model.has_policy:
        picked = policy_picks(model, scores, 0.0)
        result["dial"] = [{"dial": d, **dial_point(model, scores, d)} for d in config.evaluate.dials]
        result["routes"] = routes_by_task(scores, picked)
        result["examples"] = once(lambda: write_examples(folder, model, scores, picked, questions))
    once(lambda: write_json(folder / f"{split}.questions.json", answered))
    once(lambda: write_json(folder / f"{split}.json", result))
    for store in chunks.values():
        store.remove()
    return result


def score_questions(
    config: Config,
    model: Visor,
    questions: Questions,
    rows: Sequence[Bits],
    chunks: ChunkStore,
    features: FeatureStore | None,
) -> Scores:
    """Scores the budgets `rows` on questions, and the policy if the model has one."""
    return score(
        model.params,
        questions.batches(config.evaluate.batch_size),
        rows,
        model.arch,
        mesh=scoring_mesh(config),
        dtype=config.model.dtype,
        routed=model.has_policy,
        levels=source_kind(config).levels,
        chunks=chunks,
        features=features,
    )


def score_controls(
    config: Config, model: Visor, split: str, rows: Sequence[Bits], chunks: Mapping[str, ChunkStore]
) -> dict[str, Scores]:
    """Scores the budgets on replaced pictures: {control: scores}; {} if the source has no controls.

    A control without a usable question, as "shuffled" of one question per task, is missing.
    """
    scores = {}
    for control in CONTROLS if source_kind(config).controls else ():
        questions = control_questions(config, split, control)
        if any(map(questions.has_picture, questions.plan())):
            scores[control] = score_questions(config, model, questions, rows, chunks[control], None)
        else:
            log.warning("evaluate.control_samples: no question of split %s can be asked %s", split, control)
    return scores


def chunks_of(
    config: Config, model: Visor, workdir: Workdir, identity: dict[str, Any], name: str = ""
) -> dict[str, ChunkStore]:
    """Returns the scored chunks of the evaluation with this identity: those of its questions (""), and by control."""
    with_features, folder = FeatureStore.of(config, workdir) is not None, f"eval/{name}"
    own = ChunkStore(workdir, folder, identity, model.stage, with_features=with_features)
    controls = {
        control: ChunkStore(workdir, folder, {**identity, "control": control}, model.stage, with_features=False)
        for control in (CONTROLS if source_kind(config).controls else ())
    }
    return {"": own, **controls}


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


def budget_rows(
    model: Visor, scores: Scores, rows: list[Bits], requested: Mapping[str, Bits | None]
) -> dict[str, dict[str, Any]]:
    """Returns the results of all requested budgets by name."""
    return {name: one_budget(model, scores, rows, bits) for name, bits in requested.items()}


def question_rows(
    model: Visor, scores: Scores, rows: list[Bits], requested: Mapping[str, Bits | None]
) -> dict[str, Any]:
    """Returns which question each budget answers: {"ids", "tasks", "right": {budget: "0101..."}}."""
    right = {}
    for name, bits in requested.items():
        if bits is None:
            correct = scores.correct[policy_picks(model, scores, 0.0), np.arange(len(scores.tasks))]
        else:
            correct = scores.correct[rows.index(bits)]
        right[name] = "".join("01"[int(value)] for value in correct)
    return {"ids": scores.ids, "tasks": scores.tasks, "right": right}


def intervals(result: Mapping[str, Any], scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Returns {"confidence", group: {budget: intervals}} for "budgets" and the controls; see `budget_intervals`."""
    groups = {
        group: {name: budget_intervals(row, of_group.tasks, of_group.levels) for name, row in result[group].items()}
        for group, of_group in scores.items()
    }
    return {"confidence": CONFIDENCE, **groups}


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
    kept = (*(level for level in LEVELS if level in row), "decoder_gflops", "end_to_end_gflops")
    return {"accuracy": accuracy, **{name: row[name] for name in kept}}


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
        question, budget = sample.turns[0].question, Budget.of(bits)
        answer = prompted.answer(list(sample.images), question, budget, max_new_tokens=16, origin=sample.origin)
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
