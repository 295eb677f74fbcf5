"""`almanac`, the generated data set: pages with real words and numbers in real fonts, and questions about them.

In: a split, a seed, an exercise and an index. Out: a `Sample`, or a `Sheet` of small ones: a pure function of the four.
Nothing is stored. The turns of a sample are filled greedily with different questions, as many as fit into a row's text.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from visor_jax.data.almanac.draw import Draws
from visor_jax.data.almanac.exercises import EXERCISES, Exercise
from visor_jax.data.almanac.facts import Facts
from visor_jax.data.almanac.fonts import FACES
from visor_jax.data.almanac.layout import Look
from visor_jax.data.almanac.pages import Page
from visor_jax.data.almanac.questions import TASKS, questions
from visor_jax.data.almanac.vega import VegaPage
from visor_jax.data.almanac.words import NONE
from visor_jax.data.chat_template import ASSISTANT, NEWLINE, USER, header
from visor_jax.data.draws import STREAM_LENGTH
from visor_jax.data.sample import Sample, Sheet, Turn
from visor_jax.data.source_kind import SPLITS
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.errors import RequestError, nearest

_MAX_MISSES = 12  # questions that are drawn twice or do not fit, before a sample is complete
_NONE_KEPT = 0.4  # share of pictures whose questions with the answer "none" are asked, lest it be the safest guess
_MAX_REDRAWS = 500  # pages drawn for one that answers a given task, or any question that fits


@dataclass(frozen=True)
class Row:
    """What one row of a batch holds: text tokens, visual tokens, and patches per side of its one tile."""

    text: int
    visual: int
    grid: int
    patch: int


class Almanac:
    """Random access to generated samples."""

    name = "almanac"

    def __init__(
        self,
        split: str,
        seed: int,
        tokenizer: ChatTokenizer,
        row: Row,
        *,
        exercise: str = "pages",
        turns: int = 1000,
        tasks: Sequence[str] = (),
        kinds: Sequence[str] = (),
        faces: Sequence[str] = (),
        jitter: int = 1,
        mixed: float = 0.3,
        independent: bool = True,
        size: int = STREAM_LENGTH,
    ) -> None:
        """Defines a stream of samples; generates none yet.

        Args:
          split: "train", "validation" or "test"; pages with real content show tables of this split only.
          seed: from 0 to 2**32 - 1.
          tokenizer: counts the tokens of turns.
          row: a sample's turns, or those of all samples of a sheet, fit into it.
          exercise: a name from `EXERCISES`.
          turns: most turns per picture.
          tasks: if given, sample i is a page with turns of task `tasks[i % len(tasks)]` only.
          kinds: kinds of pages, of those that the exercise draws; empty: all of them.
          faces: fonts, names from `fonts.FACES`; empty: those of the exercise.
          jitter: largest distance of text below its line, 0 to 3 pixels.
          mixed: share of pages with mixed instead of real content, 0 to 1.
          independent: whether each turn is encoded as if it alone were asked (`data.independent_turns`).
          size: number of samples.

        Raises:
          RequestError: an argument is out of range or names something unknown.
        """
        _choose("split", split, SPLITS)
        _choose("data.path", exercise, tuple(EXERCISES))
        for task in tasks:
            _choose("task", task, tuple(TASKS))
        for face in faces:
            _choose("font in data.fonts", face, FACES)
        check_kinds(EXERCISES[exercise], kinds)
        self.split, self.seed = split, seed
        self._exercise_name, self._exercise = exercise, EXERCISES[exercise]
        self._tokenizer, self._row, self._turns, self._tasks = tokenizer, row, turns, tuple(tasks)
        self._shape = self._exercise.shape.only(kinds)
        self._look = Look(split, tuple(faces) or self._exercise.faces, jitter, mixed)
        # One random stream per exercise and split; it does not change when exercises are added.
        self._stream = zlib.crc32(exercise.encode()) // 4 * 4 + SPLITS.index(split)
        self._size = size
        self._costs = _Costs(tokenizer, independent)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample | Sheet:
        """Generates sample `index`, a `Sample` or of small pictures a `Sheet`; raises IndexError outside 0..len-1."""
        index = operator.index(index)
        if not 0 <= index < self._size:
            raise IndexError(f"almanac: no sample {index}, there are {self._size}")
        draws = Draws(self.seed, self._stream, index)
        name = f"almanac/{self._exercise_name}/{self.split}/{self.seed}/{index}"
        task = self._tasks[index % len(self._tasks)] if self._tasks else ""
        return self._sheet(draws, name) if self._exercise.small and not task else self._single(draws, name, task)

    def _sheet(self, draws: Draws, name: str) -> Sheet:
        """Returns as many small samples as fit into one tile and one row; they share the text about equally."""
        pages, text, samples = self._pages(draws), self._row.text, []
        for number, page in enumerate(pages):
            turns, cost = self._ask(draws, page.facts, text // (len(pages) - number), "")
            if turns:
                samples.append(self._sample(draws, f"{name}/{number}", page, turns))
                text -= cost
        return Sheet(tuple(samples))

    def _pages(self, draws: Draws) -> list[Page | VegaPage]:
        """Draws as many small pictures as fit into one tile and one row."""
        row, pages = self._row, []
        patches, visual = row.grid**2, row.visual
        while len(pages) < max(1, row.text // self._exercise.least_text):
            page = self._exercise.draw(draws, self._shape, self._look)
            used = (page.canvas.height // row.patch) * (page.canvas.width // row.patch)
            if pages and (used > patches or used + 1 > visual):
                break
            pages.append(page)
            patches, visual = patches - used, visual - used - 1
        return pages

    def _single(self, draws: Draws, name: str, task: str) -> Sample:
        """Returns one sample whose turns fit into a row; with a task, a page that answers it.

        Raises:
          RequestError: the exercise draws no such page.
        """
        for _ in range(_MAX_REDRAWS):
            page = self._exercise.draw(draws, self._shape, self._look)
            turns, _ = self._ask(draws, page.facts, self._row.text, task)
            if turns:
                return self._sample(draws, name, page, turns)
        raise RequestError(
            f"almanac: data.path={self._exercise_name!r} draws no picture with a question"
            + (f" of task {task!r}" if task else "")
            + f" that fits into data.text_length={self._row.text}"
        )

    def _sample(self, draws: Draws, name: str, page: Page | VegaPage, turns: tuple[Turn, ...]) -> Sample:
        """Returns a drawn page and its turns as a sample; a small picture gets a random place in the tile."""
        image, origin = page.canvas.image(), None
        if self._exercise.small:
            height, width = (side // self._row.patch for side in image.shape[:2])
            origin = (draws.integer(0, self._row.grid - height), draws.integer(0, self._row.grid - width))
        levels = {TASKS[turn.task].level for turn in turns}
        level = levels.pop() if len(levels) == 1 else ""
        return Sample(name, (image,), turns, self.name, level, origin=origin, kind=_kind(page.facts))

    def _ask(self, draws: Draws, facts: Facts, text: int, task: str) -> tuple[tuple[Turn, ...], int]:
        """Returns different turns in a random order that fit into `text` tokens, and the tokens of them all."""
        exercise = self._exercise
        names = (task,) if task else tuple(exercise.weights)
        weights = [1.0 if task else exercise.weights[each] for each in names]
        keep = draws.chance(_NONE_KEPT)
        possible = {
            each: [(fields, answer) for fields, answer in questions(each, facts) if keep or answer != NONE]
            for each in names
        }
        weights = [weight if possible[each] else 0.0 for each, weight in zip(names, weights, strict=True)]
        turns: list[Turn] = []
        asked: set[tuple[str, int]] = set()
        cost, misses = self._costs.prefix, 0
        reads = not task and draws.chance(exercise.read)
        while misses < _MAX_MISSES and len(turns) < self._turns and (reads or any(weights)):
            chosen = "read" if reads else names[draws.weighted(weights)]
            listed = possible.get(chosen) or questions(chosen, facts)
            reads = False
            number = draws.integer(0, len(listed) - 1)
            fields, answer = listed[number]
            turn = Turn(draws.one_of(TASKS[chosen].phrasings).format_map(fields), answer, chosen)
            more = self._costs.turn(turn)
            if (chosen, number) in asked or cost + more > text:
                misses += 1
                continue
            asked.add((chosen, number))
            turns.append(turn)
            cost += more
        return tuple(turns), cost


class _Costs:
    """Counts the text tokens of a conversation about one picture in the chat template, or slightly more."""

    def __init__(self, tokenizer: ChatTokenizer, independent: bool) -> None:
        self._tokenizer = tokenizer
        user, assistant, newline = (len(tokenizer.encode(text)) for text in (header(USER), header(ASSISTANT), NEWLINE))
        self._newline = newline
        self.prefix = 1 + user + newline  # <|im_start|> user \n <image> \n
        # question <|im_end|> \n <|im_start|> assistant \n answer <|im_end|>; turns that follow each other have also a
        # \n after it, and all but the first a header of their own
        self._each = 1 + newline + 1 + assistant + 1 + (0 if independent else newline + 1 + user)

    def turn(self, turn: Turn) -> int:
        """Returns the tokens of a question and its answer."""
        encode = self._tokenizer.encode
        return self._each + len(encode(NEWLINE + turn.question)) - self._newline + len(encode(turn.answer))


def _kind(facts: Facts) -> str:
    """Returns the kind of picture by which results are reported: of tables, also the number of columns."""
    return f"table{len(facts.heads)}" if facts.kind == "table" else facts.kind


def _choose(what: str, value: str, known: tuple[str, ...]) -> None:
    """Raises RequestError unless `value` is one of `known`."""
    if value not in known:
        hint = nearest(value, known)
        raise RequestError(
            f"almanac: unknown {what} {value!r}; expected one of {', '.join(known)}" + (f" ({hint})" if hint else "")
        )


def check_kinds(exercise: Exercise, kinds: Sequence[str]) -> None:
    """Raises RequestError unless the exercise draws these kinds of pages."""
    if len(set(kinds)) < len(kinds):
        twice = next(kind for kind in kinds if kinds.count(kind) > 1)
        raise RequestError(f"almanac: data.kinds has {twice!r} twice; expected every kind once")
    for kind in kinds:
        _choose("kind in data.kinds", kind, exercise.shape.kinds)


def exercise_of(path: str) -> Exercise:
    """Returns the exercise that `data.path` names; "" is "pages"."""
    _choose("data.path", path or "pages", tuple(EXERCISES))
    return EXERCISES[path or "pages"]
