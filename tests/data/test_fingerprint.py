"""The fingerprint of a run's pictures: the changes that it detects, and its low cost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visor_jax.data.fingerprint import RECORDS, picture_fingerprint, sampled
from visor_jax.data.sources.llava import LlavaSource


def make_data(folder: Path, count: int = 4) -> None:
    records = []
    for index in range(count):
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(folder / f"{index}.png")
        conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}]
        records.append({"id": index, "image": f"{index}.png", "conversations": conversation})
    records += [{"id": "bad", "image": 7}, {"id": "text", "conversations": conversation}, "no record"]
    (folder / "train.json").write_text(json.dumps(records))


def fingerprint(folder: Path) -> str:
    return picture_fingerprint(LlavaSource(folder / "train.json", folder, max_image_pixels=1000))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(path),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        Path.unlink,
        lambda path: [path.unlink(), os.mkfifo(path)],
    ],
    ids=["another picture", "a byte more", "removed", "a FIFO"],
)
def test_a_picture_replaced_under_its_name_is_noticed(tmp_path: Path, change) -> None:
    make_data(tmp_path)
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    change(tmp_path / "2.png")
    assert fingerprint(tmp_path) != before


def test_time_and_place_do_not_matter(tmp_path: Path) -> None:
    make_data(tmp_path)
    before = fingerprint(tmp_path)
    os.utime(tmp_path / "1.png", (0, 0))
    (tmp_path / "elsewhere").mkdir()
    for path in tmp_path.glob("*.*"):
        path.rename(tmp_path / "elsewhere" / path.name)
    assert fingerprint(tmp_path / "elsewhere") == before


def test_of_many_records_a_sample_from_the_first_to_the_last() -> None:
    assert sampled(3) == [0, 1, 2] and sampled(0) == []
    many = sampled(10**6)
    assert len(set(many)) == RECORDS and many[0] == 0 and many[-1] == 10**6 - 1
