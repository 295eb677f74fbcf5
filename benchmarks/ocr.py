"""Reads test pages of the generated data set with a classical OCR engine and with a model: words right.

    pip install rapidocr==3.10.0 onnxruntime      # Apache-2.0; its models are inside the package
    python benchmarks/ocr.py --model runs/almanac_mini [--pages 200] [--scale 4]

In: pages with the question that asks for all text, and their text. RapidOCR gets each page enlarged `--scale` times
(its detector misses letters of 9 pixels), the model gets it as it is and answers at full budget. Out:
`benchmarks/results/ocr.json` (or `--out`): for both the share of the text's words that were read (each word as often as
it is there), the F1 score with the words that were read but are not there, the share of pages without any mistake, and
CPU seconds per page; also by kind of page. The order of words does not count: an OCR engine returns boxes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
from PIL import Image

import visor_jax
from visor_jax.data.almanac.source import Almanac, Row
from visor_jax.data.sample import Sample
from visor_jax.data.tokenizer import load_tokenizer

RESULT = harness.RESULTS / "ocr.json"
ROW = Row(text=128, visual=72, grid=8, patch=12)  # of the default job
Reader = Callable[[Sample], str]


def rapidocr_reader(scale: int) -> Reader:
    """Returns a reader that enlarges a page and joins the texts of all boxes.

    Raises:
      ModuleNotFoundError: rapidocr is not installed.
    """
    engine = importlib.import_module("rapidocr").RapidOCR(params={"Global.log_level": "error"})

    def read(sample: Sample) -> str:
        page = Image.fromarray(sample.images[0])
        large = page.resize((scale * page.width, scale * page.height), Image.Resampling.BICUBIC)
        found = engine(np.asarray(large)[:, :, ::-1])  # it expects blue, green, red
        return "\n".join(found.txts or ())

    return read


def model_reader(model: Any) -> Reader:
    """Returns a reader that asks the model at full budget."""
    return lambda sample: model.answer(list(sample.images), sample.turns[0].question, "full", max_new_tokens=100).text


def words(text: str) -> Counter[str]:
    """Returns the words of a text with their counts."""
    return Counter(text.split())


def figures(pairs: Sequence[tuple[str, str]], seconds: float) -> dict[str, float]:
    """Returns the figures of (text, reading) pairs that took `seconds` in all."""
    counted = [(words(text), words(reading)) for text, reading in pairs]
    there, read = (sum(side.total() for side in sides) for sides in zip(*counted, strict=True))
    right = sum((text & reading).total() for text, reading in counted)
    return {
        "words": right / there,
        "f1": 2 * right / (there + read),
        "pages": sum(text == reading for text, reading in counted) / len(counted),
        "seconds_per_page": seconds / len(counted),
    }


def measured(pages: Sequence[Sample], read: Reader) -> dict[str, Any]:
    """Reads all pages; returns the figures, and those of each kind of page."""
    began = time.process_time()
    pairs = [(page.turns[0].answer, read(page)) for page in pages]
    seconds = time.process_time() - began
    kinds: dict[str, list[tuple[str, str]]] = {}
    for page, pair in zip(pages, pairs, strict=True):
        kinds.setdefault(page.kind, []).append(pair)
    share = seconds / len(pages)
    by_kind = {kind: figures(own, share * len(own)) for kind, own in sorted(kinds.items())}
    return {**figures(pairs, seconds), "kinds": by_kind}


def show(name: str, row: Mapping[str, Any]) -> None:
    """Prints one reader's figures."""
    kinds = ", ".join(f"{kind} {100 * own['words']:.1f}" for kind, own in row["kinds"].items())
    print(
        f"{name}: {100 * row['words']:.1f} % of the words (F1 {100 * row['f1']:.1f}), {100 * row['pages']:.1f} % of the"
        f" pages without a mistake, {row['seconds_per_page']:.3f} CPU seconds a page; by kind: {kinds}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the pages with both readers; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="what visor_jax.load takes")
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=int, default=4, help="enlargement for RapidOCR")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(arguments)
    try:
        ocr = rapidocr_reader(args.scale)
    except ModuleNotFoundError:
        print("ocr.py: rapidocr is not installed; pip install rapidocr==3.10.0 onnxruntime", file=sys.stderr)
        return 2
    source = Almanac("test", args.seed, load_tokenizer("almanac"), ROW, turns=1, tasks=("read",))
    pages = [page for index in range(args.pages) if isinstance(page := source[index], Sample)]
    readers = {"rapidocr": ocr, "model": model_reader(visor_jax.load(args.model))}
    report = {name: measured(pages, read) for name, read in readers.items()}
    for name, row in report.items():
        show(name, row)
    harness.save({"arguments": {**harness.arguments_of(args), "model": Path(args.model).name}, **report}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
