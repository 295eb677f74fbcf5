"""Measures a model on a list of questions: the scores of every budget, and the figures made of them.

In: a loaded model, a configuration and a split. Out: `Measured`, with the fields of `evaluate --json` that depend on
the answers, and which question each budget answers. Nothing is written, except chunks where they are given.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visor_jax.budget import Bits, Budget, budget_name, check_viable
from visor_jax.config import Config
from visor_jax.data.controls import CONTROLS, control_questions
from visor_jax.data.questions import Place, Questions, single_questions
from visor_jax.data.skips import SkipLog
from visor_jax.data.source_kind import LEVELS
from visor_jax.data.sources import source_kind
from visor_jax.errors import RequestError
from visor_jax.evaluate.against import OtherAnswers
from visor_jax.evaluate.chunks import ChunkStore
from visor_jax.evaluate.dense_start import DENSE_START, dense_figures
from visor_jax.evaluate.features import FeatureStore
from visor_jax.evaluate.intervals import CONFIDENCE, budget_intervals
from visor_jax.evaluate.scoring import Scores, choices, score
from visor_jax.evaluate.summary import (
    budget_row,
    dense_row,
    kind_rows,
    level_weights,
    per_sample_cache,
    per_sample_flops,
    routing_flops,
    shares,
)
from visor_jax.hf.read import Checkpoint
from visor_jax.loading import Visor
from visor_jax.scale.mesh import scoring_mesh

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What a pass over a split has measured.

    Attributes:
      questions: the list of questions.
      scores: of these, under every budget.
      figures: the fields of `evaluate --json` that follow from the scores: "budgets", the controls, "levels", "dense",
        "intervals", and where there are any "kinds", "dial", "routes" and "shares".
      answered: by "budgets" and control: {"ids", "tasks", "right": {budget: "0101..."}}; of the budgets also "digests",
        and "kinds" if there are any.
    """

    questions: Questions
    scores: Scores
    figures: dict[str, Any]
    answered: dict[str, Any]


def measure(
    config: Config,
    model: Visor,
    split: str,
    requested: Mapping[str, Bits | None],
    *,
    skips: SkipLog | None = None,
    start: Visor | None = None,
    chunks: Mapping[str, ChunkStore] | None = None,
    features: FeatureStore | None = None,
    against: OtherAnswers | None = None,
) -> Measured:
    """Scores `model` on the questions of a split, and on its controls if the source has them.

    Args:
      requested: name -> bits of the budgets; None: the policy's choice (`requested_budgets`).
      skips: counts questions that cannot be used.
      chunks: where the scores of the questions ("") and of each control are kept; None: nowhere.
      features: where visual tokens of the questions are kept.
      against: another run's answers to the same questions.

    Raises:
      RequestError: there is no usable question, or `against` has other questions.
    """
    questions = single_questions(config, split, config.evaluate.samples, skips)
    if against:
        against.check_questions({place.id: questions.facts(place).digest for place in questions.plan()})
    rows = list(dict.fromkeys([*model.viable_budgets, *(bits for bits in requested.values() if bits is not None)]))
    scores = score_questions(config, model, questions, rows, chunks[""] if chunks else None, features)
    groups = {"budgets": scores, **score_controls(config, model, split, rows, chunks or {})}
    answered = {group: question_rows(model, of_group, rows, requested) for group, of_group in groups.items()}
    figures: dict[str, Any] = {
        group: budget_rows(model, of_group, rows, requested) for group, of_group in groups.items()
    }
    figures["levels"] = {task: scores.levels[task] for task in sorted(set(scores.tasks)) if task in scores.levels}
    figures["dense"] = dense_row(model.arch, scores)
    figures["intervals"] = intervals(figures, groups)
    if start is not None:
        of_start = score_questions(config, start, questions, [()], (chunks or {}).get(DENSE_START), None)
        accuracies, limits = dense_figures(of_start)
        figures["dense"] |= accuracies
        figures["intervals"]["dense"] = limits
    facts = [questions.facts(Place.of(id)) for id in scores.ids]
    answered["budgets"]["digests"] = [of_one.digest for of_one in facts]
    if any(kinds := [of_one.kind for of_one in facts]):
        answered["budgets"]["kinds"] = kinds
        figures["kinds"] = kind_rows(answered["budgets"], scores.levels)
    if model.has_policy:
        figures["dial"] = [{"dial": d, **dial_point(model, scores, d)} for d in config.evaluate.dials]
        picked = policy_picks(model, scores, 0.0)
        figures["routes"] = routes_by_task(scores, picked)
        figures["shares"] = shares([budget_name(scores.budgets[index]) for index in picked])
    return Measured(questions, scores, figures, answered)


def score_questions(
    config: Config,
    model: Visor,
    questions: Questions,
    rows: Sequence[Bits],
    chunks: ChunkStore | None,
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
            scores[control] = score_questions(config, model, questions, rows, chunks.get(control), None)
        else:
            log.warning("evaluate.control_samples: no question of split %s can be asked %s", split, control)
    return scores


def requested_budgets(model: Visor | Checkpoint, names: Sequence[str] | None) -> dict[str, Bits | None]:
    """Maps budget name -> bits; "auto" -> None. A dense model has "full" alone, which "auto" is too.

    Raises:
      RequestError: there is no such budget, or no policy.
    """
    if model.arch.plan == "dense":
        if other := [name for name in names or () if str(Budget.parse(name)) not in ("full", "auto")]:
            raise RequestError(f"budget={other[0]}: the model is dense and has one budget; expected full")
        return {"full": ()}
    if names is None:
        viable: dict[str, Bits | None] = {budget_name(bits): bits for bits in model.viable_budgets}
        return {**viable, "auto": None} if model.has_policy else viable
    parsed = [Budget.parse(name) for name in names]
    if "auto" in map(str, parsed) and not model.has_policy:
        raise RequestError(f"budget=auto: stage {model.stage!r} has no trained policy; name other budgets")
    bits = [None if str(b) == "auto" else b.resolve(model.arch.num_slots, model.viable_budgets) for b in parsed]
    return {"auto" if b is None else budget_name(b): b for b in bits}


def requested_viable(model: Visor | Checkpoint, name: str, *, searched: bool) -> dict[str, Bits | None]:
    """Returns one requested budget, as `requested_budgets`; of a `searched` model a viable one.

    Raises:
      RequestError: there is no such budget, it is not viable, or there is no policy.
    """
    requested = requested_budgets(model, [name])
    (bits,) = requested.values()
    if bits and searched:
        check_viable(bits, model.viable_budgets, has_policy=model.has_policy)
    return requested


def one_budget(model: Visor, scores: Scores, rows: list[Bits], bits: Bits | None) -> dict[str, Any]:
    """Returns the result of one budget, or of the policy if `bits` is None; `rows` are the budgets of `scores`."""
    if bits is None:
        return policy_row(model, scores, policy_picks(model, scores, 0.0))
    row = rows.index(bits)
    flops, cached = per_sample_flops(model.arch, bits, scores), per_sample_cache(model.arch, bits, scores)
    return budget_row(model.arch, scores, scores.correct[row], flops, cached)


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
        correct = (
            policy_correct(scores, policy_picks(model, scores, 0.0))
            if bits is None
            else scores.correct[rows.index(bits)]
        )
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


def policy_correct(scores: Scores, picked: np.ndarray) -> np.ndarray:
    """Returns whether each sample is answered under the budget picked for it, bool [N]."""
    return scores.correct[picked, np.arange(len(picked))]


def policy_row(model: Visor, scores: Scores, picked: np.ndarray) -> dict[str, Any]:
    """Returns the result of the policy's choices; the FLOPs include the policy's."""
    samples = np.arange(len(picked))
    flops = viable_costs(model, scores)[picked, samples] + routing_flops(model.arch, scores)
    cached = np.stack([per_sample_cache(model.arch, bits, scores) for bits in model.viable_budgets])[picked, samples]
    return budget_row(model.arch, scores, policy_correct(scores, picked), flops, cached)


def dial_point(model: Visor, scores: Scores, dial: float) -> dict[str, Any]:
    """Returns accuracy and costs at one dial value, a point of the report's curve."""
    picked = policy_picks(model, scores, dial)
    row, correct = policy_row(model, scores, picked), policy_correct(scores, picked)
    accuracy = float(np.sum(correct * level_weights(scores.tasks, scores.levels)))
    kept = (*(level for level in LEVELS if level in row), "decoder_gflops", "end_to_end_gflops")
    return {"accuracy": accuracy, **{name: row[name] for name in kept}}


def routes_by_task(scores: Scores, picked: np.ndarray) -> dict[str, dict[str, float]]:
    """Maps task -> {budget name: fraction of its samples}."""
    names = [budget_name(scores.budgets[i]) for i in picked]
    return {
        task or "all": shares([name for name, t in zip(names, scores.tasks, strict=True) if t == task])
        for task in sorted(set(scores.tasks))
    }
