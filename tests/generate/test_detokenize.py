"""Text while it comes: the pieces are whole characters, come as early as they can, and together are the answer."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from visor_jax import testing
from visor_jax.generate.detokenize import UNFINISHED, Characters

TOKENIZER = testing.glyphs_tokenizer()
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=UNFINISHED))


def pieces(ids: list[int]) -> list[str]:
    characters = Characters(TOKENIZER)
    return [*(characters.add(token) for token in ids), characters.rest()]


@given(texts)
def test_pieces_are_whole_characters_and_together_the_text(text: str) -> None:
    found = pieces(TOKENIZER.encode(text))
    assert "".join(found) == unicodedata.normalize("NFC", text)
    assert found[-1] == "", "a whole text leaves nothing over"
    assert not any(UNFINISHED in piece for piece in found)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_tokens_are_in_the_end_what_they_decode_to(ids: list[int]) -> None:
    """Half characters too, which no text has but a model may say."""
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids)


def test_a_character_of_several_tokens_comes_when_it_is_whole() -> None:
    ids = TOKENIZER.encode("red \N{GRINNING FACE} 3")
    found = pieces(ids)
    assert len(TOKENIZER.encode("\N{GRINNING FACE}")) == 4, "the tokenizer spells it byte by byte"
    assert [piece for piece in found if piece][-3:] == ["\N{GRINNING FACE}", " ", "3"]
    assert found.count("") == 4, "three bytes that finish nothing, and nothing held back at the end"


def test_half_a_character_at_the_end_is_held_back_until_there() -> None:
    ids = TOKENIZER.encode("a\N{GRINNING FACE}")[:-1]
    assert "".join(pieces(ids)[:-1]) == "a"
    assert pieces(ids)[-1] == TOKENIZER.decode(ids)[1:]
