"""Opens the data set for a run: conversations for training, single questions for labels and evaluation.

In: a configuration. Out: `Almanac` with pages of the model's tile size, and the set's row of the source table.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from visor_jax.config import Config
from visor_jax.config.rules import parse_grids
from visor_jax.data.almanac.draw import Draws
from visor_jax.data.almanac.exercises import Exercise
from visor_jax.data.almanac.layout import Look, Shape
from visor_jax.data.almanac.questions import TASKS, questions
from visor_jax.data.almanac.source import Almanac, Row, check_kinds, exercise_of
from visor_jax.data.source_kind import SPLITS, SourceKind
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.errors import RequestError

log = logging.getLogger(__name__)

_DRAWN = 100  # pages of each kind that are searched for a task: where a kind answers one, at least a tenth of them do


def _almanac(config: Config, split: str, **settings: Any) -> Almanac:
    data, vision = config.data, config.model.vision
    row = Row(data.text_length, data.visual_length, vision.tile_size // vision.patch_size, vision.patch_size)
    settings = {"turns": data.turns_per_picture, "exercise": data.path or "pages", **settings}
    settings |= {"kinds": data.kinds, "faces": data.fonts, "jitter": data.jitter, "mixed": data.mixed_share}
    tokenizer = load_tokenizer(config.tokenizer.path)
    return Almanac(split, config.seed, tokenizer, row, independent=data.independent_turns, **settings)


def _conversations(config: Config, split: str) -> Almanac:
    return _almanac(config, split)


def _for_labels(config: Config) -> Almanac:
    """Returns pictures about one task each, so that all tasks are labeled equally often."""
    return _almanac(config, "train", tasks=_tasks(config))


def _for_evaluation(config: Config, split: str) -> Almanac:
    """Returns an equal mix of the exercise's tasks, one question per picture."""
    return _almanac(config, split, tasks=_tasks(config), turns=1)


def _tasks(config: Config) -> tuple[str, ...]:
    """Returns the tasks that the configured exercise asks, transcription included, and its kinds of pages answer."""
    return answered_tasks(config.data.path or "pages", config.data.kinds, config.data.mixed_share)


@functools.lru_cache
def answered_tasks(path: str, kinds: tuple[str, ...] = (), mixed: float = 0.3) -> tuple[str, ...]:
    """Returns the tasks of an exercise that pages of these kinds (empty: all of the exercise) answer; logs the others.

    Mixed content can answer all tasks of its kind. Without any (`mixed` is 0), a task counts if every split has tables
    for it that fit.

    Raises:
      RequestError: a name is unknown.
    """
    exercise = exercise_of(path)
    check_kinds(exercise, kinds)
    tasks = tuple(dict.fromkeys((*exercise.weights, "read")))
    left: set[str] = set()
    for split in ("train",) if mixed else SPLITS:
        left |= _unanswered(exercise, exercise.shape.only(kinds), Look(split, exercise.faces, 1, mixed), tasks)
    if not left:
        return tasks
    log.warning(
        "almanac: pages of data.path=%r with data.kinds=%r and data.mixed_share=%g answer no question of these tasks,"
        " which search, labels and evaluation leave out: %s",
        path,
        kinds,
        mixed,
        ", ".join(task for task in tasks if task in left),
    )
    return tuple(task for task in tasks if task not in left)


def _unanswered(exercise: Exercise, shape: Shape, look: Look, tasks: Sequence[str]) -> set[str]:
    """Returns the tasks that no page of this look answers."""
    left = set(tasks)
    for index in range(_DRAWN):
        for kind in shape.kinds:
            facts = exercise.draw(Draws(0, 1, index), shape.only((kind,)), look).facts
            left -= {task for task in left if questions(task, facts)}
            if not left:
                return left
    return left


def _check(config: Config) -> None:
    """Raises RequestError if a name is unknown or the model's tiles do not hold the exercise's pictures."""
    exercise, vision = exercise_of(config.data.path), config.model.vision
    sides = (exercise.shape.height, *exercise.shape.width)
    grids = () if exercise.small else parse_grids(config.model.anyres.pinpoints)
    largest = vision.tile_size * max((min(grid) for grid in grids), default=1)
    if largest < max(sides) or any(side % vision.patch_size for side in sides):
        raise RequestError(
            f"model.vision.tile_size={vision.tile_size}, model.vision.patch_size={vision.patch_size}:"
            f" data.source='almanac' with data.path={config.data.path!r} draws pictures of {sides[0]} x {sides[-1]}"
            f" pixels; expected a tile of at least {max(sides)} pixels (or of pages, a grid of tiles in"
            " model.anyres.pinpoints) and a patch size that divides them, such as 12"
        )
    _conversations(config, "train")


SOURCE = SourceKind(
    open=_conversations,
    endless=True,
    controls=True,
    levels={name: task.level for name, task in TASKS.items()},
    tasks=_tasks,
    for_labels=_for_labels,
    for_evaluation=_for_evaluation,
    check=_check,
)
