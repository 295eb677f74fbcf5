"""Makes a data set from another project's pictures and questions: easy-VQA as LLaVA JSON.

    pip install easy-vqa==1.0            # MIT: pictures of one colored shape, and questions about it
    python examples/easy_vqa/make_easy_vqa.py OUT

copies 5,000 pictures of 64x64 pixels and writes `OUT/train.json` (3,600 conversations), `OUT/validation.json` (400, the
last of the package's training pictures) and `OUT/test.json` (its 1,000 test pictures). To train on them:

    --config.data.source=llava --config.data.root=OUT '--config.data.path={split}.json'

Nothing else is downloaded. All questions about a picture are one conversation of several turns; `data_source` names the
kind of each question (color, shape, yes or no), by which accuracy is reported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

VALIDATION = 400  # of the package's training pictures


def kind_of(question: str) -> str:
    """Returns what a question asks for."""
    if "color" in question.split(" of ")[0]:
        return "color"
    return "shape" if question.startswith("what") else "yes_no"


def make_record(split: str, number: int, asked: list[tuple[str, str]]) -> dict[str, Any]:
    """Returns the conversation about one picture.

    Args:
      split: of the package, "train" or "test".
      number: of the picture.
      asked: its questions and answers.
    """
    turns: list[dict[str, str]] = []
    for place, (question, answer) in enumerate(asked):
        text = f"<image>\n{question}" if place == 0 else question
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {
        "id": f"easy-vqa-{split}-{number:04d}",
        "image": f"images/{split}/{number}.png",
        "data_source": [kind_of(question) for question, _ in asked],
        "conversations": turns,
    }


def read_records(package: Any, split: str, out: Path) -> list[dict[str, Any]]:
    """Copies the pictures of a split of the package and returns its conversations, their turns in random order."""
    pictures = getattr(package, f"get_{split}_image_paths")()
    asked: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in zip(*getattr(package, f"get_{split}_questions")(), strict=True):
        asked.setdefault(number, []).append((question, answer))
    (out / "images" / split).mkdir(parents=True, exist_ok=True)
    records = []
    for number in sorted(asked):
        shutil.copyfile(pictures[number], out / "images" / split / f"{number}.png")
        random.Random(number).shuffle(asked[number])
        records.append(make_record(split, number, asked[number]))
    return records


def write_easy_vqa(package: Any, out: Path) -> dict[str, int]:
    """Writes the pictures and one JSON file per split under `out`; returns the number of conversations by split."""
    training, test = (read_records(package, split, out) for split in ("train", "test"))
    splits = {"train": training[:-VALIDATION], "validation": training[-VALIDATION:], "test": test}
    for name, records in splits.items():
        (out / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    return {name: len(records) for name, records in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pictures and questions of easy-VQA as LLaVA JSON.")
    parser.add_argument("out", type=Path, help="folder to write to; created if it is missing")
    out = parser.parse_args().out
    try:
        package = importlib.import_module("easy_vqa")
    except ModuleNotFoundError:
        parser.exit(2, "make_easy_vqa.py: the package easy-vqa is not installed; pip install easy-vqa==1.0\n")
    counts = write_easy_vqa(package, out)
    print(f"{out}: " + ", ".join(f"{count} records in {name}.json" for name, count in counts.items()))


if __name__ == "__main__":
    main()
