"""Writes example answers to a benchmark's questions with their pictures, for the report: right and wrong ones.

In: a benchmark's table, its predictions and the model. Out: pictures in `examples/` beside the result, and the objects
of its "examples", with the fields that those of own data have, and "score". A benchmark accepts several answers, so the
maps "relevance" and "attention" are of the answer that the model gave. Only the first right and the first wrong example
have them: each is a forward and a backward pass more, and a picture per layer on the report.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visor_jax.budget import Budget
from visor_jax.data.chat import mark_pictures
from visor_jax.data.collate import encode_example, make_batch
from visor_jax.data.row_shape import text_bucket
from visor_jax.data.sample import Sample, SkipSample, Turn
from visor_jax.evaluate.benchmarks.base import Line, mean
from visor_jax.evaluate.benchmarks.folder import Table
from visor_jax.evaluate.examples import maps, png
from visor_jax.files.read_write import write_bytes
from visor_jax.loading import Visor
from visor_jax.workdir.supervision import beat

log = logging.getLogger(__name__)

EACH = 3  # right and wrong examples of a benchmark
MAPS = 1  # of each that have maps


def write_examples(
    folder: Path, model: Visor, table: Table, lines: Sequence[Line], budget: str
) -> list[dict[str, Any]]:
    """Writes the pictures of the first right and the first wrong answers of a budget; returns "examples".

    An answer counts as right here if the mean of its scores is at least 0.5. Of several pictures the first is written.
    """
    examples, with_maps = [], {True: MAPS, False: MAPS}
    for line in example_lines([line for line in lines if line["budget"] == budget and not line["problem"]]):
        beat()
        name, shown = f"examples/{line['row']}.png", {}
        try:
            pictures = table.pictures(line["row"])
        except SkipSample as why:  # it was read when the question was asked, perhaps by an earlier run
            log.warning("--data: %s: its example has no picture: %s", table.place(line["row"]), why)
            pictures = []
        if pictures:
            write_bytes(folder / name, png(pictures[0]))
        if with_maps[is_right(line)] and (shown := maps_of(model, pictures, line)):
            with_maps[is_right(line)] -= 1
        references = [line["reference"]] if isinstance(line["reference"], str) else line["reference"]
        examples.append(
            {
                "index": line["row"],
                "image": name if pictures else "",
                "question": line["question"],
                "answer": " | ".join(dict.fromkeys(references)),
                "prediction": line["answer"],
                "right": is_right(line),
                "score": score(line),
                "budget": line["route"],
                "task": table.benchmark.name,
                "decoder_gflops": line["decoder_flops"] / 1e9,
                **shown,
            }
        )
    return examples


def maps_of(model: Visor, pictures: Sequence[np.ndarray], line: Line) -> dict[str, Any]:
    """Returns "relevance" and "attention" of the answer that a model gave, as its question was asked.

    Returns:
      {} if the question has not exactly one picture, or if the answer has no text.
    """
    if len(pictures) != 1 or not line["answer"].strip():
        return {}
    (question,) = mark_pictures([line["question"]], len(pictures))  # as `Visor.answer` asks it
    turn = Turn(question, line["answer"])
    sample = Sample(str(line["row"]), tuple(pictures), (turn,), "benchmark")
    try:
        example = encode_example(sample, model.tokenizer, model.arch, system=model.system)
    except SkipSample:  # the answer holds a picture's marker
        return {}
    row_shape = dataclasses.replace(example.size, text=text_bucket(example.size.text))
    bits = () if model.arch.plan == "dense" else Budget.parse(line["route"]).resolve(model.arch.num_slots)
    return maps(model, make_batch([[example]], row_shape, model.arch), bits)


def example_lines(lines: Sequence[Line]) -> list[Line]:
    """Returns the first right and the first wrong predictions, `EACH` of both, in their order."""
    of_kind = {True: 0, False: 0}
    chosen = []
    for line in lines:
        if of_kind[is_right(line)] < EACH:
            of_kind[is_right(line)] += 1
            chosen.append(line)
    return chosen


def score(line: Line) -> float:
    """Returns the mean of a prediction's scores."""
    return mean(line["scores"].values())


def is_right(line: Line) -> bool:
    """Returns whether a prediction counts as right in the report."""
    return score(line) >= 0.5
