"""The OCR baseline: its figures, and a run with a stand-in for the engine and one for the model."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def ocr(script: Callable[[str], types.ModuleType]) -> types.ModuleType:
    return script("ocr")


def test_words_count_as_often_as_they_are_there(ocr: types.ModuleType) -> None:
    pairs = [("Art 12\nBus 12", "12 12 Art Bus"), ("Art 12", "Art Art")]
    row = ocr.figures(pairs, 4.0)
    assert row == {"words": 5 / 6, "f1": 10 / 12, "pages": 0.5, "seconds_per_page": 2.0}


def test_both_readers_see_the_same_pages(
    ocr: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    class Engine:
        def __init__(self, params: dict[str, Any]) -> None:
            assert params

        def __call__(self, page: Any) -> types.SimpleNamespace:
            shapes.append(page.shape)
            return types.SimpleNamespace(txts=None if len(shapes) == 1 else ("Total",))

    class Model:
        def answer(self, images: list[Any], question: str, budget: str, max_new_tokens: int) -> types.SimpleNamespace:
            assert images[0].shape == (96, 96, 3) and question and budget == "full"
            return types.SimpleNamespace(text="Total")

    monkeypatch.setitem(sys.modules, "rapidocr", types.SimpleNamespace(RapidOCR=Engine))
    monkeypatch.setattr(ocr.visor_jax, "load", lambda path: Model(), raising=False)
    assert ocr.main(["--model=x", "--pages=3", f"--out={tmp_path / 'ocr.json'}"]) == 0
    assert shapes == [(384, 384, 3)] * 3
    report = json.loads((tmp_path / "ocr.json").read_text())
    assert report["rapidocr"].keys() == report["model"].keys() == {"words", "f1", "pages", "seconds_per_page", "kinds"}


def test_without_the_engine_the_script_says_what_to_install(
    ocr: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert ocr.main(["--model=x"]) == 2
    assert "pip install rapidocr" in capsys.readouterr().err
