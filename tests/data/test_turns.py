"""Independent turns: each has the tokens and position ids that it has alone, and what they share is there once."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from visor_jax import testing
from visor_jax.data import chat
from visor_jax.data.collate import RowShape, count_text, encode_example, encode_tokens, make_batch
from visor_jax.data.sample import Sample, Sheet, SkipSample, Turn
from visor_jax.data.sheets import encode_record
from visor_jax.data.turns import encode_turns, split_turns

ARCH = testing.tiny_architecture(3)
TOKENIZER = testing.almanac_tokenizer()
PICTURE = testing.random_picture(8, 8)


def conversation(*turns: tuple[str, str], images: int = 1, system: str = "") -> Sample:
    pictures = (PICTURE,) * images
    return Sample("7", pictures, tuple(Turn(q, a, f"task{i}") for i, (q, a) in enumerate(turns)), "test", system=system)


def alone(sample: Sample, number: int):
    """Returns the example of one turn: the prompt of its question, the answer and the end token."""
    single = split_turns(sample)[number]
    turn = single.turns[0]
    prompt = chat.encode_prompt(TOKENIZER, turn.question, len(single.images), sample.system or None)
    answer = [*TOKENIZER.encode(turn.answer.strip()), TOKENIZER.end_token_id]
    targets = [False] * len(prompt) + [True] * len(answer)
    return encode_tokens(
        [*prompt, *answer],
        single.images,
        TOKENIZER.image_token_id,
        ARCH,
        target_mask=targets,
        turn_index=[number] * len(targets),
    )


texts = st.text("ab? ", max_size=6)
answers = st.text("abc ", min_size=1, max_size=4).filter(str.strip)
conversations = st.builds(
    lambda turns, images, system: conversation(*turns, images=images, system=system),
    st.lists(st.tuples(texts, answers), min_size=1, max_size=5),
    st.integers(0, 1),
    st.sampled_from(["", "Be brief."]),
)


@settings(deadline=None)
@given(conversations)
def test_each_turn_is_encoded_as_if_it_alone_were_asked(sample):
    example = encode_example(sample, TOKENIZER, ARCH, independent_turns=True)
    assert example.text_turns is not None and example.tasks == tuple(turn.task for turn in sample.turns)
    for number in range(len(sample.turns)):
        expected, own = alone(sample, number), np.isin(example.text_turns, (0, number + 1))
        np.testing.assert_array_equal(example.text_tokens[own], expected.text_tokens)
        np.testing.assert_array_equal(example.text_positions[own], expected.text_positions)
        np.testing.assert_array_equal(example.loss_mask[own], expected.loss_mask)
        np.testing.assert_array_equal(example.turn_index[own], expected.turn_index)
        np.testing.assert_array_equal(example.visual_positions, expected.visual_positions)
        np.testing.assert_array_equal(example.tiles, expected.tiles)
    before = np.roll(example.text_turns, 1)
    assert not example.loss_mask[example.text_turns == 0].any()
    assert (example.text_turns == before)[example.loss_mask].all(), "a target is predicted from its own turn"
    assert np.all(np.diff(example.text_turns) >= 0)
    assert example.length == max(alone(sample, number).length for number in range(len(sample.turns)))
    assert count_text(sample, TOKENIZER, independent_turns=True) == example.size.text


def test_what_turns_share_goes_up_to_where_they_differ() -> None:
    """It ends before the assistant's header does, so that questions that are equal have answers of their own."""
    sample = conversation(("What is this?", "a dog"), ("What is that?", "a cat"))
    encoded, turns = encode_turns(sample, TOKENIZER, None)
    shared = turns.count(0)
    prompts = [chat.encode_prompt(TOKENIZER, turn.question) for turn in sample.turns]
    assert prompts[0][:shared] == prompts[1][:shared] and prompts[0][shared] != prompts[1][shared]
    assert TOKENIZER.image_token_id in encoded.token_ids[:shared]
    twice = conversation(("What is this?", "a dog"), ("What is this?", "an animal"))
    assert encode_turns(twice, TOKENIZER, None)[1].count(0) == len(prompts[0]) - 1


def test_pictures_belong_to_what_turns_share() -> None:
    early = conversation(("<image>\n<image>\nA?", "a"), ("B?", "b"), images=2)
    assert encode_example(early, TOKENIZER, ARCH, independent_turns=True).size.tiles == 2
    for late in (
        conversation(("<image>\nA?", "a"), ("<image>\nB?", "b"), images=2),
        conversation(("Hello", "Hi"), ("<image>\nB?", "b")),
        conversation(("One <image>, two <image>?", "a"), ("B?", "b"), images=2),
    ):
        for encode in (encode_example, lambda *x, **k: count_text(x[0], x[1], **k)):
            with pytest.raises(
                SkipSample, match=r"late_picture: data\.independent_turns: every picture must come before"
            ):
                encode(late, TOKENIZER, ARCH, independent_turns=True)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (conversation(), "empty_conversation"),
        (conversation(("A?", "a"), ("B?", " ")), "empty_conversation"),
        (conversation(("<image>\nA?", "a"), images=2), "image_count"),
        (conversation(("<image>\nA?", "a"), ("<image>", "b")), "image_count"),
        (conversation(("A?", "a"), images=2), "image_count"),
        (conversation(("A?", "\ud800"), ("B?", "b")), "bad_text"),
    ],
)
def test_skips_as_a_conversation_does(sample, reason):
    for independent_turns in (False, True):
        with pytest.raises(SkipSample, match=reason):
            encode_example(sample, TOKENIZER, ARCH, independent_turns=independent_turns)


def test_a_sample_whose_turns_do_not_all_fit_is_skipped() -> None:
    sample = conversation(("A?", "a"), ("B?", "b"))
    size = encode_example(sample, TOKENIZER, ARCH, independent_turns=True).size
    assert encode_example(sample, TOKENIZER, ARCH, independent_turns=True, row_shape=size).size == size
    with pytest.raises(SkipSample, match="too_long"):
        row_shape = dataclasses.replace(size, text=size.text - 1)
        encode_example(sample, TOKENIZER, ARCH, independent_turns=True, row_shape=row_shape)


def test_batches_have_turns_only_if_they_are_independent() -> None:
    samples = [conversation(("A?", "a"), ("B?", "b")), conversation(("C?", "c"))]
    examples = [encode_example(sample, TOKENIZER, ARCH, independent_turns=True) for sample in samples]
    room = RowShape(8, 40, 90)
    batch = make_batch([examples, []], room, ARCH, independent_turns=True)
    turns, first, second = batch.arrays["text_turns"], *(example.size.text for example in examples)
    assert turns.dtype == np.int32 and not turns[1].any() and not turns[0, first + second :].any()
    np.testing.assert_array_equal(turns[0, :first], examples[0].text_turns)
    np.testing.assert_array_equal(turns[0, first : first + second], examples[1].text_turns)
    assert sorted(set(batch.arrays["turn_index"][0])) == [-1, 0, 1, 2] and batch.tasks[0] == ["task0", "task1", "task0"]
    sheet = encode_record(Sheet(tuple(samples)), TOKENIZER, ARCH, independent_turns=True)
    of_sheet = make_batch([[sheet], []], room, ARCH, independent_turns=True)
    assert of_sheet.tasks == batch.tasks and of_sheet.ids == batch.ids
    for name in ("text_turns", "text_segments", "turn_index", "text_positions", "loss_mask"):
        np.testing.assert_array_equal(of_sheet.arrays[name], batch.arrays[name])
    plain = encode_example(samples[0], TOKENIZER, ARCH)
    assert "text_turns" not in make_batch([[plain]], room, ARCH).arrays
    for row, independent_turns in ((examples, False), ([plain], True)):
        with pytest.raises(ValueError, match="row 0: independent_turns="):
            make_batch([row], room, ARCH, independent_turns=independent_turns)
