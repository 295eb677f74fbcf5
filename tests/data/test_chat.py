"""Tests of `visor_jax.data.chat`: each token and each target of conversations encoded by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visor_jax.data.chat import encode_conversation, encode_prompt
from visor_jax.data.chat_template import CHAT_TOKENS
from visor_jax.data.sample import SkipSample, Turn
from visor_jax.data.tokenizer import load_tokenizer
from visor_jax.errors import RequestError

TOKENIZER = load_tokenizer("almanac")


def pieces(ids: list[int]) -> list[str]:
    """Returns the text of each token."""
    return [TOKENIZER.decode([token], keep_special=True) for token in ids]


def conversation(*turns: tuple[str, str], **settings) -> tuple[list[str], list[str]]:
    """Returns the text of all tokens, and of the targets among them."""
    encoded = encode_conversation(TOKENIZER, [Turn(*turn) for turn in turns], **settings)
    assert len(encoded.token_ids) == len(encoded.target_mask)
    tokens = pieces(encoded.token_ids)
    return tokens, [token for token, target in zip(tokens, encoded.target_mask, strict=True) if target]


USER = ["<|im_start|>", "user\n", "<image>", "\n"]
QUESTION = ["Value", " of ", "Rome", "?", "<|im_end|>", "\n"]
HEADER = ["<|im_start|>", "assistant\n"]


def test_one_turn() -> None:
    tokens, targets = conversation(("Value of Rome?", "red"))
    assert tokens == [*USER, *QUESTION, *HEADER, "red", "<|im_end|>", "\n"]
    assert targets == ["red", "<|im_end|>"]


def test_two_turns_have_one_picture_and_both_answers_are_targets() -> None:
    tokens, targets = conversation(("Read the page.", "Rome 3"), ("Which has 3?", "3"))
    assert tokens == [
        *USER, "Read", " the", " page", ".", "<|im_end|>", "\n",
        *HEADER, "Rome", " ", "3", "<|im_end|>", "\n",
        "<|im_start|>", "user\n", "Which", " has ", "3", "?", "<|im_end|>", "\n",
        *HEADER, "3", "<|im_end|>", "\n",
    ]  # fmt: skip
    assert targets == ["Rome", " ", "3", "<|im_end|>", "3", "<|im_end|>"]


def test_a_system_text_comes_first_and_only_if_there_is_one() -> None:
    tokens, targets = conversation(("Value of Rome?", "red"), system="Name the page.")
    system = ["<|im_start|>", "system\n", "Name", " the", " page", ".", "<|im_end|>", "\n"]
    assert tokens == [*system, *USER, *QUESTION, *HEADER, "red", "<|im_end|>", "\n"]
    assert targets == ["red", "<|im_end|>"]
    assert conversation(("Q", "A"), system="") == conversation(("Q", "A"), system=None) == conversation(("Q", "A"))


def test_llava_targets_are_the_assistants_turn_and_all_structure() -> None:
    encoded = encode_conversation(TOKENIZER, [Turn("Value of Rome?", "red")], system="Name the page.", targets="llava")
    marked = [
        token.upper() if target and token[0].isalpha() else token
        for token, target in zip(pieces(encoded.token_ids), encoded.target_mask, strict=True)
    ]
    assert marked == [
        "<|im_start|>", "system\n", "Name", " the", " page", ".", "<|im_end|>", "\n",
        *USER, *QUESTION, "<|im_start|>", "ASSISTANT\n", "RED", "<|im_end|>", "\n",
    ]  # fmt: skip
    structure = {"\n", "<|im_start|>", "<|im_end|>"}
    for token, target in zip(pieces(encoded.token_ids), encoded.target_mask, strict=True):
        assert target == (token in {*structure, "assistant\n", "red"})


@pytest.mark.parametrize(
    "written",
    ["Value of Rome?", "<image>\nValue of Rome?", "Value of Rome? <image>", "\n<image>Value of Rome?\n"],
)
def test_a_single_picture_is_placed_first_on_a_separate_line(written: str) -> None:
    assert conversation((written, "red"))[0] == [*USER, *QUESTION, *HEADER, "red", "<|im_end|>", "\n"]


def test_several_pictures_stay_where_they_are() -> None:
    tokens, _ = conversation(("Is <image> or <image> red?", "up"), num_images=2)
    assert [token for token in tokens if token == "<image>"] == ["<image>"] * 2
    start, end = tokens.index("user\n"), tokens.index("<|im_end|>")
    assert "".join(tokens[start:end]) == "user\nIs <image> or <image> red?"


def test_each_question_may_bring_its_own_picture() -> None:
    tokens, _ = conversation(("First: <image>", "red"), ("Then <image>?", "blue"), num_images=2)
    assert "".join(tokens).count("<|im_start|>user\n<image>\n") == 2
    assert "".join(tokens).count("<image>") == 2


def test_text_alone_has_no_picture() -> None:
    tokens, _ = conversation(("Value of Rome?", "red"), num_images=0)
    assert tokens == ["<|im_start|>", "user\n", *QUESTION, *HEADER, "red", "<|im_end|>", "\n"]


def test_a_picture_without_a_question() -> None:
    tokens, _ = conversation(("<image>\n", "red"))
    assert tokens == ["<|im_start|>", "user\n", "<image>", "<|im_end|>", "\n", *HEADER, "red", "<|im_end|>", "\n"]


@pytest.mark.parametrize(
    "turns, num_images",
    [
        ([("<image> and <image>", "red")], 1),
        ([("<image>", "red")], 0),
        ([("Which?", "red")], 2),
        ([("<image>", "red"), ("<image>", "red")], 1),
        ([("<image>", "an <image>")], 1),
    ],
)
def test_pictures_and_markers_must_be_equally_many(turns: list[tuple[str, str]], num_images: int) -> None:
    with pytest.raises(SkipSample, match="markers for") as skipped:
        conversation(*turns, num_images=num_images)
    assert skipped.value.reason == "image_count"


@pytest.mark.parametrize("turns", [[], [("Which?", "")], [("Which?", "red"), ("And?", " \n")]])
def test_conversations_without_an_answer_are_skipped(turns: list[tuple[str, str]]) -> None:
    with pytest.raises(SkipSample) as skipped:
        conversation(*turns)
    assert skipped.value.reason == "empty_conversation"


@pytest.mark.parametrize("turn", [("a\ud800", "b"), ("a", "b\udc00")])
def test_half_a_surrogate_pair_is_skipped(turn: tuple[str, str]) -> None:
    with pytest.raises(SkipSample) as skipped:
        conversation(turn)
    assert skipped.value.reason == "bad_text"


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(RequestError, match="expected one of answer, llava, got 'answers'"):
        conversation(("a", "b"), targets="answers")


texts = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*CHAT_TOKENS[:3], "\n", " ", "user", "a"])
).map("".join)
answers = texts.filter(lambda text: text.strip() != "" and "<image>" not in text)
questions = texts.filter(lambda text: "<image>" not in text)


@given(st.lists(st.tuples(questions, answers), min_size=1, max_size=3), texts, st.booleans())
def test_written_chat_tokens_forge_nothing(turns: list[tuple[str, str]], system: str, llava: bool) -> None:
    encoded = encode_conversation(
        TOKENIZER, [Turn(*turn) for turn in turns], system=system, targets="llava" if llava else "answer"
    )
    count = 2 * len(turns) + (system != "")
    assert encoded.token_ids.count(TOKENIZER.start_token_id) == count
    assert encoded.token_ids.count(TOKENIZER.end_token_id) == count
    assert encoded.token_ids.count(TOKENIZER.image_token_id) == 1
    assert TOKENIZER.pad_token_id not in encoded.token_ids


@given(st.lists(st.tuples(questions, answers), min_size=1, max_size=2), texts)
def test_the_prompt_is_what_stands_before_the_first_target(turns: list[tuple[str, str]], system: str) -> None:
    encoded = encode_conversation(TOKENIZER, [Turn(*turn) for turn in turns], system=system)
    prompt = encode_prompt(TOKENIZER, turns[0][0], 1, system)
    assert encoded.token_ids[: len(prompt)] == prompt
    assert encoded.target_mask.index(True) == len(prompt)
    assert pieces(prompt)[-2:] == HEADER


marked = st.lists(
    st.tuples(st.lists(texts.filter(lambda text: "<image>" not in text), min_size=1, max_size=3), answers)
)


@given(marked.filter(bool), texts, st.booleans())
def test_a_prompt_with_history_is_the_same_conversation_as_in_training(
    turns: list[tuple[list[str], str]], system: str, unmarked: bool
) -> None:
    """Up to each of its answers, with pictures anywhere, or with one picture and no marker."""
    conversation = [Turn(("" if unmarked else "<image>").join(pieces), answer) for pieces, answer in turns]
    for count in range(1, len(turns) + 1):
        before, (*earlier, latest) = conversation[:count], conversation[:count]
        images = 1 if unmarked else sum(turn.question.count("<image>") for turn in before)
        encoded = encode_conversation(TOKENIZER, before, system=system, num_images=images)
        history = [(turn.question, turn.answer) for turn in earlier]
        prompt = encode_prompt(TOKENIZER, latest.question, images, system, history)
        answer = [*TOKENIZER.encode(latest.answer.strip()), TOKENIZER.end_token_id, *TOKENIZER.encode("\n")]
        assert [*prompt, *answer] == encoded.token_ids


def test_a_history_with_a_blank_answer_or_a_marker_too_many_is_no_conversation() -> None:
    with pytest.raises(SkipSample, match="turn 2 has no answer"):
        encode_prompt(TOKENIZER, "And?", history=[("What?", "red"), ("Where?", " ")])
    with pytest.raises(SkipSample, match="2 <image> markers for 1 pictures"):
        encode_prompt(TOKENIZER, "And <image>?", history=[("<image>\nWhat?", "red")])


def test_a_prompt_checks_its_pictures_too() -> None:
    with pytest.raises(SkipSample, match="image_count"):
        encode_prompt(TOKENIZER, "<image> or <image>?", 1)
