"""Splits a conversation into its turns, each of which asks about the pictures alone.

In: a `Sample` of several turns. Out: one `Sample` per turn (`split_turns`), or one sequence of token ids in which the
turns share what they have in common and otherwise do not see each other (`encode_turns`, for `data.independent_turns`).
From placeholders and picture lengths also the position ids of a sequence (`interleaved_positions`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from visor_jax.data.chat import EncodedConversation, encode_conversation
from visor_jax.data.chat_template import IMAGE_MARKER, images_before
from visor_jax.data.sample import Sample, Sheet, SkipSample, samples_of
from visor_jax.data.tokenizer import ChatTokenizer


def split_turns(sample: Sample) -> list[Sample]:
    """Splits a conversation into single questions, each with the pictures up to its turn, earlier ones in front."""
    markers = [turn.question.count(IMAGE_MARKER) for turn in sample.turns]
    single = []
    for number, turn in enumerate(sample.turns):
        shown = sum(markers[: number + 1])
        question = images_before(turn.question, shown - markers[number])
        single.append(
            dataclasses.replace(
                sample,
                id=f"{sample.id}/{number}",
                images=sample.images[:shown] if any(markers) else sample.images,
                turns=(dataclasses.replace(turn, question=question),),
            )
        )
    return single


def single_turns(record: Sample | Sheet) -> list[Sample]:
    """Splits a sample, or the samples of a sheet in order, into single questions (`split_turns`)."""
    return [single for sample in samples_of(record) for single in split_turns(sample)]


def encode_turns(sample: Sample, tokenizer: ChatTokenizer, system: str | None) -> tuple[EncodedConversation, list[int]]:
    """Encodes a conversation whose turns are independent, for training on the answers.

    The shared beginning followed by one turn are the ids of that turn's prompt (`chat.encode_prompt` of its question
    alone), its answer and <|im_end|>. The beginning goes up to where the prompts differ and holds every picture. It
    leaves at least the last token of the assistant's header to each turn, because that token predicts the answer's
    first one.

    Returns:
        Token ids of the beginning, then of each turn, with their targets; and the turn of each id: 0 in the beginning,
        then 1, 2, ...

    Raises:
        SkipSample: as `chat.encode_conversation` for a turn alone; "late_picture" if a picture is not in the beginning.
    """
    if not sample.turns:
        raise SkipSample("empty_conversation", "no turns")
    singles = split_turns(sample)
    if len(singles[-1].images) < len(sample.images):
        raise SkipSample("image_count", f"{len(singles[-1].images)} markers for {len(sample.images)} pictures")
    alone = [
        encode_conversation(tokenizer, single.turns, system=single.system or system, num_images=len(single.images))
        for single in singles
    ]
    prompts = [encoded.token_ids[: encoded.target_mask.index(True)] for encoded in alone]
    ids_by_place = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    beginning = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, ids_by_place)]
    if beginning.count(tokenizer.image_token_id) < len(sample.images):
        raise SkipSample(
            "late_picture", "data.independent_turns: every picture must come before the text of all questions"
        )
    token_ids, target_mask, turns = [*beginning], [False] * len(beginning), [0] * len(beginning)
    for turn, (prompt, encoded) in enumerate(zip(prompts, alone, strict=True), start=1):
        end = len(prompt) + sum(encoded.target_mask)  # after <|im_end|>: nothing follows a turn
        token_ids += encoded.token_ids[len(beginning) : end]
        target_mask += encoded.target_mask[len(beginning) : end]
        turns += [turn] * (end - len(beginning))
    return EncodedConversation(token_ids, target_mask), turns


def positions_of_turns(positions: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Returns position ids in which every turn begins where turn 1 does, right behind what the turns share.

    Args:
        positions: position ids of the tokens as they follow each other.
        turns: of the same tokens, sorted: 0 for shared ones, then 1, 2, ...; at least one turn.
    """
    begins = positions[np.searchsorted(turns, np.maximum(turns, 1))]
    return positions - begins + begins[0]


def turns_of_answers(answer_mask: Sequence[bool]) -> np.ndarray:
    """Returns the turn of each answer token, -1 elsewhere. Each run of True in the mask is one answer, in order."""
    mask = np.asarray(answer_mask, bool)
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    return np.where(mask, np.cumsum(begins) - 1, -1)


def interleaved_positions(
    is_image: np.ndarray, lengths: Sequence[int], turns: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the position ids of visual and of text tokens, int32, and that of the next token.

    `is_image` [N] marks the placeholders of pictures, `lengths` are their visual positions.
    """
    steps = np.ones(len(is_image), np.int64)  # dense positions per token
    steps[is_image] = lengths
    starts = np.cumsum(steps) - steps
    if turns is not None:
        starts = positions_of_turns(starts, turns)
    visual = [np.arange(start, start + step) for start, step in zip(starts[is_image], lengths, strict=True)]
    length = int((starts + steps).max(initial=0))
    return np.concatenate([np.zeros(0), *visual]).astype(np.int32), starts[~is_image].astype(np.int32), length
