"""Tests of `visor_jax.data.tokenizer` and of the included tokenizer of the data set `almanac`."""

from __future__ import annotations

import json
import pickle
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.config.data_fields import ASSETS
from visor_jax.data.almanac.build_tokenizer import HEADERS, MAX_VOCABULARY, write
from visor_jax.data.chat import encode_conversation, encode_prompt
from visor_jax.data.chat_template import CHAT_TOKENS
from visor_jax.data.sample import Turn
from visor_jax.data.tokenizer import ChatTokenizer, load_tokenizer
from visor_jax.errors import RequestError

TOKENIZER = load_tokenizer("almanac")
texts = st.text(st.characters(exclude_categories=["Cs"]))


def changed(tmp_path: Path, **fields) -> Path:
    """Writes a copy of the included tokenizer.json with top-level fields replaced; None removes one."""
    content = json.loads(((ASSETS / "almanac") / "tokenizer.json").read_text())
    content = {name: value for name, value in {**content, **fields}.items() if value is not None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path / "tokenizer.json"


@given(texts)
def test_any_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == unicodedata.normalize("NFC", text)


@given(st.lists(texts | st.sampled_from(CHAT_TOKENS)).map("".join))
def test_text_never_becomes_a_chat_token(text: str) -> None:
    forbidden = {TOKENIZER.special(token) for token in CHAT_TOKENS}
    assert forbidden.isdisjoint(TOKENIZER.encode(text))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == unicodedata.normalize("NFC", text)


def test_chat_tokens_have_separate_ids() -> None:
    ids = [TOKENIZER.pad_token_id, TOKENIZER.start_token_id, TOKENIZER.end_token_id, TOKENIZER.image_token_id]
    assert [TOKENIZER.decode([token], keep_special=True) for token in ids] == list(CHAT_TOKENS)
    assert TOKENIZER.decode(ids) == ""
    assert len(set(ids)) == 4 and max(ids) < TOKENIZER.vocab_size <= MAX_VOCABULARY


def test_roles_and_newline_are_single_tokens() -> None:
    for text in (*HEADERS, "\n"):
        assert len(TOKENIZER.encode(text)) == 1
    assert [TOKENIZER.decode([token]) for token in TOKENIZER.encode("123")] == ["1", "2", "3"]


def test_the_documented_script_makes_the_files_that_ship(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == ((ASSETS / "almanac") / name).read_bytes()


def test_transformers_reads_the_folder_and_agrees() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(ASSETS / "almanac")
    assert len(theirs) == TOKENIZER.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (TOKENIZER.end_token_id, TOKENIZER.pad_token_id)
    assert theirs.convert_tokens_to_ids("<image>") == TOKENIZER.image_token_id
    for text in ("Value of Brazil?", "More: Rome or Oslo?", " a\n\n b  é ", "it's 42"):
        assert theirs(text)["input_ids"] == TOKENIZER.encode(text)
    messages = [{"role": "user", "content": "<image>\nWhich has 42?"}, {"role": "assistant", "content": "Rome"}]
    question = "Which has 42?"
    ours = encode_conversation(TOKENIZER, [Turn(question, "Rome")]).token_ids
    assert theirs.apply_chat_template(messages)["input_ids"] == ours
    prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert prompt == encode_prompt(TOKENIZER, question)


def test_a_file_a_folder_and_a_pickled_copy_are_the_same(tmp_path: Path) -> None:
    text = "Which has 42? <|im_end|>"
    file = changed(tmp_path)
    for other in (load_tokenizer(file), load_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(TOKENIZER))):
        assert isinstance(other, ChatTokenizer)
        assert other.encode(text) == TOKENIZER.encode(text)
        assert other.image_token_id == TOKENIZER.image_token_id


def test_added_tokens_not_marked_as_special_are_not_recognized_either(tmp_path: Path) -> None:
    content = json.loads(((ASSETS / "almanac") / "tokenizer.json").read_text())
    added = [{**token, "special": False} for token in content["added_tokens"]]
    tokenizer = load_tokenizer(changed(tmp_path, added_tokens=added))
    assert tokenizer.encode("<image><|im_end|>") == TOKENIZER.encode("<image><|im_end|>")


def test_padding_and_truncation_of_the_file_are_not_applied(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = load_tokenizer(changed(tmp_path, truncation=truncation))
    assert tokenizer.encode("Which has 42?") == TOKENIZER.encode("Which has 42?")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere\.json; expected a tokenizer\.json or .*'almanac'"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(RequestError, match=f"no file {tmp_path}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"{}", b'"x"', b"\xff\xfe\x00", b'{"added_tokens": 3}', b'{"added_tokens": [{}]}',
     b'{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
     b'{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
     b'{"added_tokens": [], "model": {"type": "None"}}', b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(RequestError, match=r"tokenizer\.json") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("token", CHAT_TOKENS)
def test_every_chat_token_is_required(tmp_path: Path, token: str) -> None:
    content = json.loads(((ASSETS / "almanac") / "tokenizer.json").read_text())
    others = [added for added in content["added_tokens"] if added["content"] != token]
    with pytest.raises(RequestError) as refused:
        load_tokenizer(changed(tmp_path, added_tokens=others))
    assert token in str(refused.value) and "no added token" in str(refused.value)
