"""Tests of `visor_jax.data.glyphs.source`: pictures are decoded from pixels, and every answer is checked on them."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visor_jax.data.glyphs import render as glyphs_render
from visor_jax.data.glyphs.source import (
    SPLITS,
    TASKS,
    Glyphs,
    background_names,
    color_names,
    glyph_names,
    relation_grid,
)
from visor_jax.data.sample import NO_PICTURE, Sample, Turn, outline
from visor_jax.errors import RequestError

LETTERS, DIGITS, SHAPES = "ABCDEFHK", "12345678", ("circle", "square", "triangle", "cross", "ring")
MOVES = {"up": (-1, 0), "left": (0, -1)}
SCENES = tuple({about.scene: None for about in TASKS.values()})

# --- reading a picture ------------------------------------------------------------------------------------------------

T = TypeVar("T")
Grid = dict[tuple[int, int], tuple[str, str]]  # place -> (glyph, color), without empty patches


def quiet(offset: int) -> Any:
    """A random generator without pixel noise and with a given jitter."""

    def integers(low: int, high: int, size: Any, dtype: Any = np.int64) -> np.ndarray:
        # Bytes with a mean of 127.5 give no pixel noise.
        return np.full(size, 0x7F7F8080 if high == 2**32 else offset, dtype)

    return SimpleNamespace(integers=integers, standard_normal=np.zeros)


def templates() -> tuple[list[tuple[str, str, str]], np.ndarray]:
    """Returns every (glyph, color, background) at every offset, and its patch: float32 [N, 192]."""
    labels, patches = [], []
    count = len(glyph_names()) * len(color_names())
    glyphs, colors = np.divmod(np.arange(count), len(color_names()))
    for offset, background in itertools.product(range(4), range(len(background_names()))):
        for glyph, color in zip(glyphs, colors, strict=True):
            square = np.full((1, 1), glyph), np.full((1, 1), color)
            patches.append(glyphs_render.render(quiet(offset), *square, background).reshape(-1))
            labels.append((glyph_names()[glyph], color_names()[color], background_names()[background]))
    return labels, np.array(patches, np.float32)


LABELS, PATCHES = templates()
SQUARES = (PATCHES**2).sum(1)


def read(image: np.ndarray) -> tuple[Grid, str]:
    """Returns a picture's glyphs and background, by the nearest template of each patch."""
    side = image.shape[0] // 8
    patches = image.reshape(side, 8, side, 8, 3).transpose(0, 2, 1, 3, 4).reshape(side * side, -1).astype(np.float32)
    distances = SQUARES - 2 * patches @ PATCHES.T
    actual = [LABELS[i] for i in distances.argmin(1)]
    (background,) = {label[2] for label in actual}
    grid = {divmod(i, side): label[:2] for i, label in enumerate(actual) if label[0] != "empty"}
    return grid, background


def the_only(actual: Iterable[T]) -> T:
    (one,) = actual
    return one


def find(grid: Grid, glyph: str) -> tuple[int, int]:
    return the_only(place for place, (name, _) in grid.items() if name == glyph)


def solve(grid: Grid, background: str, turn: Turn) -> str:
    """Returns the answer, computed from the picture; fails if it is not unique."""
    letter = (re.findall(r"\b[A-K]\b", turn.question) or [""])[-1]
    match turn.task:
        case "bg":
            return f"plain {background}" if "Describe" in turn.question else background
        case "digit":
            return the_only(name for name, _ in grid.values() if name in DIGITS)
        case "shape":
            shape, color = the_only(glyph for glyph in grid.values() if glyph[0] in SHAPES)
            return f"{color} {shape}" if "Describe" in turn.question else shape
        case "colour":
            return grid[find(grid, letter)][1]
        case "letter":
            (named,) = (color for color in color_names() if re.search(rf"\b{color}\b", turn.question))
            return the_only(name for name, color in grid.values() if name in LETTERS and color == named)
        case "card":
            row, column = find(grid, letter)
            assert grid[row - 1, column][0] in DIGITS
            return grid[row - 1, column][1]
        case "above":
            row, column = find(grid, letter)
            return grid[row - 1, column][0]
        case "far":
            row, column = find(grid, letter)
            assert grid[row - 1, column][0] in SHAPES
            return grid[row - 2, column][0]
        case "follow1" | "follow2" | "follow3":
            start = re.findall(r"(\w+) arrow", turn.question)[0]
            place = the_only(at for at, glyph in grid.items() if glyph[0] in MOVES and glyph[1] == start)
            hops = 0
            while grid[place][0] in MOVES:
                assert grid[place][1] == (start if hops == 0 else "white")
                down, right = MOVES[grid[place][0]]
                place, hops = (place[0] + down, place[1] + right), hops + 1
            assert hops == int(turn.task[-1])
            return grid[place][0]
    raise AssertionError(turn.task)


# --- the samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"cards": 8}, {"cards": 2}, {"grid": 6}, {"grid": 7, "turns_per_picture": 30}]
)
def test_every_answer_can_be_read_off_the_picture(settings: dict) -> None:
    source = Glyphs("train", 3, **settings)
    counts: Counter[str] = Counter()
    for index in range(60):
        sample = source[index]
        grid, background = read(sample.images[0])
        for turn in sample.turns:
            assert turn.answer == solve(grid, background, turn), (sample.id, turn)
            counts[turn.task] += 1
    assert set(counts) == set(TASKS)


def same(one: Sample, other: Sample) -> bool:
    return (one.id, one.turns, one.level) == (other.id, other.turns, other.level) and np.array_equal(
        one.images[0], other.images[0]
    )


@given(st.sampled_from(SPLITS), st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1))
@settings(max_examples=30)
def test_a_sample_is_a_function_of_seed_split_and_index(split: str, seed: int, index: int) -> None:
    source = Glyphs(split, seed)
    sample = source[index]
    _ = source[index // 2]
    as_numpy: Any = np.int64(index)
    assert same(sample, source[as_numpy])
    assert same(sample, pickle.loads(pickle.dumps(Glyphs(split, seed)))[index])
    assert sample.images[0].shape == (72, 72, 3) and sample.images[0].dtype == np.uint8
    others = [Glyphs(split, (seed + 1) % 2**32)[index], source[(index + 5) % 2**31]]
    others += [Glyphs(other, seed)[index] for other in SPLITS if other != split]
    for other in others:
        assert other.id != sample.id
        assert not np.array_equal(other.images[0], sample.images[0])


def test_another_process_makes_the_same_samples() -> None:
    code = (
        "import zlib; from visor_jax.data.glyphs.source import Glyphs;"
        "print([(zlib.crc32(s.images[0].tobytes()), [t.question + t.answer for t in s.turns])"
        " for s in map(Glyphs('test', 1).__getitem__, range(10))])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1 and len(printed.pop()) > 1000


def test_the_generated_data_needs_no_jax() -> None:
    code = "import sys, visor_jax.data.glyphs.source, visor_jax.data.chat; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(
    st.dictionaries(st.sampled_from(SCENES), st.integers(0, 4)).filter(lambda w: any(w.values())), st.integers(0, 50)
)
@settings(max_examples=30)
def test_every_run_of_samples_has_the_configured_mix(weights: dict[str, int], start: int) -> None:
    source = Glyphs(scenes=weights, turns_per_picture=1)
    total = sum(weights.values())
    scenes = [TASKS[source[index].turns[0].task].scene for index in range(start, start + total)]
    assert Counter(scenes) == {scene: weight for scene, weight in weights.items() if weight}


def test_tasks_take_turns_by_index() -> None:
    tasks = tuple(TASKS)
    source = Glyphs("test", tasks=tasks, turns_per_picture=1)
    for index in range(40):
        (turn,) = source[index].turns
        assert turn.task == tasks[index % len(tasks)]
        assert source[index].level == TASKS[turn.task].level
    assert {turn.task for turn in Glyphs(tasks=["colour"])[7].turns} == {"colour"}


def test_nothing_is_asked_twice_and_tasks_alternate() -> None:
    source = Glyphs()
    for index in range(100):
        turns = source[index].turns
        about = r"\b[A-K]\b|" + "|".join(color_names())  # the content of a question, for any phrasing
        facts = [(turn.task, re.findall(about, turn.question)) for turn in turns]
        assert all(facts.count(fact) == 1 for fact in facts)
        here = [task for task, about in TASKS.items() if about.scene == TASKS[turns[0].task].scene]
        assert len({turn.task for turn in turns}) == min(len(here), len(turns))
        # A picture with few cards or letters has few questions, and a scatter has three; chains always have enough.
        assert len(turns) == 4 or (2 <= len(turns) < 4 and not turns[0].task.startswith("follow"))


def test_the_number_of_cards_is_uniform_or_fixed() -> None:
    def cards(source: Glyphs, index: int) -> int:
        return sum(name in LETTERS for name, _ in read(source[index].images[0])[0].values())

    drawn = Counter(cards(Glyphs(scenes={"above": 1}), index) for index in range(140))
    assert set(drawn) == set(range(2, 9)) and min(drawn.values()) > 6
    for scene in ("scatter", "cards", "above", "tall"):
        assert {cards(Glyphs(scenes={scene: 1}, cards=8), index) for index in range(6)} == {8}


def test_chains_of_every_length_start_in_their_own_color() -> None:
    source = Glyphs(scenes={"chain": 1}, turns_per_picture=9)
    numbers = Counter()
    for index in range(60):
        sample = source[index]
        grid, _ = read(sample.images[0])
        starts = [color for name, color in grid.values() if name in MOVES and color != "white"]
        assert len(starts) == len(set(starts)) == len(sample.turns)
        assert {turn.task for turn in sample.turns} == {"follow1", "follow2", "follow3"}
        assert sum(name not in MOVES for name, _ in grid.values()) >= len(starts) + 8  # ends and isolated glyphs
        numbers[len(starts)] += 1
    assert set(numbers) == {4, 5}


def test_phrasings_and_answers_all_occur() -> None:
    source = Glyphs(tasks=tuple(TASKS), turns_per_picture=1)
    samples = [source[index] for index in range(800)]
    for task in TASKS:
        turns = [sample.turns[0] for sample in samples if sample.turns[0].task == task]
        wordings = {re.sub(r"\b([A-K][1-8]?|\w+(?= arrow))\b", "_", turn.question) for turn in turns}
        assert len(wordings) >= 3
    answers = Counter(sample.turns[0].answer for sample in samples)
    assert {*color_names(), *background_names(), *DIGITS, *SHAPES} <= set(answers)
    assert any(answer.startswith("plain ") for answer in answers)


def test_noise_is_as_strong_as_documented() -> None:
    rng = np.random.default_rng(0)
    empty = np.zeros((9, 9), np.int64)
    grey = glyphs_render.render(rng, empty, empty, background_names().index("grey")).astype(float)
    assert abs(grey.mean() - 110) < 0.3 and abs(grey.std() - 6) < 0.2
    full = np.full((9, 9), glyph_names().index("square"))
    blue = [
        glyphs_render.render(rng, full, np.full((9, 9), color_names().index("blue")), 0)
        .reshape(9, 8, 9, 8, 3)[:, 3:5, :, 3:5]
        .mean((1, 3))
        for _ in range(20)
    ]
    colors = np.array(blue).reshape(-1, 3)[:, :2]  # pure blue would be clipped at 255
    assert np.abs(colors.mean(0) - (60, 90)).max() < 1.5 and np.abs(colors.std(0) - np.hypot(8, 3)).max() < 0.8


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"split": "valid"}, "unknown split 'valid'; .*did you mean 'validation'"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed"),
        ({"scenes": {"card": 1}}, "unknown scene 'card'.*did you mean 'cards'"),
        ({"scenes": {"cards": 0.5}}, "weight of scene cards must be a whole number"),
        ({"scenes": {"cards": 0}}, "no scene has a weight"),
        ({"tasks": ["follow4"]}, "unknown task 'follow4'"),
        ({"tasks": "colour"}, "must be a list"),
        ({"tasks": []}, "must be a list"),
        ({"tasks": ["colour"], "scenes": {"cards": 1}}, "not both"),
        ({"turns_per_picture": 0}, "turns_per_picture must be a whole number from 1 up"),
        ({"cards": 9}, "cards must be a whole number from 2 to 8"),
        ({"grid": 5}, "grid must be a whole number from 6"),
        ({"size": 0}, "size"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Glyphs(**settings)


def test_indices_have_bounds() -> None:
    source = Glyphs(size=3)
    assert len(source) == 3 and [sample.id for sample in source] == [f"glyphs/train/0/{i}" for i in range(3)]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


# --- relation grids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [9, 6])
def test_relation_grid_labels_what_the_picture_shows(side: int) -> None:
    for index in range(10):
        labeled = relation_grid(5, index, side)
        grid, background = read(labeled.image)
        assert background == background_names()[labeled.background]
        for place, (row, column) in enumerate(itertools.product(range(side), range(side))):
            glyph, color = grid.get((row, column), ("empty", "red"))
            assert glyph_names()[labeled.glyphs[place]] == glyph
            assert color_names()[labeled.colors[place]] == color
            assert labeled.is_arrow[place] == (glyph in MOVES)
            at = (row, column)
            for hops in range(3):
                down, right = MOVES.get(grid.get(at, ("empty", ""))[0], (0, 0))
                at = at[0] + down, at[1] + right
                assert min(at) >= 0
                assert glyph_names()[labeled.reached[hops, place]] == grid.get(at, ("empty", ""))[0]


def test_relation_grids_are_reproducible_and_mixed_as_documented() -> None:
    grids = [relation_grid(0, index) for index in range(200)]
    assert np.array_equal(grids[7].image, relation_grid(0, 7).image)
    assert not np.array_equal(grids[7].image, relation_grid(1, 7).image)
    inner = np.array([grid.glyphs.reshape(9, 9)[1:, 1:] for grid in grids])
    share = np.bincount(inner.reshape(-1), minlength=len(glyph_names())) / inner.size
    assert np.abs(share[-2:] - 0.25).max() < 0.02
    assert abs(share[0] - 0.1) < 0.015
    assert np.abs(share[1:-2] - 0.4 / 21).max() < 0.006
    for field in ("glyphs", "colors"):
        value = getattr(grids[0], field)
        assert value.dtype == np.int32 and value.shape == (81,)
    assert grids[0].reached.dtype == np.int32 and grids[0].reached.shape == (3, 81)


@pytest.mark.parametrize("task", [*TASKS])
def test_the_outline_of_a_sample_is_the_sample_without_its_picture(task: str) -> None:
    source = Glyphs("train", 3, tasks=(task,), grid=6)
    for index in (0, 2**40 + 5):
        whole, outlined = source[index], outline(source, index)
        assert (outlined.id, outlined.turns, outlined.level) == (whole.id, whole.turns, whole.level)
        assert outlined.images == (NO_PICTURE,) and whole.images[0].size
