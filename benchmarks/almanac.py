"""How fast the data set `almanac` is drawn on one core, and how full its rows are.

    python benchmarks/almanac.py [--rows 300] [--text 128] [--exercise pages ...] [--json]

Out: per exercise, rows of a batch and pictures per second of process time, questions included; pictures per row,
questions per picture, text tokens per row and per question. Goal: 300 pages of 96 pixels per second and core.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from visor_jax.data.almanac.exercises import EXERCISES
from visor_jax.data.almanac.source import Almanac, Row
from visor_jax.data.chat import encode_prompt
from visor_jax.data.sample import samples_of
from visor_jax.data.tokenizer import ChatTokenizer, load_tokenizer

GOAL = 300  # pages per second and core


def measure(exercise: str, rows: int, text: int, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Draws `rows` rows of an exercise, after some that fill the caches, and returns rates and sizes."""
    source = Almanac("train", 0, tokenizer, Row(text=text, visual=72, grid=8, patch=12), exercise=exercise)
    for index in range(100):
        _ = source[index]
    start = time.process_time()
    drawn = [samples_of(source[100 + index]) for index in range(rows)]
    seconds = time.process_time() - start
    turns = [turn for samples in drawn for sample in samples for turn in sample.turns]
    # A question's prompt, its answer and <|im_end|>, less the image and what all turns share.
    shared = 1 + len(tokenizer.encode("user\n")) + len(tokenizer.encode("\n"))
    sizes = [
        len(encode_prompt(tokenizer, turn.question)) - 1 - shared + len(tokenizer.encode(turn.answer)) + 1
        for turn in turns
    ]
    pictures = sum(map(len, drawn))
    return {
        "exercise": exercise,
        "rows_per_second": rows / seconds,
        "pictures_per_second": pictures / seconds,
        "pictures_per_row": pictures / rows,
        "questions_per_picture": len(turns) / pictures,
        "tokens_per_question": sum(sizes) / len(sizes),
        "tokens_per_row": (sum(sizes) + shared * pictures) / rows,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--text", type=int, default=128, help="text tokens per row")
    without_vega = [name for name in EXERCISES if name != "pages_vega"]  # needs an optional package
    parser.add_argument("--exercise", nargs="*", default=without_vega, choices=EXERCISES)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer("almanac")
    results = [measure(exercise, arguments.rows, arguments.text, tokenizer) for exercise in arguments.exercise]
    if arguments.json:
        print(json.dumps({"vocabulary": tokenizer.vocab_size, "exercises": results}, indent=1))
        return
    print(f"vocabulary {tokenizer.vocab_size}, {arguments.text} text tokens per row")
    print(f"{'exercise':20} rows/s pictures/s pictures/row questions/picture tokens/question tokens/row")
    for row in results:
        print(
            f"{row['exercise']:20} {row['rows_per_second']:6.0f} {row['pictures_per_second']:10.0f}"
            f" {row['pictures_per_row']:12.1f} {row['questions_per_picture']:17.1f}"
            f" {row['tokens_per_question']:15.1f} {row['tokens_per_row']:10.0f}"
        )
    rate = next((row["pictures_per_second"] for row in results if row["exercise"] == "pages"), None)
    if rate is not None:
        print(f"goal of {GOAL} pages/s per core: {'reached' if rate >= GOAL else 'missed'} ({rate:.0f})")


if __name__ == "__main__":
    main()
