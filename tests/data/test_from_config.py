"""Single questions from conversations, each with the pictures shown up to it."""

import numpy as np

from visor_jax.data.sample import Sample, Turn
from visor_jax.data.turns import split_turns


def conversation(num_images: int, *questions: str) -> Sample:
    images = tuple(np.full((2, 2, 3), number, np.uint8) for number in range(num_images))
    turns = tuple(Turn(question, f"answer {number}") for number, question in enumerate(questions))
    return Sample(id="7", images=images, turns=turns, source="test")


def test_every_question_sees_the_pictures_shown_up_to_it() -> None:
    parts = split_turns(conversation(3, "hello", "<image>\nwhat?", "and <image> beside <image>?", "all?"))
    assert [part.id for part in parts] == ["7/0", "7/1", "7/2", "7/3"]
    assert [[int(image[0, 0, 0]) for image in part.images] for part in parts] == [[], [0], [0, 1, 2], [0, 1, 2]]
    assert [part.turns[0].question for part in parts] == [
        "hello",
        "<image>\nwhat?",
        "<image>\nand <image> beside <image>?",
        "<image>\n<image>\n<image>\nall?",
    ]
    assert [part.turns[0].answer for part in parts] == [f"answer {number}" for number in range(4)]


def test_without_markers_the_one_picture_belongs_to_every_question() -> None:
    parts = split_turns(conversation(1, "what?", "where?"))
    assert [len(part.images) for part in parts] == [1, 1]
    assert [part.turns[0].question for part in parts] == ["what?", "where?"]
