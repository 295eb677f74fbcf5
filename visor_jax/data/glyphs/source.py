"""`glyphs`, the generated default data set: small pictures of letters, digits, shapes and arrows, with questions.

In: a split, a seed and an index. Out: a `Sample`, a pure function of the three; nothing is stored. One patch answers an
easy task; hard tasks need relations between patches. So the data set shows the effect of a self-attention budget in
minutes on a CPU. `relation_grid` generates the labeled grids on which the `base` stage trains, in place of pretraining.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from visor_jax.data.draws import STREAM_LENGTH
from visor_jax.data.glyphs.render import BACKGROUNDS, COLORS, GLYPHS, LEFT, UP, render
from visor_jax.data.glyphs.scenes import MAX_CARDS, MIN_CARDS, MIN_GRID, SCENES, Facts, Scene
from visor_jax.data.glyphs.words import PHRASINGS, TASKS, Task
from visor_jax.data.sample import NO_PICTURE, Sample, Turn
from visor_jax.errors import RequestError, nearest

__all__ = [
    "GRID", "SPLITS", "TASKS", "Glyphs", "RelationGrid", "Task",
    "background_names", "color_names", "glyph_names", "relation_grid",
]  # fmt: skip

GRID = 9  # patches per side
SPLITS = ("train", "validation", "test")
HOPS = 3  # the longest chain of arrows

_RELATIONS = len(SPLITS)  # the random stream of `relation_grid`; the splits have the numbers before it
_WORD = 2**32  # a seed is one 32-bit word and an index at most two, so that no two streams coincide
_MAX_SIZE = 2**62  # samples per stream; well within a signed 64-bit index


def glyph_names() -> tuple[str, ...]:
    """Returns the names of the glyphs by id; id 0 is "empty". Each is one token of the glyph tokenizer."""
    return GLYPHS


def color_names() -> tuple[str, ...]:
    """Returns the names of the glyphs' colors by id."""
    return tuple(COLORS)


def background_names() -> tuple[str, ...]:
    """Returns the names of the backgrounds by id."""
    return tuple(BACKGROUNDS)


class Glyphs:
    """Random access to generated samples.

    The scene or task of a sample depends only on its index, in a fixed cycle, so any run of consecutive indices has the
    requested mix. All else is drawn from (seed, split, index).
    """

    name = "glyphs"

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        *,
        scenes: Mapping[str, int] | None = None,
        tasks: Sequence[str] | None = None,
        turns_per_picture: int = 4,
        cards: int | None = None,
        grid: int = GRID,
        size: int = STREAM_LENGTH,
    ) -> None:
        """Defines a stream of samples; generates none yet.

        Args:
          split: "train", "validation" or "test"; their streams share no sample.
          seed: from 0 to 2**32 - 1.
          scenes: scene -> integer weight; a scene that is missing or has weight 0 does not occur. None: all, equally
            often. The questions of a conversation alternate between the tasks of its scene.
          tasks: instead of `scenes`: sample i asks only about task `tasks[i % len(tasks)]`.
          turns_per_picture: questions per picture. No question is repeated, so a picture with few facts may get fewer.
          cards: letters or cards per picture, 2 to 8; None draws a number for each picture.
          grid: patches per side, at least 6.
          size: number of samples, up to 2**62.

        Raises:
          RequestError: an argument is out of range, or names an unknown split, scene or task.
        """
        _choose("split", split, SPLITS)
        _within("seed", seed, 0, _WORD - 1)
        _within("turns_per_picture", turns_per_picture, 1, None)
        _within("grid", grid, MIN_GRID, None)
        _within("size", size, 1, _MAX_SIZE)
        if cards is not None:
            _within("cards", cards, MIN_CARDS, MAX_CARDS)
        if scenes is not None and tasks is not None:
            raise RequestError("glyphs: give scenes or tasks, not both")
        self.split, self.seed, self.grid, self.cards = split, seed, grid, cards
        self.turns_per_picture = turns_per_picture
        self._size = size
        self._cycle = _task_cycle(tasks) if tasks is not None else _scene_cycle(scenes)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        """Generates sample `index`; raises IndexError outside 0..len-1."""
        sample, rng, scene = self._draw(index)
        image = render(rng, scene.glyphs, scene.colors, scene.background)
        return dataclasses.replace(sample, images=(image,))

    def outline(self, index: int) -> Sample:
        """Returns sample `index` without rendering its picture."""
        return self._draw(index)[0]

    def _draw(self, index: int) -> tuple[Sample, np.random.Generator, Scene]:
        """Returns a sample without its picture, and the generator and scene to render the picture from."""
        index = operator.index(index)
        if not 0 <= index < self._size:
            raise IndexError(f"glyphs: no sample {index}, there are {self._size}")
        rng = _generator(self.seed, SPLITS.index(self.split), index)
        scene_name, tasks = self._cycle[index % len(self._cycle)]
        count = int(rng.integers(MIN_CARDS, MAX_CARDS + 1)) if self.cards is None else self.cards
        scene = SCENES[scene_name](rng, self.grid, count)
        sample = Sample(
            id=f"glyphs/{self.split}/{self.seed}/{index}",
            images=(NO_PICTURE,),
            turns=_ask(rng, scene.facts, tasks, self.turns_per_picture),
            source=self.name,
            level=TASKS[tasks[0]].level,
        )
        return sample, rng, scene


@dataclass(frozen=True)
class RelationGrid:
    """A random grid of glyphs and arrows, and the labels of each patch. N = grid * grid, row by row.

    Attributes:
      image: uint8 [grid * 8, grid * 8, 3].
      glyphs: int32 [N], ids into `glyph_names()`, 0 where empty.
      colors: int32 [N], ids into `color_names()`, 0 where empty.
      background: id into `background_names()`.
      reached: int32 [3, N], id of the glyph reached after following arrows 1, 2, 3 times; others lead to themselves.
      is_arrow: bool [N].
    """

    image: np.ndarray
    glyphs: np.ndarray
    colors: np.ndarray
    background: int
    reached: np.ndarray
    is_arrow: np.ndarray


def relation_grid(seed: int, index: int, grid: int = GRID) -> RelationGrid:
    """Generates labeled grid `index` for the `base` stage, a pure function of its arguments.

    A quarter of the patches are up arrows, a quarter left arrows; none points out of the picture. Of the rest a fifth
    is empty and the others hold any glyph except arrows.
    """
    rng = _generator(seed, _RELATIONS, index)
    glyphs = rng.integers(1, UP, (grid, grid)) * (rng.random((grid, grid)) < 0.8)
    kind = rng.random((grid, grid))
    up, left = kind < 0.25, kind > 0.75
    up[0], left[:, 0] = False, False
    glyphs[up], glyphs[left] = UP, LEFT
    colors = rng.integers(0, len(COLORS), (grid, grid)) * (glyphs > 0)
    background = int(rng.integers(len(BACKGROUNDS)))
    image = render(rng, glyphs, colors, background)

    flat = glyphs.reshape(-1).astype(np.int32)
    step = np.arange(grid * grid) - grid * (flat == UP) - (flat == LEFT)
    reached = [step]
    for _ in range(HOPS - 1):
        reached.append(step[reached[-1]])
    return RelationGrid(
        image=image,
        glyphs=flat,
        colors=colors.reshape(-1).astype(np.int32),
        background=background,
        reached=flat[np.stack(reached)],
        is_arrow=(flat == UP) | (flat == LEFT),
    )


def _generator(seed: int, stream: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, index))))


def _ask(rng: np.random.Generator, facts: Facts, tasks: tuple[str, ...], number: int) -> tuple[Turn, ...]:
    """Asks up to `number` different questions, alternating between the tasks in a random order."""
    queues = [(task, [facts[task][i] for i in rng.permutation(len(facts[task]))]) for task in tasks]
    queues = [queues[i] for i in rng.permutation(len(queues))]
    turns: list[Turn] = []
    while queues and len(turns) < number:
        task, queue = queues.pop(0)
        if queue:
            question, answer = PHRASINGS[task][int(rng.integers(len(PHRASINGS[task])))]
            fact = queue.pop()
            turns.append(Turn(question.format_map(fact), answer.format_map(fact), task))
            queues.append((task, queue))
    return tuple(turns)


def _task_cycle(tasks: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the cycle of (scene, its tasks) for samples that ask about one task each."""
    if isinstance(tasks, str) or not tasks:
        raise RequestError(f"glyphs: tasks must be a list of tasks, got {tasks!r}; known: {', '.join(TASKS)}")
    for task in tasks:
        _choose("task", task, tuple(TASKS))
    return [(TASKS[task].scene, (task,)) for task in tasks]


def _scene_cycle(weights: Mapping[str, int] | None) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the cycle of (scene, its tasks): each scene as often as its weight, spread evenly."""
    weights = dict.fromkeys(SCENES, 1) if weights is None else weights
    for scene, weight in weights.items():
        _choose("scene", scene, tuple(SCENES))
        _within(f"weight of scene {scene}", weight, 0, 1000)
    total = sum(weights.values())
    if not total:
        raise RequestError(f"glyphs: no scene has a weight; known: {', '.join(SCENES)}")
    # Smooth weighted round robin: every scene earns its weight; the one with the most credit is next and pays `total`.
    credit = dict.fromkeys(weights, 0)
    cycle = []
    for _ in range(total):
        for scene, weight in weights.items():
            credit[scene] += weight
        chosen = max(credit, key=lambda scene: credit[scene])
        credit[chosen] -= total
        cycle.append((chosen, tuple(name for name, task in TASKS.items() if task.scene == chosen)))
    return cycle


def _choose(what: str, value: str, known: tuple[str, ...]) -> None:
    """Raises RequestError unless `value` is one of `known`."""
    if value not in known:
        hint = nearest(value, known)
        raise RequestError(
            f"glyphs: unknown {what} {value!r}; expected one of {', '.join(known)}" + (f" ({hint})" if hint else "")
        )


def _within(what: str, value: int, low: int, high: int | None) -> None:
    """Raises RequestError unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        upper = "" if high is None else f" to {high}"
        raise RequestError(f"glyphs: {what} must be a whole number from {low}{upper or ' up'}, got {value!r}")
