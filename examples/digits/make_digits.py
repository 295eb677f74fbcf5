"""Makes a data set of real scans: scikit-learn's handwritten digits as PNG files and LLaVA JSON.

    python examples/digits/make_digits.py OUT

writes 1,797 pictures of 72x72 pixels and `OUT/train.json` (1,257 conversations), `OUT/validation.json` (240) and
`OUT/test.json` (300); every scan is in one of them. To train on them:

    --config.data.source=llava --config.data.root=OUT '--config.data.path={split}.json'

Nothing is downloaded: the scans are part of scikit-learn (`sklearn.datasets.load_digits`, from the UCI set "Optical
Recognition of Handwritten Digits"). They have 8x8 pixels of 17 gray levels; this script draws them in black on white,
enlarged bicubically to 64x64 and centered.

The files have the layout that `data.source=llava` expects: picture names relative to the folder, one question and one
answer per scan, all ten digits, and `data_source`, the name for which accuracy is reported.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

PICTURE = 72  # pixels per side
SCAN = 64  # pixels per side of the scan, which is centered in the picture
SPLITS = {"test": 300, "validation": 240, "train": 1257}
QUESTIONS = (
    "Which digit is this?",
    "Which digit is written here?",
    "What is the digit in the picture?",
    "Read the digit.",
)


def draw_scan(levels: np.ndarray) -> Image.Image:
    """Returns the picture of one scan, float [8, 8] from 0 (paper) to 16 (ink)."""
    paper = np.rint(255 - levels * 255 / 16).astype(np.uint8)
    scan = Image.fromarray(paper).resize((SCAN, SCAN), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (PICTURE, PICTURE), "white")
    margin = (PICTURE - SCAN) // 2
    picture.paste(scan.convert("RGB"), (margin, margin))
    return picture


def make_record(number: int, digit: int) -> dict[str, object]:
    """Returns the conversation about scan `number`."""
    return {
        "id": f"digits-{number:04d}",
        "image": f"images/{number:04d}.png",
        "data_source": "digits",
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTIONS[number % len(QUESTIONS)]}"},
            {"from": "gpt", "value": str(digit)},
        ],
    }


def write_digits(out: Path) -> None:
    """Writes the pictures and one JSON file per split under `out`."""
    pixels, digits = load_digits(return_X_y=True)  # float [1797, 64], int [1797]
    (out / "images").mkdir(parents=True, exist_ok=True)
    for number, levels in enumerate(pixels.reshape(-1, 8, 8)):
        draw_scan(levels).save(out / "images" / f"{number:04d}.png")
    order = np.random.default_rng(0).permutation(len(digits))
    start = 0
    for name, count in SPLITS.items():
        numbers = sorted(order[start : start + count])
        records = [make_record(int(number), int(digits[number])) for number in numbers]
        (out / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        start += count


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as PNG files and LLaVA JSON.")
    parser.add_argument("out", type=Path, help="folder to write to; created if it is missing")
    out = parser.parse_args().out
    write_digits(out)
    print(f"{out}: " + ", ".join(f"{count} records in {name}.json" for name, count in SPLITS.items()))


if __name__ == "__main__":
    main()
