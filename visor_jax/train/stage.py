"""What a stage feeds its loop: for each stage a loss, a stream of steps, and how a step's metrics are summed up.

`make_objective` is the one table from `train.objective` to these. A `Step`'s batch and budget are pure functions of
(seed, step), so that a resumed stage sees exactly what an uninterrupted one would have seen.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar

import grain
import jax
import numpy as np

from visor_jax.adapt.label import MADE_OF_OTHERS, Labels, label_source
from visor_jax.architecture import Architecture
from visor_jax.budget import Bits, budget_name
from visor_jax.config import architecture, stage_config
from visor_jax.config.schema import STAGES
from visor_jax.data.anyres import visual_layout
from visor_jax.data.chat import encode_prompt
from visor_jax.data.collate import Batch, Example, make_batch
from visor_jax.data.draws import generator, index_range, seed_sequence
from visor_jax.data.from_config import make_tokenizer, sample_encoder, stage_source, training_window
from visor_jax.data.glyphs import render as glyphs_render
from visor_jax.data.glyphs import source as glyphs
from visor_jax.data.glyphs.words import PHRASINGS
from visor_jax.data.pipeline import Part, make_pipeline
from visor_jax.data.questions import READ_THREADS, Place, Questions, text_bucket
from visor_jax.data.sample import SkipSample
from visor_jax.data.skips import SkipLog
from visor_jax.data.tokenizer import ChatTokenizer
from visor_jax.errors import RequestError
from visor_jax.train.objectives.glyphs_base import RELATIONS, Loss, answer_loss, base_loss, policy_loss
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import read_viable
from visor_jax.workdir.supervision import beat

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One optimiser step's input. `number` counts from 1; `arrays` are this process's rows."""

    number: int
    arrays: dict[str, np.ndarray]
    budget: Bits
    budget_name: str
    ids: list[str]
    tasks: list[list[str]]
    skipped: Mapping[str, int] = field(default_factory=dict)  # by source and reason, up to and with this step


@dataclass(frozen=True)
class Objective:
    """What a stage minimises and on what.

    Attributes:
      loss: (params, batch, budget) -> (loss, metrics).
      steps: (steps done, total) -> the remaining steps.
      summarise: (step, metrics on the host) -> the row to write down beside step, loss and budget.
      skips: counts of skipped samples, which go on where a checkpoint left them; None where none are skipped.
    """

    loss: Loss
    steps: Callable[[int, int], Iterator[Step]]
    summarise: Callable[[Step, Mapping[str, Any]], dict[str, Any]]
    skips: SkipLog | None = None


def make_objective(config: Any, stage: str, workdir: Workdir) -> Objective:
    """The objective that `stage` asks for by `train.objective`."""
    makers = {"answer": answer_objective, "base": base_objective, "policy": policy_objective}
    return makers[stage_config(config, stage).objective](config, stage, workdir)


# --- budgets ----------------------------------------------------------------------------------------------------------


def budget_drawer(config: Any, stage: str, workdir: Workdir) -> Callable[[int], Bits]:
    """The budget of each step: a pure function of (seed, stage, step)."""
    arch, kind = architecture(config, stage), stage_config(config, stage).budgets
    full = (True,) * arch.num_slots
    if kind == "full":
        return lambda step: full
    if kind == "viable":
        choices = read_viable(workdir, arch.num_slots)
    else:  # "subsets": every non-empty subset of the slots, as the pretrained stand-in needs
        choices = [bits for bits in np.ndindex(*(2,) * arch.num_blocks) if any(bits)]
    return partial(draw, [tuple(bool(b) for b in bits) for bits in choices], config.seed, stage)


def draw(choices: Sequence[Bits], seed: int, stage: str, step: int) -> Bits:
    """One of `choices`, every one equally likely."""
    entropy = seed_sequence("budget", stage_seed(seed, stage), step).generate_state(1, np.uint64)
    return choices[int(entropy[0]) % len(choices)]


# --- conversations ----------------------------------------------------------------------------------------------------


def answer_objective(config: Any, stage: str, workdir: Workdir) -> Objective:
    """Next-token cross-entropy on the answers of the configured data source."""
    arch, settings = architecture(config, stage), stage_config(config, stage)
    tokenizer, window = make_tokenizer(config), training_window(config)
    encode = sample_encoder(config, tokenizer, window)
    budget_of, num_turns = budget_drawer(config, stage, workdir), config.data.turns_per_picture
    skips = SkipLog(workdir.path / "data" / "skipped.jsonl", config.data.max_skipped_fraction)

    def collate(examples):
        return make_batch([[example] for example in examples], window, arch)

    def steps(done: int, total: int) -> Iterator[Step]:
        pipeline = make_pipeline(
            [Part(stage_source(config, stage), shuffle=config.data.source != "glyphs")],
            encode,
            collate,
            batch_size=settings.batch_size,
            seed=stage_seed(config.seed, stage),
            start_step=done,
            skips=skips,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return numbered(pipeline, done, total, budget_of, skips)

    def summarise(step: Step, metrics: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {f"accuracy/{k}": v for k, v in by_task(metrics["turn_correct"], step.tasks).items()}
        row["target_tokens"] = int(metrics["target_tokens"])
        row["skipped"] = dict(step.skipped)
        return row

    loss = partial(answer_loss, arch=arch, num_turns=num_turns, remat=settings.remat)
    return Objective(loss, steps, summarise, skips)


def stage_seed(seed: int, stage: str) -> int:
    """A number that no other (seed, stage) has: what is drawn for one stage says nothing of another."""
    return seed * len(STAGES) + STAGES.index(stage)


def numbered(pipeline: Any, done: int, total: int, budget_of: Callable[[int], Bits], skips: SkipLog) -> Iterator[Step]:
    """Steps done + 1 .. total from a pipeline that starts at the right place; closes it at the end."""
    with pipeline:
        for number in range(done + 1, total + 1):
            batch: Batch = next(pipeline)
            bits = budget_of(number)
            skipped = skips.used.by_reason()
            yield Step(number, batch.arrays, bits, budget_name(bits), batch.ids, batch.tasks, skipped)


def by_task(turn_correct: np.ndarray, tasks: Sequence[Sequence[str]]) -> dict[str, float]:
    """Accuracy of each task in a batch, from [rows, turns] and the rows' tasks.

    Of a conversation with more turns than that the first ones count; the loss has them all.
    """
    found: dict[str, list[bool]] = {}
    for row, names in enumerate(tasks):
        for turn, name in enumerate(names[: turn_correct.shape[1]]):
            found.setdefault(name or "all", []).append(bool(turn_correct[row, turn]))
    return {name: float(np.mean(values)) for name, values in sorted(found.items())}


# --- the pretrained stand-in ------------------------------------------------------------------------------------------


def base_objective(config: Any, stage: str, workdir: Workdir) -> Objective:
    """Labelled grids of the generated data set (method.md section 5.0)."""
    if config.data.source != "glyphs":
        raise RequestError(
            f"stage=base: needs data.source=glyphs, its labels are generated; got {config.data.source!r}"
        )
    arch, settings = architecture(config, stage), stage_config(config, stage)
    if arch.vision.patch_size != glyphs_render.PATCH:
        raise RequestError(
            f"model.vision.patch_size={arch.vision.patch_size}: stage base needs {glyphs_render.PATCH},"
            " the size of the patches that the generated pictures are drawn in"
        )
    tokenizer = make_tokenizer(config)
    names, prefix = name_tables(tokenizer), picture_prefix(tokenizer, config)
    words, window = known_words(tokenizer, names), training_window(config)
    conversations, encode = stage_source(config, stage), sample_encoder(config, tokenizer, window)
    budget_of = budget_drawer(config, stage, workdir)
    seed, grids = config.seed, index_range(stage)[1]

    def step(number: int) -> Step:
        bits = budget_of(number)
        hops = settings.hops[min(sum(bits), len(settings.hops)) - 1]
        indices = [(number - 1) * settings.batch_size + row for row in process_rows(settings.batch_size)]
        examples = [grid_arrays(seed, grids[index], hops, prefix, words, arch) for index in indices]
        read = [reading_arrays(encode(conversations[index]), names["asked"], window.text // 2) for index in indices]
        arrays = {k: np.stack([e[k] for e in rows]) for rows in (examples, read) for k in rows[0]}
        return Step(number, arrays, bits, budget_name(bits), [f"grid/{seed}/{grids[index]}" for index in indices], [])

    def summarise(step: Step, metrics: Mapping[str, Any]) -> dict[str, Any]:
        named = ("named", "colour_named", "still_named", "still_colour_named", "words_kept", "asked", *RELATIONS)
        return {"blind": float(metrics["blind"]), **{f"accuracy/{name}": float(metrics[name]) for name in named}}

    return Objective(partial(base_loss, arch=arch, names=names), partial(made_ahead, step), summarise)


def made_ahead(make: Callable[[int], Step], done: int, total: int, threads: int = 1) -> Iterator[Step]:
    """Steps done + 1 .. total, in order, the next two or `threads` of them made while the device works on one."""
    numbers = grain.MapDataset.range(done + 1, total + 1).map(make)
    ahead = iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2))))
    try:
        yield from ahead
    finally:
        ahead.close()


def process_rows(rows: int) -> range:
    """The rows of every batch that this process makes."""
    local = rows // jax.process_count()
    return range(jax.process_index() * local, (jax.process_index() + 1) * local)


def name_tables(tokenizer: ChatTokenizer) -> dict[str, np.ndarray]:
    """Token ids [2, classes] of every name, with and without a leading space."""
    groups = {
        "glyph": glyphs.glyph_names(),
        "digit": glyphs_render.DIGITS,
        "colour": glyphs.colour_names(),
        "background": glyphs.background_names(),
    }
    found = {
        group: np.array([tokenizer.word_ids(name) for name in names], np.int32).T for group, names in groups.items()
    }
    first, count = glyphs_render.FIRST_LETTER, len(glyphs_render.LETTERS)
    found["asked"] = np.concatenate([found["glyph"][:, first : first + count], found["colour"]], axis=1)
    return found


def picture_prefix(tokenizer: ChatTokenizer, config: Any) -> np.ndarray:
    """The token ids that stand before the picture in every conversation."""
    ids = encode_prompt(tokenizer, "", 1, config.tokenizer.system or None)
    return np.array(ids[: ids.index(tokenizer.image_token_id)], np.int32)


WORDS_AFTER = 16  # words behind every picture of the base stage


def known_words(tokenizer: ChatTokenizer, names: dict[str, np.ndarray]) -> np.ndarray:
    """The token ids [W] of all names, and of the words and the template in which questions are asked."""
    wording = " ".join(text for phrasings in PHRASINGS.values() for phrasing in phrasings for text in phrasing)
    asked = {*encode_prompt(tokenizer, re.sub("{.*?}", "", wording))} - {tokenizer.image_token_id}
    return np.unique(np.concatenate([[*asked], *(ids.ravel() for ids in names.values())])).astype(np.int32)


def grid_arrays(
    seed: int, index: int, hops: int, prefix: np.ndarray, words: np.ndarray, arch: Architecture
) -> dict[str, np.ndarray]:
    """One labelled grid as arrays: the picture where a conversation has it, before it `prefix` and after it some of
    `words` in no order; what every patch is and relates to.
    """
    grid = glyphs.relation_grid(seed, index, arch.vision.patches_per_side)
    layout = visual_layout([grid.image.shape[:2]], arch)
    count = len(layout.gather)
    after = generator("words", seed, index).choice(words, WORDS_AFTER)
    text = np.concatenate([prefix, after])
    positions = np.arange(count + len(text), dtype=np.int32)
    return {
        "tiles": grid.image[None],
        "visual_gather": layout.gather,
        "visual_weights": layout.weights,
        "visual_positions": positions[len(prefix) : len(prefix) + count],
        "visual_segments": np.ones(count, np.int32),
        "text_tokens": text,
        "text_positions": np.concatenate([positions[: len(prefix)], positions[len(prefix) + count :]]),
        "text_segments": np.ones(len(text), np.int32),
        "glyph": grid.glyphs,
        "colour": grid.colours,
        "background": np.full(len(grid.glyphs), grid.background, np.int32),
        "arrow": grid.is_arrow,
        "is_digit": (digit_class(grid.glyphs) > 0).astype(np.float32),
        **relations(grid, hops),
    }


def reading_arrays(example: Example, names: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """A conversation's first `length` tokens of text, and what each question asks about where its answer begins.

    `asked` is 1 + index into `names` [2, classes] of the last name in the question, 0 where there is none and at all
    other tokens.
    """
    tokens, turns = example.text_tokens, example.turn_index
    index_of = {int(token): index for form in names for index, token in enumerate(form)}
    asked, latest = np.zeros(len(tokens), np.int32), 0
    for place, (token, turn) in enumerate(zip(tokens.tolist(), turns.tolist(), strict=True)):
        if turn < 0:
            latest = index_of.get(token, latest - 1) + 1
        else:
            if turns[place - 1] < 0:
                asked[place - 1] = latest
            latest = 0
    arrays = {
        "reading_tokens": tokens,
        "reading_positions": example.text_positions,
        "reading_segments": np.ones(len(tokens), np.int32),
        "reading_targets": example.loss_mask,
        "asked": asked,
    }
    return {name: np.pad(array[:length], (0, max(length - len(tokens), 0))) for name, array in arrays.items()}


def digit_class(ids: np.ndarray) -> np.ndarray:
    """1 + index of the digit where a glyph is one, else 0."""
    first, count = glyphs_render.FIRST_DIGIT, len(glyphs_render.DIGITS)
    return np.where((ids >= first) & (ids < first + count), ids - first + 1, 0).astype(np.int32)


def relations(grid: glyphs.RelationGrid, hops: int) -> dict[str, np.ndarray]:
    """For every patch [P], 1 + index or 0: the digit above it and two above, the colour above, the digit reached."""
    side = round(len(grid.glyphs) ** 0.5)

    def lifted(values: np.ndarray, rows: int) -> np.ndarray:
        return np.concatenate([np.zeros(rows * side, np.int32), values[: -rows * side]])

    colours = np.where(grid.glyphs > 0, grid.colours + 1, 0).astype(np.int32)
    return {
        "above": lifted(digit_class(grid.glyphs), 1),
        "two_above": lifted(digit_class(grid.glyphs), 2),
        "colour_above": lifted(colours, 1),
        "reached": digit_class(grid.reached[hops - 1]) * grid.is_arrow,
    }


# --- the policy -------------------------------------------------------------------------------------------------------


def policy_objective(config: Any, stage: str, workdir: Workdir) -> Objective:
    """The labels of `labels/`, their questions read anew from the source they were made from."""
    arch, settings = architecture(config, stage), stage_config(config, stage)
    labels = Labels.read(workdir)
    examples = LabelledExamples(config, labels)
    full = (True,) * arch.num_slots

    def step(number: int) -> Step:
        rows = process_rows(settings.batch_size)
        order = generator("labelled", stage_seed(config.seed, stage), number)
        picked = order.integers(len(labels.label), size=settings.batch_size)[rows.start : rows.stop]
        arrays, ids = examples.batch(picked)
        return Step(number, arrays, full, budget_name(full), ids, [])

    def summarise(step: Step, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {"accuracy/agreement": float(metrics["agreement"])}

    loss = partial(policy_loss, arch=arch, num_viable=len(labels.budgets))
    return Objective(loss, partial(made_ahead, step, threads=READ_THREADS), summarise)


class LabelledExamples:
    """The prompts that were labelled, read anew whenever they are needed; a few of them are kept."""

    def __init__(self, config: Any, labels: Labels):
        """
        Raises:
          RequestError: a label is of a question that its source does not have.
        """
        self.labels = labels
        source, settings = label_source(config), stage_config(config, "policy")
        self.source_name = source.name
        self.places = [Place(*place) for place in zip(labels.picture_index.tolist(), labels.turn.tolist(), strict=True)]
        self.questions = Questions(config, source, len(self.places))
        # Single questions: a conversation has room for more.
        self.window = dataclasses.replace(training_window(config), text=text_bucket(self._longest()))
        self.weights = balance(labels.label, len(labels.budgets), settings.label_balance, settings.label_caution)
        row_bytes = self.window.tiles * architecture(config).vision.tile_size ** 2 * 3
        self.example = lru_cache(maxsize=max(KEPT_BYTES // row_bytes, 1))(self._read)

    def _longest(self) -> int:
        """Text tokens of the longest prompt; opens no picture."""
        return max(self._of(place, self.questions.text_length) for place in self.places)

    def _read(self, row: int) -> Example:
        place = self.places[row]
        example = self._of(place, self.questions.example)
        return dataclasses.replace(example, id=self._of(place, self.questions.sample_id))

    def _of(self, place: Place, read: Callable[[Place], T]) -> T:
        beat()
        try:
            return read(place)
        except (SkipSample, IndexError) as why:
            problem = (
                f"labels.npz: turn {place.turn} of record {place.index} of {self.source_name} cannot be used: {why}"
            )
            raise RequestError(f"{problem}; {MADE_OF_OTHERS}") from why

    def batch(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
        batch = make_batch([[self.example(row)] for row in rows.tolist()], self.window, self.questions.arch)
        first_target = [int(np.argmax(mask)) for mask in batch.arrays["loss_mask"]]
        positions = batch.arrays["text_positions"][np.arange(len(rows)), first_target]
        arrays = {**batch.arrays, "routing_position": positions}
        arrays["label"] = self.labels.label[rows].astype(np.int32)
        arrays["label_weight"] = self.weights[rows]
        return arrays, batch.ids


KEPT_BYTES = 2**26  # of the tiles of labelled prompts
RARE = 0.05  # share of all labels by which every budget's count is raised: what is rare is noise as often as not


def balance(labels: np.ndarray, num_budgets: int, strength: float, caution: float = 1.0) -> np.ndarray:
    """Weight float32 [N] of each label: strength 0 all alike, 1 as much for rare budgets as for common ones.

    Budgets that more than an even share of the labels ask for weigh alike. Then those above the cheapest budget weigh
    `caution` times more: to look less than a question needs costs its answer, to look more costs FLOPs only.
    """
    counts = np.bincount(labels, minlength=num_budgets)
    counts = np.minimum(counts, len(labels) / np.count_nonzero(counts)) + RARE * len(labels)
    weights = (len(labels) / counts)[labels] ** strength * np.where(labels > 0, caution, 1.0)
    return (weights / weights.mean()).astype(np.float32)
