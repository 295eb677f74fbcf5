"""Streamed text: pieces are whole characters, arrive as early as possible, and together are the answer."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from visor_jax import testing
from visor_jax.generate.detokenize import UNFINISHED, Characters

TOKENIZER = testing.almanac_tokenizer()
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=UNFINISHED))


def pieces(ids: list[int]) -> list[str]:
    characters = Characters(TOKENIZER)
    return [*(characters.add(token) for token in ids), characters.rest()]


@given(texts)
def test_pieces_are_whole_characters_and_together_the_text(text: str) -> None:
    streamed = pieces(TOKENIZER.encode(text))
    assert "".join(streamed) == unicodedata.normalize("NFC", text)
    assert streamed[-1] == "", "after a complete text no rest is left"
    assert not any(UNFINISHED in piece for piece in streamed)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_pieces_of_any_tokens_join_to_their_decoded_text(ids: list[int]) -> None:
    """Also for incomplete characters, which a model may generate."""
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids)


def test_a_character_of_several_tokens_is_streamed_when_complete() -> None:
    ids = TOKENIZER.encode("red \N{GRINNING FACE} 3")
    streamed = pieces(ids)
    assert len(TOKENIZER.encode("\N{GRINNING FACE}")) == 4, "the tokenizer has one token per byte"
    assert [piece for piece in streamed if piece][-3:] == ["\N{GRINNING FACE}", " ", "3"]
    assert streamed.count("") == 4, "three incomplete bytes, and no rest at the end"


def test_an_incomplete_character_is_withheld_until_the_end() -> None:
    ids = TOKENIZER.encode("a\N{GRINNING FACE}")[:-1]
    assert "".join(pieces(ids)[:-1]) == "a"
    assert pieces(ids)[-1] == TOKENIZER.decode(ids)[1:]
