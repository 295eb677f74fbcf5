"""Tests of `visor_jax.data.preview`: content of a contact sheet, also for unusual samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visor_jax.data import preview_text
from visor_jax.data.preview import PICTURE, contact_sheet
from visor_jax.data.preview_text import TextPainter
from visor_jax.data.sample import Sample, Turn
from visor_jax.testing import almanac_source


def sheet_of(tmp_path: Path, *samples: Sample, columns: int = 0) -> np.ndarray:
    contact_sheet(samples, tmp_path / "sheet.png", columns)
    with Image.open(tmp_path / "sheet.png") as sheet:
        return np.asarray(sheet)


def contains(sheet: np.ndarray, picture: np.ndarray) -> bool:
    height, width, _ = picture.shape
    corners = np.argwhere((sheet == picture[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + height, x : x + width], picture) for y, x in corners)


def test_shows_every_picture_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    samples = [almanac_source("test")[i] for i in range(5)]
    sheet = sheet_of(tmp_path, *samples)
    for sample in samples:
        assert contains(sheet, np.kron(sample.images[0], np.ones((PICTURE // 96, PICTURE // 96, 1), np.uint8)))


def test_questions_and_answers_leave_ink(tmp_path: Path) -> None:
    sample = almanac_source("test")[0]
    wordless = Sample(sample.id, sample.images, (), sample.source, sample.level)
    with_words, without = sheet_of(tmp_path, sample), sheet_of(tmp_path, wordless)
    assert with_words.shape[0] > without.shape[0]
    beneath = with_words[without.shape[0] :]
    assert (beneath < 128).any()


def test_columns_decide_the_shape(tmp_path: Path) -> None:
    samples = [almanac_source("test")[i] for i in range(4)]
    tall, wide = sheet_of(tmp_path, *samples, columns=1), sheet_of(tmp_path, *samples, columns=4)
    assert tall.shape[0] > 3 * PICTURE > tall.shape[1]
    assert wide.shape[1] > 4 * PICTURE > 3 * PICTURE > wide.shape[0]


def test_line_breaks_in_names_change_nothing(tmp_path: Path) -> None:
    """Ids and tasks of the data are printed on one line."""
    sample = almanac_source("test")[0]
    turns = tuple(dataclasses.replace(turn, task="a b") for turn in sample.turns)
    plain = dataclasses.replace(sample, id="one two", turns=turns, level="hard rows")
    turns = tuple(dataclasses.replace(turn, task="a\r\nb\n") for turn in sample.turns)
    broken = dataclasses.replace(sample, id="one\n\ttwo\r", turns=turns, level="hard\nrows")
    np.testing.assert_array_equal(sheet_of(tmp_path, broken), sheet_of(tmp_path, plain))


@pytest.mark.parametrize("shape", [(900, 1200), (1, 1), (3000, 2), (2, 3000), (288, 288), (289, 289)])
def test_any_size_of_picture_fits_its_cell(tmp_path: Path, shape: tuple[int, int]) -> None:
    sample = Sample("x", (np.zeros((*shape, 3), np.uint8),), (), "test")
    sheet = sheet_of(tmp_path, sample)
    rows, columns = np.nonzero((sheet == 0).all(-1))
    longer, shorter = PICTURE, max(1, PICTURE * min(shape) // max(shape))
    sides = sorted([int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1])
    assert abs(sides[1] - longer) <= max(shape) and abs(sides[0] - shorter) <= max(1, min(shape))
    assert sides[1] <= PICTURE


def test_unusual_texts_and_samples_are_drawn(tmp_path: Path) -> None:
    picture = np.zeros((30, 40, 3), np.uint8)
    endless = Sample("e" * 500, (picture,), (Turn("<image>\n" + "w" * 5000, "word " * 5000),), "test")
    odd = Sample("", (picture,) * 9, (Turn("a\x00b\ud800", "\u202e日本", "t" * 100), Turn("", "")), "test", "easy")
    bare = Sample("bare", (), (), "test", "unheard-of")
    sheet = sheet_of(tmp_path, endless, odd, bare)
    assert sheet.shape[0] < 1500


def test_nothing_is_left_behind_when_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        contact_sheet([], tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []


def test_the_same_samples_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        contact_sheet([almanac_source("test")[3]], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_what_no_font_has_is_written_out(tmp_path: Path) -> None:
    """DejaVu Sans has Arabic and is always installed; characters that it lacks get a name or number, no box."""
    painter = TextPainter(14)
    assert painter.readable("ما اللون Ünï Ж λ\n\t") == "ما اللون Ünï Ж λ\n\t" and not painter.missing
    assert painter.readable("a\u202eb\x07\ufe0f") == "a[U+202E]b[U+0007]"
    private = "\ue123"
    assert painter.readable(private) == "[U+E123]" and painter.missing == {"\u202e", "\x07", private}
    sample = Sample("1", (), (Turn(f"a{private}", "أحمر"),), "test", system="Be terse.")
    assert contact_sheet([sample], tmp_path / "a.png") == {private}
    assert contact_sheet([Sample("1", (), (Turn("a", "b"),), "test")], tmp_path / "b.png") == set()


def test_characters_are_looked_for_in_other_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that the first font lacks come from the next fonts; those that all lack are named."""
    fonts = Path(preview_text._first_font()).parent
    for name in ("_font_with", "_first_font", "_installed"):
        getattr(preview_text, name).cache_clear()
    monkeypatch.setattr(preview_text, "_first_font", lambda: str(fonts / "cmsy10.ttf"))
    monkeypatch.setattr(
        preview_text, "_installed", lambda: (str(fonts / "gone.ttf"), str(fonts / "DejaVuSansMono.ttf"))
    )
    try:
        painter = TextPainter(14)
        assert painter.readable("Ж") == "Ж" and painter.readable("🛸") == ":flying_saucer:"
        assert painter.getlength("ЖЖ") == 2 * painter.getlength("Ж") > 0
    finally:
        preview_text._font_with.cache_clear()


def test_a_system_text_is_shown(tmp_path: Path) -> None:
    plain = Sample("1", (), (Turn("a", "b"),), "test")
    with_system = Sample("1", (), (Turn("a", "b"),), "test", system="Be terse.")
    assert sheet_of(tmp_path, with_system).shape[0] > sheet_of(tmp_path, plain).shape[0]
