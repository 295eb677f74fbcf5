"""Tests of the included tokenizer of the data set `glyphs`."""

from __future__ import annotations

from pathlib import Path

from visor_jax.config.data_fields import ASSETS
from visor_jax.data.glyphs.build_tokenizer import MAX_VOCABULARY, ROLES, write
from visor_jax.data.glyphs.render import DIGITS
from visor_jax.data.glyphs.source import background_names, color_names, glyph_names
from visor_jax.data.glyphs.words import PHRASINGS
from visor_jax.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("glyphs")


def test_every_name_is_one_token_at_the_start_and_after_a_space() -> None:
    names = [*glyph_names(), *color_names(), *background_names()]
    bare, spaced = zip(*(TOKENIZER.word_ids(name) for name in names), strict=True)
    assert [TOKENIZER.decode([token]) for token in bare] == names
    # Qwen separates digits from the space before them.
    assert [TOKENIZER.decode([token]) for token in spaced] == [name if name in DIGITS else f" {name}" for name in names]
    assert len(set(bare)) == len(set(spaced)) == len(names)


def test_roles_and_newline_are_single_tokens() -> None:
    for text in (*ROLES, "\n"):
        assert len(TOKENIZER.encode(text)) == 1


def test_questions_are_short() -> None:
    fields = {"letter": "A", "digit": "3", "start": "red", "background": "navy", "colour": "red", "shape": "ring"}
    for phrasings in PHRASINGS.values():
        for question, answer in phrasings:
            assert 4 <= len(TOKENIZER.encode(question.format_map(fields))) <= 10
            assert 1 <= len(TOKENIZER.encode(answer.format_map(fields))) <= 2


def test_the_documented_script_makes_the_files_that_ship(tmp_path: Path) -> None:
    assert write(tmp_path).get_vocab_size() <= MAX_VOCABULARY
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == ((ASSETS / "glyphs") / name).read_bytes()
