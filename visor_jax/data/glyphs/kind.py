"""Opens the generated set for a run: conversations for training, single questions for labels and evaluation.

In: a configuration. Out: `Glyphs` with pictures in the model's size, and the set's row of the source table.
"""

from __future__ import annotations

from typing import Any

from visor_jax.config import Config
from visor_jax.data.glyphs.source import TASKS, Glyphs
from visor_jax.data.source_kind import SourceKind

EVALUATION_CARDS = 8  # the maximum per picture: the hardest pictures of the set


def glyphs_source(config: Config, split: str, **settings: Any) -> Glyphs:
    """Returns pictures in the model's input size; `settings` are those of `Glyphs`."""
    grid = config.model.vision.tile_size // config.model.vision.patch_size
    return Glyphs(split=split, seed=config.seed, grid=grid, **settings)


def _conversations(config: Config, split: str) -> Glyphs:
    data = config.data
    return glyphs_source(config, split, scenes=dict(data.scenes) or None, turns_per_picture=data.turns_per_picture)


def _for_labels(config: Config) -> Glyphs:
    """Returns pictures about one task each, so that all tasks are labeled equally often."""
    return glyphs_source(config, "train", tasks=tuple(TASKS), turns_per_picture=config.data.turns_per_picture)


def _for_evaluation(config: Config, split: str) -> Glyphs:
    """Returns an equal mix of all tasks on the hardest pictures, one question per picture."""
    return glyphs_source(config, split, tasks=tuple(TASKS), turns_per_picture=1, cards=EVALUATION_CARDS)


SOURCE = SourceKind(
    open=_conversations,
    endless=True,
    levels={name: task.level for name, task in TASKS.items()},
    for_labels=_for_labels,
    for_evaluation=_for_evaluation,
    has_patch_labels=True,
)
