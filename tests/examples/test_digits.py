"""The digits example writes a data set that training can read."""

import importlib.util
from pathlib import Path

import numpy as np

from visor_jax.data.sources.llava import LlavaSource

SCRIPT = Path(__file__).parents[2] / "examples" / "digits" / "make_digits.py"


def test_digits_are_real_scans_in_disjoint_splits(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_digits", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write_digits(tmp_path)
    sources = {
        split: LlavaSource(tmp_path / f"{split}.json", tmp_path, max_image_pixels=72 * 72)
        for split in ("train", "validation", "test")
    }
    ids = {split: {source[i].id for i in range(len(source))} for split, source in sources.items()}
    assert {split: len(actual) for split, actual in ids.items()} == {"train": 1257, "validation": 240, "test": 300}
    assert len(set.union(*ids.values())) == 1797
    answers = [sources["test"][i].turns[0].answer for i in range(300)]
    assert set(answers) == set("0123456789")

    # Pictures shrunk to 8x8 are the scans; the nearest neighbor in the training part mostly has the same digit.
    def scans(source: LlavaSource, count: int) -> np.ndarray:
        pictures = np.stack([source[i].images[0] for i in range(count)])
        assert pictures.shape[1:] == (72, 72, 3) and pictures.max() == 255 and pictures.min() == 0
        return pictures[:, 4:-4, 4:-4, 0].reshape(count, 8, 8, 8, 8).mean(axis=(2, 4)).reshape(count, -1)

    train, test = scans(sources["train"], 1257), scans(sources["test"], 300)
    nearest = np.argmin(((test[:, None] - train[None]) ** 2).sum(-1), axis=1)
    right = [sources["train"][int(n)].turns[0].answer == answer for n, answer in zip(nearest, answers, strict=True)]
    assert np.mean(right) > 0.95
