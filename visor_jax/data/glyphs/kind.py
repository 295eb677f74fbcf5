"""How a run draws from the generated set: conversations to train on, single questions to label and to evaluate.

In: a configuration. Out: `Glyphs` with its pictures in the model's size, and the set's row of the source table.
"""

from __future__ import annotations

from typing import Any

from visor_jax.config import Config
from visor_jax.data.glyphs.source import TASKS, Glyphs
from visor_jax.data.source_kind import SourceKind

EVALUATION_CARDS = 8  # the most that a picture holds: the hard end of the set


def glyphs_source(config: Config, split: str, **settings: Any) -> Glyphs:
    """Pictures of the size that the model takes; `settings` are those of `Glyphs`."""
    grid = config.model.vision.tile_size // config.model.vision.patch_size
    return Glyphs(split=split, seed=config.seed, grid=grid, **settings)


def _conversations(config: Config, split: str) -> Glyphs:
    data = config.data
    return glyphs_source(config, split, scenes=dict(data.scenes) or None, turns_per_picture=data.turns_per_picture)


def _for_labels(config: Config) -> Glyphs:
    """Pictures about one task each, so that every task is labeled equally often."""
    return glyphs_source(config, "train", tasks=tuple(TASKS), turns_per_picture=config.data.turns_per_picture)


def _for_evaluation(config: Config, split: str) -> Glyphs:
    """An equal mix of all tasks at the hard end, one question per picture."""
    return glyphs_source(config, split, tasks=tuple(TASKS), turns_per_picture=1, cards=EVALUATION_CARDS)


SOURCE = SourceKind(
    open=_conversations,
    endless=True,
    levels={name: task.level for name, task in TASKS.items()},
    for_labels=_for_labels,
    for_evaluation=_for_evaluation,
    has_patch_labels=True,
)
