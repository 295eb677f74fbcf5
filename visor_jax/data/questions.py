"""Single questions of a source in a fixed order, read when they are needed: what search, label and evaluate ask.

In: a source and how many questions to ask. Out: batches of one question a row, as often as they are iterated over.
Between batches only numbers are held: where each question stands in its source. Pictures are read ahead by a few
threads, at most two batches of them, and let go with their batch.

All batches have one shape, whose text length is that of the longest question. It is found before the first picture is
opened, from samples without their pixels (`sample.outline`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain

from visor_jax.config import Config, ConfigLike, architecture, as_config
from visor_jax.data.chat_template import IMAGE_MARKER, images_before
from visor_jax.data.collate import Batch, Example, RowShape, count_text, encode_example, make_batch
from visor_jax.data.draws import index_range
from visor_jax.data.from_config import evaluation_source, label_source
from visor_jax.data.sample import Sample, SkipSample, Source, outline
from visor_jax.data.skips import SkipLog
from visor_jax.data.sources import source_kind
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.errors import RequestError
from visor_jax.workdir.supervision import beat

log = logging.getLogger(__name__)

TEXT_BUCKET = 8
READ_THREADS = 4
RECENT = 4  # samples kept by their index: several questions about one picture are read one after another


class Place(NamedTuple):
    """Where a question stands: the index of its sample in the source, and which of its turns it is."""

    index: int
    turn: int

    @property
    def id(self) -> str:
        """Unlike ids of samples, which may be shared, an id that no other question of the source has."""
        return f"{self.index}/{self.turn}"

    @classmethod
    def of(cls, id: str) -> Place:
        index, _, turn = id.partition("/")
        return cls(int(index), int(turn))


class _Read(NamedTuple):
    """A question that was read: an example, or why there is none, and whether its sample could be read at all."""

    place: Place
    example: Example | None
    why: SkipSample | None = None
    readable: bool = True


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
        skips: SkipLog | None = None,
    ) -> None:
        """
        Args:
          config: says how questions are tokenized, tiled, and how long they may be.
          source: where they are read from.
          count: how many; where a sample cannot be read, others behind it take its questions' places.
          first: index of the first sample that is asked for.
          per_task: at most so many of each task; None for any number.
          skips: where samples that cannot be used are counted, in the first pass over them.
        """
        self._config, self._source, self._count = config, source, count
        self._first, self._per_task, self._skips = first, per_task, skips or SkipLog()
        self._tokenizer, self.arch = load_tokenizer(config.tokenizer.path), architecture(config)
        self._limits = RowShape(config.data.tiles, config.data.visual_length, config.data.text_length)
        self._system = config.tokenizer.system or None
        self._longest = 1  # text tokens of the longest question known so far
        self._survey = self._surveyed()
        self._planned: list[Place] | None = None  # as far as the survey can tell
        self._places: list[Place] | None = None  # those that could be read, once all were
        self._sample = functools.lru_cache(maxsize=RECENT)(source.__getitem__)

    def read(self, place: Place) -> Sample:
        """One question with its pictures.

        Raises:
          SkipSample: its sample cannot be read.
        """
        return dataclasses.replace(split_turns(self._sample(place.index))[place.turn], id=place.id)

    def __iter__(self) -> Iterator[Sample]:
        """All of them with their pictures, one after another.

        Raises:
          SkipSample: one cannot be read.
        """
        return map(self.read, self.plan())

    def find(self, id: str) -> Sample:
        """The question of an example's or a score's id."""
        return self.read(Place.of(id))

    def example(self, place: Place) -> Example:
        """One question, encoded.

        Raises:
          SkipSample: its sample cannot be read, or the question not be used.
        """
        return self._encode(self.read(place))

    def sample_id(self, place: Place) -> str:
        """The id that a question's sample has in its source, for messages.

        Raises:
          SkipSample: the sample cannot be read.
        """
        return self._sample(place.index).id

    def text_length(self, place: Place) -> int:
        """Text tokens of a question; opens no picture.

        Raises:
          SkipSample, IndexError: there is no such question.
        """
        return count_text(split_turns(outline(self._source, place.index))[place.turn], self._tokenizer, self._system)

    def batches(self, batch_size: int) -> QuestionBatches:
        """Batches of `batch_size` rows, to be iterated over any number of times."""
        return QuestionBatches(self, batch_size)

    def examples(self, ahead: int) -> Iterator[Example]:
        """The questions, encoded, in order; `ahead` of them are read before they are asked for.

        A sample that cannot be read or used is logged, and counted in the first pass.
        """
        if self._places is not None:
            for found in self._read_ahead(self._places, ahead):
                if found.example is not None:
                    yield found.example
            return
        places: list[Place] = []
        pending = self.plan()
        while pending:
            unreadable = -1
            for found in self._read_ahead(pending, ahead):
                beat()
                if found.readable:
                    places.append(found.place)
                if found.why is not None and found.place.index != unreadable:
                    self._skip(found.place.index, found.why)
                unreadable = unreadable if found.readable else found.place.index
                if found.example is not None:
                    yield found.example
            pending = list(itertools.islice(self._survey, self._count - len(places)))  # for those that are unreadable
        self._places = places

    def plan(self) -> list[Place]:
        """The questions as far as can be told without opening a picture."""
        if self._planned is None:
            self._planned = list(itertools.islice(self._survey, self._count))
        return self._planned

    def batch(self, examples: Sequence[Example], num_rows: int) -> Batch:
        """Questions as a batch of `num_rows` rows, whose text is as long as the longest question of all."""
        self._longest = max(self._longest, *(example.size.text for example in examples))
        row_shape = dataclasses.replace(self._limits, text=text_bucket(self._longest))
        rows = [[example] for example in examples]
        return make_batch(rows + [[]] * (num_rows - len(rows)), row_shape, self.arch)

    def _surveyed(self) -> Iterator[Place]:
        """The places of questions, one after another, as far as can be told without opening a picture."""
        asked = Counter[str]()
        for index in range(self._first, len(self._source)):
            beat()
            try:
                turns = split_turns(outline(self._source, index))
            except SkipSample as why:
                self._skip(index, why)
                continue
            for turn, single in enumerate(turns):
                task = single.turns[0].task
                if self._per_task is None or asked[task] < self._per_task:
                    asked[task] += 1
                    self._longest = max(self._longest, self._text_length(single))
                    yield Place(index, turn)

    def _text_length(self, single: Sample) -> int:
        """Text tokens of a question, 0 where it will not be used."""
        try:
            length = count_text(single, self._tokenizer, self._system)
        except SkipSample:
            return 0
        return length if length <= self._limits.text else 0

    def _read_ahead(self, places: Sequence[Place], ahead: int) -> Iterator[_Read]:
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=max(ahead, READ_THREADS))
        if not places:
            return
        found = iter(grain.MapDataset.source(places).map(self._load).to_iter_dataset(options))
        try:
            yield from found
        finally:
            found.close()

    def _load(self, place: Place) -> _Read:
        try:
            single = self.read(place)
        except SkipSample as why:
            return _Read(place, None, why, readable=False)
        try:
            return _Read(place, self._encode(single))
        except SkipSample as why:
            return _Read(place, None, why)

    def _encode(self, single: Sample) -> Example:
        return encode_example(single, self._tokenizer, self.arch, system=self._system, row_shape=self._limits)

    def _skip(self, index: int, why: SkipSample) -> None:
        log.warning("%s %d skipped: %s", self._source.name, index, why)
        self._skips.count_skipped(self._source.name, index, why)


class QuestionBatches:
    """Batches of one question a row and of one shape; the last one is filled up with empty rows.

    Where a question that takes the place of an unreadable one is longer than all that were surveyed, batches from
    there on have room for it.
    """

    def __init__(self, questions: Questions, batch_size: int) -> None:
        self._questions, self._batch_size = questions, batch_size

    def __iter__(self) -> Iterator[Batch]:
        examples = self._questions.examples(ahead=2 * self._batch_size)
        while rows := list(itertools.islice(examples, self._batch_size)):
            yield self._questions.batch(rows, self._batch_size)


def text_bucket(length: int) -> int:
    """The text length of a batch of questions of at most `length` tokens."""
    return -(-length // TEXT_BUCKET) * TEXT_BUCKET


def split_turns(sample: Sample) -> list[Sample]:
    """A conversation as single questions, each about the pictures shown up to it, earlier ones in front."""
    markers = [turn.question.count(IMAGE_MARKER) for turn in sample.turns]
    single = []
    for number, turn in enumerate(sample.turns):
        shown = sum(markers[: number + 1])
        question = images_before(turn.question, shown - markers[number])
        single.append(
            dataclasses.replace(
                sample,
                id=f"{sample.id}/{number}",
                images=sample.images[:shown] if any(markers) else sample.images,
                turns=(dataclasses.replace(turn, question=question),),
            )
        )
    return single


def single_questions(config: ConfigLike, split: str, count: int, skips: SkipLog | None = None) -> Questions:
    """`count` single questions of a split, as its source draws them for evaluation.

    Raises:
      RequestError: the split has no question, as far as can be told without opening a picture.
    """
    config = as_config(config)
    questions = Questions(config, evaluation_source(config, split), count, skips=skips)
    if not questions.plan():
        raise RequestError(f"data: split {split!r} has no usable question")
    return questions


def label_questions(config: ConfigLike, skips: SkipLog | None = None) -> Questions:
    """The questions of the training subset, about `label.samples` of them.

    An endless source is read in a range of its own, its tasks equally often, so that the policy meets each as often as
    the others.
    """
    config = as_config(config)
    count, source, kind = config.label.samples, label_source(config), source_kind(config)
    if not kind.endless:
        return Questions(config, source, count, skips=skips)
    first, per_task = index_range("label")[1].start, -(-count // max(len(kind.levels), 1))
    return Questions(config, source, count, first=first, per_task=per_task, skips=skips)
