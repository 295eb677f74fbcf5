"""Generates the six scenes of the glyph pictures: the glyphs on the grid, and the facts to ask about.

In: a random generator, the grid's side and the number of letters or cards. Out: a `Scene`, integer grids with the facts
that hold in them. Every fact is true and has one answer; a picture that cannot be completed is drawn again.

The relations of the hard scenes run upwards (or along arrows) on purpose. The model's conditional position mixes
neighbors in a row, so a relation to the left or right could be read without self-attention. The decoder is causal, so
of two patches only the lower one can attend to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from visor_jax.data.glyphs.render import (
    BACKGROUNDS,
    COLORS,
    DIGITS,
    FIRST_DIGIT,
    FIRST_LETTER,
    FIRST_SHAPE,
    LEFT,
    LETTERS,
    SHAPES,
    UP,
    WHITE,
)

MIN_GRID = 6  # the smallest side on which every scene fits
MIN_CARDS, MAX_CARDS = 2, len(LETTERS)

_COLORS = tuple(COLORS)
_BACKGROUNDS = tuple(BACKGROUNDS)
_CHAIN_LENGTHS = (1, 2, 3)
_MIN_CHAINS, _MAX_CHAINS = 4, 6
_PLACEMENT_TRIES = 50  # per chain, before the picture is started again

Facts = dict[str, list[dict[str, str]]]  # task -> for each possible question, the fields of its template


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    Attributes:
      glyphs: int [grid, grid], glyph ids, 0 where empty.
      colors: int [grid, grid], color ids, ignored where empty.
      background: background id.
      facts: for each task, all facts that may be asked about this picture.
    """

    glyphs: np.ndarray
    colors: np.ndarray
    background: int
    facts: Facts


def scatter(rng: np.random.Generator, grid: int, count: int) -> Scene:
    """Places `count` different letters, one digit and one shape at random: one patch answers each question."""
    places = rng.permutation(grid * grid)[: count + 2]
    letters = rng.permutation(len(LETTERS))[:count]
    digit, shape, background = (_draw(rng, len(names)) for names in (DIGITS, SHAPES, BACKGROUNDS))
    glyphs, colors = np.zeros(grid * grid, np.int64), rng.integers(0, len(COLORS), grid * grid)
    glyphs[places] = [*(FIRST_LETTER + letters), FIRST_DIGIT + digit, FIRST_SHAPE + shape]
    unique = colors[places[0]]  # only the first letter has this color, so at least one letter is known by its color
    colors[places[1:]] = (unique + rng.integers(1, len(COLORS), count + 1)) % len(COLORS)
    names = [_COLORS[i] for i in colors[places]]
    facts: Facts = {
        "bg": [{"background": _BACKGROUNDS[background]}],
        "digit": [{"digit": DIGITS[digit]}],
        "shape": [{"shape": SHAPES[shape], "colour": names[count + 1]}],
        "colour": [{"letter": LETTERS[i], "colour": name} for i, name in zip(letters, names, strict=False)],
    }
    # A color identifies a letter only if nothing else in the picture has it.
    facts["letter"] = [fact for fact in facts["colour"] if names.count(fact["colour"]) == 1]
    return Scene(glyphs.reshape(grid, grid), colors.reshape(grid, grid), background, facts)


def cards(rng: np.random.Generator, grid: int, count: int) -> Scene:
    """Places cards, a digit over a white letter, all letters different. Asks for the color of a letter's digit."""
    letters, digits = rng.permutation(len(LETTERS))[:count], rng.integers(0, len(DIGITS), count)
    glyphs, colors, (rows, columns) = _stacks(rng, grid, (FIRST_DIGIT + digits, FIRST_LETTER + letters))
    colors[rows + 1, columns] = WHITE  # so that a card has one color
    names = [_COLORS[i] for i in colors[rows, columns]]
    facts = [{"letter": LETTERS[i], "colour": name} for i, name in zip(letters, names, strict=True)]
    return Scene(glyphs, colors, _draw(rng, len(BACKGROUNDS)), {"card": facts})


def above(rng: np.random.Generator, grid: int, count: int) -> Scene:
    """Places digits over letters, all letters different. Asks for the digit above a letter."""
    letters, digits = rng.permutation(len(LETTERS))[:count], rng.integers(0, len(DIGITS), count)
    glyphs, colors, _ = _stacks(rng, grid, (FIRST_DIGIT + digits, FIRST_LETTER + letters))
    return Scene(glyphs, colors, _draw(rng, len(BACKGROUNDS)), {"above": _letter_digit(letters, digits)})


def tall(rng: np.random.Generator, grid: int, count: int) -> Scene:
    """Places stacks of digit, shape and letter, all letters different. Asks for the digit on a letter's stack."""
    letters, digits = rng.permutation(len(LETTERS))[:count], rng.integers(0, len(DIGITS), count)
    shapes = rng.integers(0, len(SHAPES), count)
    parts = (FIRST_DIGIT + digits, FIRST_SHAPE + shapes, FIRST_LETTER + letters)
    glyphs, colors, _ = _stacks(rng, grid, parts)
    return Scene(glyphs, colors, _draw(rng, len(BACKGROUNDS)), {"far": _letter_digit(letters, digits)})


def chain(rng: np.random.Generator, grid: int, count: int) -> Scene:
    """Places chains of one to three arrows, each ending on a digit, among loose letters and digits.

    Each chain's first arrow has a unique color; all other glyphs are white. There is at least one chain of each length.
    A sixth chain starts white, so no question is about it; it is a distractor. The number of chains does not depend on
    `count`.
    """
    del count
    extra = _MIN_CHAINS + _draw(rng, _MAX_CHAINS + 1 - _MIN_CHAINS) - len(_CHAIN_LENGTHS)
    lengths = [*_CHAIN_LENGTHS, *(_CHAIN_LENGTHS[_draw(rng, len(_CHAIN_LENGTHS))] for _ in range(extra))]
    starts = [*rng.permutation(WHITE).tolist(), WHITE][: len(lengths)]  # white is the last color
    while True:
        glyphs, colors = np.zeros((grid, grid), np.int64), rng.integers(0, len(COLORS), (grid, grid))
        ends = [_lay_chain(rng, glyphs, colors, *chain) for chain in zip(lengths, starts, strict=True)]
        if None not in ends:
            break
    facts: Facts = {f"follow{length}": [] for length in _CHAIN_LENGTHS}
    for length, start, digit in zip(lengths, starts, ends, strict=True):
        if digit is not None and start != WHITE:
            facts[f"follow{length}"].append({"start": _COLORS[start], "digit": DIGITS[digit]})
    _scatter_loose(rng, glyphs, colors)
    return Scene(glyphs, colors, _draw(rng, len(BACKGROUNDS)), facts)


SCENES = {"scatter": scatter, "letters": scatter, "cards": cards, "above": above, "tall": tall, "chain": chain}


def _draw(rng: np.random.Generator, number: int) -> int:
    """Draws one of 0..number-1; for single draws several times as fast as `rng.integers`."""
    return int(rng.random() * number)


def _stacks(
    rng: np.random.Generator, grid: int, parts: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Places cards: `parts[k][i]` is the glyph in card i's k-th patch from the top.

    Returns glyphs and colors, int [grid, grid], and the rows and columns of the cards' topmost patches.
    """
    height, count = len(parts), len(parts[0])
    bands = grid // height
    places = rng.permutation(bands * grid)[:count]
    rows = places // grid * height + _draw(rng, grid - bands * height + 1)
    columns = places % grid
    glyphs, colors = np.zeros((grid, grid), np.int64), rng.integers(0, len(COLORS), (grid, grid))
    for down, part in enumerate(parts):
        glyphs[rows + down, columns] = part
    return glyphs, colors, (rows, columns)


def _letter_digit(letters: np.ndarray, digits: np.ndarray) -> list[dict[str, str]]:
    return [{"letter": LETTERS[i], "digit": DIGITS[j]} for i, j in zip(letters, digits, strict=True)]


def _lay_chain(rng: np.random.Generator, glyphs: np.ndarray, colors: np.ndarray, length: int, start: int) -> int | None:
    """Places `length` arrows and a digit, in place. Returns the index into `DIGITS`; None if they do not fit."""
    path = _free_path(rng, glyphs, length)
    if path is None:
        return None
    for step, (row, column, arrow) in enumerate(path[:-1]):
        glyphs[row, column], colors[row, column] = arrow, WHITE if step else start
    row, column, _ = path[-1]
    digit = _draw(rng, len(DIGITS))
    glyphs[row, column], colors[row, column] = FIRST_DIGIT + digit, WHITE
    return digit


def _free_path(rng: np.random.Generator, glyphs: np.ndarray, length: int) -> list[tuple[int, int, int]] | None:
    """Returns a path of `length` moves up or left through empty patches; None if none was found.

    Each entry is (row, column, arrow); the last arrow is 0.
    """
    grid = glyphs.shape[0]
    for _ in range(_PLACEMENT_TRIES):
        moves = [UP if rng.random() < 0.5 else LEFT for _ in range(length)]
        climb = moves.count(UP)
        shift = length - climb
        row, column = climb + _draw(rng, grid - climb), shift + _draw(rng, grid - shift)
        path = []
        for move in (*moves, 0):
            if glyphs[row, column]:
                break
            path.append((row, column, move))
            row, column = row - (move == UP), column - (move == LEFT)
        else:
            return path
    return None


def _scatter_loose(rng: np.random.Generator, glyphs: np.ndarray, colors: np.ndarray) -> None:
    """Adds loose white letters and digits on a tenth to a sixth of the patches, in place."""
    least, most = glyphs.size // 10, glyphs.size // 6
    free = rng.permutation(np.flatnonzero(glyphs == 0))[: least + _draw(rng, most + 1 - least)]
    loose = rng.integers(0, len(LETTERS) + len(DIGITS), len(free))
    colors.reshape(-1)[free] = WHITE
    glyphs.reshape(-1)[free] = FIRST_LETTER + loose  # letters and digits have consecutive ids
