"""Writes example answers to a benchmark's questions with their pictures, for the report: right and wrong ones.

In: a benchmark's table and its predictions. Out: pictures in `examples/` beside the result, and the objects of its
"examples", with the fields that those of own data have, and "score". Which patches an answer depends on is not computed
here: a benchmark accepts several answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visor_jax.evaluate.benchmarks.base import Line, mean
from visor_jax.evaluate.benchmarks.folder import Table
from visor_jax.evaluate.examples import png
from visor_jax.files.read_write import write_bytes
from visor_jax.workdir.supervision import beat

EACH = 3  # right and wrong examples of a benchmark


def write_examples(folder: Path, table: Table, lines: Sequence[Line], budget: str) -> list[dict[str, Any]]:
    """Writes the pictures of the first right and the first wrong answers of a budget; returns "examples".

    An answer counts as right here if the mean of its scores is at least 0.5. Of several pictures the first is written.
    """
    examples = []
    for line in example_lines([line for line in lines if line["budget"] == budget and not line["problem"]]):
        beat()
        name, pictures = f"examples/{line['row']}.png", table.pictures(line["row"])
        if pictures:
            write_bytes(folder / name, png(pictures[0]))
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
            }
        )
    return examples


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
