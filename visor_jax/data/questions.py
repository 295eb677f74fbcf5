"""Lists single questions of a source in a fixed order and reads them on demand, for search, label and evaluate.

In: a source and a number of questions. Out: batches of one question per row; they can be iterated over repeatedly.
Between batches only the places of the questions are kept. A few threads prefetch the pictures, at most two batches of
them.

All batches have one shape, with room for the longest text and for the largest pictures of a question. It is computed
before the first picture is opened, from samples without their pixels (`sample.outline`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import grain

from visor_jax.config import Config, ConfigLike, architecture, as_config
from visor_jax.data.collate import Batch, Example, RowShape, count_text, encode_example, make_batch
from visor_jax.data.draws import index_range
from visor_jax.data.from_config import evaluation_source, label_source
from visor_jax.data.row_shape import question_visual_length, text_bucket
from visor_jax.data.sample import Sample, SkipSample, Source, outline, samples_of
from visor_jax.data.skips import SkipLog
from visor_jax.data.sources import source_kind
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.data.turns import single_turns
from visor_jax.errors import RequestError, nearest
from visor_jax.workdir.supervision import beat

log = logging.getLogger(__name__)

DIGEST_LENGTH = 12  # hexadecimal digits that tell a question from others
READ_THREADS = 4
RECENT = 4  # cached samples: the questions about a picture are read one after another


class Place(NamedTuple):
    """The place of a question: the index of its sample in the source, and the index of its turn.

    The turns of a sheet are numbered through all of its samples.
    """

    index: int
    turn: int

    @property
    def id(self) -> str:
        """The question's id, unique within the source (ids of samples may repeat)."""
        return f"{self.index}/{self.turn}"

    @classmethod
    def of(cls, id: str) -> Place:
        """Returns the place that has this id."""
        index, _, turn = id.partition("/")
        return cls(int(index), int(turn))


class Facts(NamedTuple):
    """What is known of a planned question before its pictures are opened: task, number and kind of its pictures, text.

    `digest` is that of its system text, question and answer: the beginning of a sha256.
    """

    task: str
    pictures: int
    kind: str
    digest: str


class Failure(NamedTuple):
    """A question that cannot be used, and why; `readable`: its sample was read, only the question does not fit."""

    index: int
    turn: int
    reason: str
    detail: str
    readable: bool


class Kept(Protocol):
    """What an earlier run made of a chunk, which need not be read again."""

    @property
    def failures(self) -> list[Failure]: ...


KeptT = TypeVar("KeptT", bound=Kept)


class Shares(Protocol[KeptT]):
    """Divides the chunks of a pass among several processes."""

    def mine(self, missing: Sequence[int]) -> Sequence[int]:
        """Returns those of the missing chunks that this process makes."""
        ...

    def fill(self, known: Sequence[KeptT | None]) -> list[KeptT]:
        """Returns `known` with what the processes have made of the missing chunks."""
        ...


@dataclasses.dataclass(frozen=True)
class Chunk(Generic[KeptT]):
    """Consecutive questions that become one batch: the unit in which a pass computes and is resumed.

    Attributes:
      places: of the planned questions, also of those that cannot be used.
      batch: of the usable ones; None if there is none, or if the chunk was kept.
      failures: the others.
      kept: what was kept of the chunk, if anything.
    """

    places: list[Place]
    batch: Batch | None
    failures: list[Failure]
    kept: KeptT | None = None


class Questions:
    """At most `count` questions of a source, in its order."""

    def __init__(
        self,
        config: Config,
        source: Source,
        count: int,
        *,
        first: int = 0,
        per_task: int | None = None,
        without: Collection[str] = (),
        skips: SkipLog | None = None,
    ) -> None:
        """
        Args:
          config: sets how questions are tokenized and tiled, and how long they may be.
          source: the source to read.
          count: number of questions; later ones replace those of samples that cannot be read.
          first: index of the first sample.
          per_task: limit of questions per task; None for any number.
          without: tasks whose questions are left out.
          skips: counts samples that cannot be used, in the first pass over them.
        """
        self._config, self._source, self._count, self._skips = config, source, count, skips or SkipLog()
        self._first, self._per_task, self._without = first, per_task, without
        self._tokenizer, self.arch = load_tokenizer(config.tokenizer.path), architecture(config)
        self._limits = RowShape(config.data.tiles, config.data.visual_length, config.data.text_length)
        self._system = config.tokenizer.system or None
        self._longest = 1  # text tokens of the longest question surveyed so far
        self._visual = 1  # the same of visual positions
        self._survey = self._surveyed()
        self._facts: dict[Place, Facts] = {}  # of every planned question
        self._rounds: list[list[Place]] = []  # the planned places, then those that replace unreadable ones
        self._failures: dict[Place, Failure] = {}  # of every pass so far
        self._unreadable: set[int] = set()  # indices of samples, already counted as skipped
        self._sample = functools.lru_cache(maxsize=RECENT)(source.__getitem__)

    def read(self, place: Place) -> Sample:
        """Returns one question with its pictures.

        Raises:
          SkipSample: its sample cannot be read.
        """
        return dataclasses.replace(single_turns(self._sample(place.index))[place.turn], id=place.id)

    def __iter__(self) -> Iterator[Sample]:
        """Yields all questions with their pictures.

        Raises:
          SkipSample: a question cannot be read.
        """
        return map(self.read, self.plan())

    def find(self, id: str) -> Sample:
        """Returns the question with the id of an example or a score."""
        return self.read(Place.of(id))

    def example(self, place: Place) -> Example:
        """Returns one question, encoded.

        Raises:
          SkipSample: its sample cannot be read, or the question cannot be used.
        """
        return self._encode(self.read(place))

    def sample_id(self, place: Place) -> str:
        """Returns the id of a question's sample, for messages.

        Raises:
          SkipSample: the sample cannot be read.
        """
        samples = samples_of(self._sample(place.index))
        return [sample.id for sample in samples for _ in sample.turns][place.turn]

    def text_length(self, place: Place) -> int:
        """Returns the number of text tokens of a question; opens no picture.

        Raises:
          SkipSample, IndexError: the question does not exist.
        """
        return count_text(single_turns(outline(self._source, place.index))[place.turn], self._tokenizer, self._system)

    def facts(self, place: Place) -> Facts:
        """Returns what is known of a planned question."""
        return self._facts[place]

    def batches(self, batch_size: int, *, order: int | None = None, portion: int = 0) -> QuestionBatches:
        """Returns batches of `batch_size` rows; they can be iterated over repeatedly.

        Args:
          order: seed of a random order of the questions; None: that of the source.
          portion: see `chunks`.
        """
        return QuestionBatches(self, batch_size, order, portion)

    def chunks(
        self,
        size: int,
        kept: Callable[[list[Place]], KeptT | None],
        shares: Shares[KeptT] | None = None,
        *,
        order: int | None = None,
        portion: int = 0,
    ) -> Iterator[Chunk[KeptT]]:
        """Yields the questions as chunks of `size` planned questions; reads at most two chunks ahead.

        The questions of a chunk follow from the source alone, so a resumed pass has the same chunks. Further chunks
        hold questions that replace those of unreadable samples. A sample that cannot be read or used is logged and
        counted in the first pass.

        Args:
          kept: returns what an earlier run kept of a chunk; the questions of that chunk are not read.
          shares: of several processes; then a chunk to be made comes first, in one of them, and later comes as kept in
            all of them.
          order: seed of a random order of the questions; None: that of the source.
          portion: a number of chunks. They are yielded, also as kept, before `kept` is asked about the next ones, so
            that what is made of these may depend on them. 0: all.
        """
        readable = 0
        for number in itertools.count():
            if not (places := self._round(number, readable, order)):
                return
            for chunks in cut(cut(places, size), portion or len(places)):
                known: Sequence[KeptT | None] = [kept(chunk) for chunk in chunks]
                if shares is not None:
                    mine = shares.mine([index for index, had in enumerate(known) if had is None])
                    yield from self._read_chunks([chunks[index] for index in mine], [None] * len(mine), size)
                    known = shares.fill(known)
                for chunk in self._read_chunks(chunks, known, size):
                    readable += len(chunk.places) - sum(not failure.readable for failure in chunk.failures)
                    yield chunk

    def _read_chunks(
        self, chunks: Sequence[list[Place]], known: Sequence[KeptT | None], size: int
    ) -> Iterator[Chunk[KeptT]]:
        """Yields chunks, with what is known of them or the batch of their questions."""
        missing = [place for chunk, had in zip(chunks, known, strict=True) if had is None for place in chunk]
        with contextlib.closing(self._read_ahead(missing, 2 * size)) as reader:
            for chunk, had in zip(chunks, known, strict=True):
                beat()
                read = list(itertools.islice(reader, len(chunk))) if had is None else had.failures
                failures = [item for item in read if isinstance(item, Failure)]
                examples = [item for item in read if isinstance(item, Example)]
                self._note(failures)
                yield Chunk(chunk, self.batch(examples, size) if examples else None, failures, had)

    def plan(self, order: int | None = None) -> list[Place]:
        """Returns the questions as far as can be told without opening a picture, in an order as in `chunks`."""
        return self._round(0, 0, order)

    def _round(self, number: int, readable: int, order: int | None) -> list[Place]:
        """Returns the places that a pass reads first (0), or in place of unreadable ones, if `readable` were read."""
        if number == len(self._rounds):
            self._rounds.append(list(itertools.islice(self._survey, max(self._count - readable, 0))))
        places = self._rounds[number]
        return places if order is None else random.Random(f"{order} {number}").sample(places, len(places))

    def _note(self, failures: Iterable[Failure]) -> None:
        """Counts and logs failures that are new; an unreadable sample once, however many questions it has."""
        for failure in failures:
            place = Place(failure.index, failure.turn)
            new = place not in self._failures and failure.index not in self._unreadable
            self._failures[place] = failure
            if not failure.readable:
                self._unreadable.add(failure.index)
            if new:
                self._skip(failure.index, SkipSample(failure.reason, failure.detail))

    def batch(self, examples: Sequence[Example], num_rows: int) -> Batch:
        """Makes a batch of `num_rows` rows, which have room for the longest question of all.

        A video can have more visual positions than pictures: from such a one on, batches are as long as rows.
        """
        self._longest = max(self._longest, *(example.size.text for example in examples))
        if max(example.size.visual for example in examples) > self._visual:
            self._visual = self._limits.visual
        row_shape = dataclasses.replace(self._limits, visual=self._visual, text=text_bucket(self._longest))
        rows = [[example] for example in examples]
        return make_batch(rows + [[]] * (num_rows - len(rows)), row_shape, self.arch)

    def _surveyed(self) -> Iterator[Place]:
        """Yields the places of questions; opens no picture, so some may turn out to be unreadable."""
        per_task = Counter[str]()
        for index in range(self._first, len(self._source)):
            beat()
            try:
                turns = single_turns(outline(self._source, index))
            except SkipSample as why:
                self._skip(index, why)
                continue
            for turn, single in enumerate(turns):
                task = single.turns[0].task
                if task not in self._without and (self._per_task is None or per_task[task] < self._per_task):
                    per_task[task] += 1
                    self._longest = max(self._longest, self._text_length(single))
                    room = question_visual_length(self._limits.visual, self.arch, len(single.images))
                    self._visual = max(self._visual, room)
                    place = Place(index, turn)
                    self._facts[place] = Facts(task, len(single.images), single.kind, text_digest(single))
                    yield place

    def _text_length(self, single: Sample) -> int:
        """Returns the number of text tokens of a question, 0 if it cannot be used."""
        try:
            length = count_text(single, self._tokenizer, self._system)
        except SkipSample:
            return 0
        return length if length <= self._limits.text else 0

    def _read_ahead(self, places: Sequence[Place], ahead: int) -> Generator[Example | Failure]:
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=max(ahead, READ_THREADS))
        if not places:
            return
        found = iter(grain.MapDataset.source(places).map(self._load).to_iter_dataset(options))
        try:
            yield from found
        finally:
            found.close()

    def _load(self, place: Place) -> Example | Failure:
        if place in self._failures:  # of an earlier pass
            return self._failures[place]
        try:
            single = self.read(place)
        except SkipSample as why:
            return Failure(*place, why.reason, why.detail, readable=False)
        try:
            return self._encode(single)
        except SkipSample as why:
            return Failure(*place, why.reason, why.detail, readable=True)

    def _encode(self, single: Sample) -> Example:
        return encode_example(single, self._tokenizer, self.arch, system=self._system, row_shape=self._limits)

    def _skip(self, index: int, why: SkipSample) -> None:
        log.warning("%s %d skipped: %s", self._source.name, index, why)
        self._skips.count_skipped(self._source.name, index, why)


def text_digest(single: Sample) -> str:
    """Returns the beginning of a sha256 over the texts of a question, which tells it from others in another run."""
    turn = single.turns[0]
    said = json.dumps([single.system, turn.question, turn.answer])
    return hashlib.sha256(said.encode()).hexdigest()[:DIGEST_LENGTH]


class QuestionBatches:
    """Batches of one question per row, all of one shape; padded with empty rows at the end and in place of failures.

    If one that replaces an unreadable question is longer than all others, the batches from there on are longer.
    """

    def __init__(self, questions: Questions, batch_size: int, order: int | None, portion: int) -> None:
        self._questions, self._batch_size, self._order, self._portion = questions, batch_size, order, portion

    def __iter__(self) -> Iterator[Batch]:
        for chunk in self.chunks(_nothing_kept):
            if chunk.batch is not None:
                yield chunk.batch

    def chunks(
        self, kept: Callable[[list[Place]], KeptT | None], shares: Shares[KeptT] | None = None
    ) -> Iterator[Chunk[KeptT]]:
        """Yields the batches with the places of their questions; see `Questions.chunks`."""
        return self._questions.chunks(self._batch_size, kept, shares, order=self._order, portion=self._portion)


def _nothing_kept(places: list[Place]) -> Kept | None:
    del places


ItemT = TypeVar("ItemT")


def cut(items: Sequence[ItemT], size: int) -> list[list[ItemT]]:
    """Returns the items in lists of `size`; the last one may be shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def single_questions(config: ConfigLike, split: str, count: int, skips: SkipLog | None = None) -> Questions:
    """Returns `count` single questions of a split, as its source draws them for evaluation.

    Raises:
      RequestError: the split has no usable question; pictures are not opened to decide this.
    """
    config = as_config(config)
    questions = Questions(config, evaluation_source(config, split), count, skips=skips)
    if not questions.plan():
        raise RequestError(f"data: split {split!r} has no usable question")
    return questions


def label_questions(config: ConfigLike, skips: SkipLog | None = None) -> Questions:
    """Returns the questions to label, about `label.samples` of the training split.

    An endless source is read in a separate range, with the same number of questions per task, so that the policy trains
    on all tasks equally often.
    """
    config = as_config(config)
    count, source, kind = config.label.samples, label_source(config), source_kind(config)
    tasks = kind.levels if kind.tasks is None else kind.tasks(config)
    without = left_out(config.label.without, tasks)
    if not kind.endless:
        return Questions(config, source, count, without=without, skips=skips)
    first, per_task = index_range("label")[1].start, -(-count // max(len({*tasks} - without), 1))
    return Questions(config, source, count, first=first, per_task=per_task, without=without, skips=skips)


def left_out(tasks: Collection[str], known: Collection[str]) -> frozenset[str]:
    """Returns the tasks that `label.without` names.

    Raises:
      RequestError: one is not among the `known` tasks of the data, or none of those is left.
    """
    for task in tasks:
        if known and task not in known:
            hint = nearest(task, known) or f"expected some of {', '.join(known)}"
            raise RequestError(f"label.without={tuple(tasks)}: the data have no task {task!r}; {hint}")
    if known and not {*known} - {*tasks}:
        raise RequestError(f"label.without={tuple(tasks)}: leaves no task to label; expected fewer")
    return frozenset(tasks)
