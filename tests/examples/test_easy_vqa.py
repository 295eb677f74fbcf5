"""The example with easy-VQA writes conversations that training can read; the package is replaced by a small one."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visor_jax.data.sources.llava import LlavaSource

SCRIPT = Path(__file__).parents[2] / "examples" / "easy_vqa" / "make_easy_vqa.py"
ASKED = [("what is the color of the shape?", "red"), ("what shape is present?", "circle"),
         ("is there not a red shape?", "no"), ("what is the red shape?", "circle"),
         ("what color is the circle?", "red")]  # fmt: skip
KINDS = {"color": 2, "shape": 2, "yes_no": 1}


@pytest.fixture
def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("make_easy_vqa", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(folder: Path) -> types.SimpleNamespace:
    """Returns a package with the functions of easy-vqa 1.0: six training and two test pictures."""
    functions = {}
    for split, count in (("train", 6), ("test", 2)):
        paths = {number: str(folder / f"{split}{number}.png") for number in range(count)}
        for number, path in paths.items():
            Image.fromarray(np.full((64, 64, 3), 20 * number, np.uint8)).save(path)
        questions = [(question, answer, number) for number in range(count) for question, answer in ASKED]
        functions[f"get_{split}_image_paths"] = lambda paths=paths: paths
        functions[f"get_{split}_questions"] = lambda questions=questions: tuple(zip(*questions, strict=True))
    return types.SimpleNamespace(**functions)


def test_conversations_have_all_questions_of_a_picture(
    script: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "VALIDATION", 2)
    assert script.write_easy_vqa(package(tmp_path), tmp_path / "out") == {"train": 4, "validation": 2, "test": 2}
    ids = set()
    for split in ("train", "validation", "test"):
        source = LlavaSource(tmp_path / "out" / f"{split}.json", tmp_path / "out", max_image_pixels=64 * 64)
        for index in range(len(source)):
            sample = source[index]
            ids.add(sample.id)
            asked = [(turn.question.replace("<image>", "").strip(), turn.answer) for turn in sample.turns]
            assert sorted(asked) == sorted(ASKED)
            tasks = [turn.task for turn in sample.turns]
            assert {kind: tasks.count(kind) for kind in KINDS} == KINDS
            assert sample.images[0].shape == (64, 64, 3)
    assert len(ids) == 8


def test_the_package_that_is_installed() -> None:
    """The functions that the script calls, and the questions that it sorts into kinds."""
    easy_vqa = pytest.importorskip("easy_vqa")
    assert len(easy_vqa.get_test_image_paths()) == 1000
    questions, answers, numbers = easy_vqa.get_test_questions()
    assert len(questions) == len(answers) == len(numbers) == 9673
