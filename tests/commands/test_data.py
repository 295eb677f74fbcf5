"""`visor data`: what it counts, prints, writes and refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visor_jax.__main__ import main
from visor_jax.data.glyphs import Glyphs
from visor_jax.data.llava import LlavaSource

CONFIG = """
from visor_jax.config import default_config
def get_config():
    config = default_config()
    config.data.update({data})
    config.update(stages=("full",))
    return config
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of seven records, four of them bad, and configurations for it and for generated data."""
    Image.new("RGB", (72, 72), "blue").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])

    def record(image: str, answer: str = "blue") -> dict[str, Any]:
        talk = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": answer}]
        return {"id": answer, "image": image, "conversations": talk, "data_source": "colours"}

    records = [record("good.png"), record("half.png"), record("good.png", "x" * 500), record("../good.png"),
               record("good.png"), {"id": 5}, record("good.png", "dark blue")]  # fmt: skip
    (tmp_path / "set.json").write_text(json.dumps(records))
    data = f"source='llava', root={str(tmp_path)!r}, path='set.json', text_length=128"
    (tmp_path / "llava.py").write_text(CONFIG.format(data=data))
    (tmp_path / "glyphs.py").write_text(CONFIG.format(data="text_length=128"))
    return tmp_path


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["data", *arguments, "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1
    return json.loads(out[0])


def test_check_counts_by_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={folder / 'llava.py'}"
    found = result_of(capsys, "check", config)
    skipped = {"broken_image": 1, "too_long": 1, "unsafe_path": 1, "empty_conversation": 1}
    assert (found["samples"], found["usable"], found["skipped"]) == (7, 3, skipped)
    assert not found["within_limit"] and "set.json[1]" in found["first"]["broken_image"]
    assert found["splits"]["all"]["duplicate_ids"] == 3
    assert main(["data", "check", config]) == 0
    printed = capsys.readouterr().out
    assert "1  broken_image" in printed and "3 of 7 samples can be used" in printed and "MORE than" in printed


def test_stats_measure_what_can_be_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result_of(capsys, "stats", f"--config={folder / 'llava.py'}")
    assert (found["samples"], found["skipped"], found["tasks"]) == (4, 3, {"colours": 4})
    text = found["lengths"]["text"]
    assert text["max"] > 500 and text["fit"] == 0.75 and text["room"] == 128 and sum(text["histogram"]["counts"]) == 4
    assert found["lengths"]["visual"]["max"] == 82 and found["lengths"]["tiles"]["max"] == 1


def test_build_writes_what_can_be_read_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = f"--config={folder / 'glyphs.py'}", folder / "built"
    found = result_of(capsys, "build", config, f"--out={out}", "--samples=5")
    assert found["samples"] == {"train": 5, "validation": 5, "test": 5}
    back, source = LlavaSource(out / "test.json", out, max_image_pixels=10**6), Glyphs("test")
    for index in range(5):
        sample = source[index]
        np.testing.assert_array_equal(back[index].images[0], sample.images[0])
        assert back[index].id == sample.id
        assert [(t.question.removeprefix("<image>\n"), t.answer) for t in back[index].turns] == [
            (t.question, t.answer) for t in sample.turns
        ]
    assert main(["data", "build", config, f"--out={out}"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"images", "train.json", "validation.json", "test.json"}


def test_preview_writes_a_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("glyphs", "llava"):
        out = folder / f"{name}.png"
        result_of(capsys, "preview", f"--config={folder / f'{name}.py'}", f"--out={out}", "--samples=3")
        with Image.open(out) as sheet:
            assert min(sheet.size) > 72


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["build"], "--out is missing"),
        (["check", "--samples=0"], "at least 1"),
        (["chek"], "invalid choice"),
        (["check", "--split=dev"], "invalid choice"),
        (["check", "--config.data.path=none.json"], "none.json: No such file"),
        (["check", "--config.data.path={split}.json"], "train.json: No such file"),
    ],
)
def test_wrong_requests(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["data", *arguments, f"--config={folder / 'llava.py'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("action", ["preview", "build"])
def test_places_that_cannot_be_written_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    taken = folder / "glyphs.py" / "inside"
    assert main(["data", action, f"--config={folder / 'glyphs.py'}", f"--out={taken}", "--samples=2"]) == 2
    error = capsys.readouterr().err
    assert f"--out={taken}: cannot be written" in error and error.count("\n") == 1
