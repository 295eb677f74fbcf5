"""Defines the questions about glyph pictures: tasks, their levels and scenes, and the wording of questions and answers.

Text is expensive in a small model (every token passes every layer), so questions are short: 4 to 10 tokens of the glyph
tokenizer, which is trained on exactly these sentences (`build_tokenizer`). An answer follows from the picture and its
question alone: if two phrasings of a task need different answers, the question says which.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A kind of question: "easy" if one patch holds the answer, "hard" if it needs relations between patches."""

    level: str
    scene: str


TASKS = {
    "bg": Task("easy", "scatter"),
    "digit": Task("easy", "scatter"),
    "shape": Task("easy", "scatter"),
    "colour": Task("easy", "letters"),
    "letter": Task("easy", "letters"),
    "card": Task("hard", "cards"),
    "above": Task("hard", "above"),
    "far": Task("hard", "tall"),
    "follow1": Task("hard", "chain"),
    "follow2": Task("hard", "chain"),
    "follow3": Task("hard", "chain"),
}

_FOLLOW = (
    ("Follow the {start} arrow: which digit?", "{digit}"),
    ("Where does the {start} arrow lead?", "{digit}"),
    ("Which digit does the {start} arrow reach?", "{digit}"),
)

# task -> (question, answer) templates; the task's facts (`scenes`) fill their fields.
PHRASINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "bg": (
        ("What colour is the background?", "{background}"),
        ("Name the background colour.", "{background}"),
        ("Which colour is the background?", "{background}"),
        ("Describe the background.", "plain {background}"),
    ),
    "digit": (
        ("Which digit is shown?", "{digit}"),
        ("What is the digit?", "{digit}"),
        ("Read the digit.", "{digit}"),
    ),
    "shape": (
        ("Which shape is shown?", "{shape}"),
        ("What is the shape?", "{shape}"),
        ("Name the shape.", "{shape}"),
        ("Describe the shape.", "{colour} {shape}"),
    ),
    "colour": (
        ("What colour is {letter}?", "{colour}"),
        ("Which colour does {letter} have?", "{colour}"),
        ("Name the colour of {letter}.", "{colour}"),
    ),
    "letter": (
        ("Which letter is {colour}?", "{letter}"),
        ("Name the {colour} letter.", "{letter}"),
        ("Read the {colour} letter.", "{letter}"),
    ),
    "card": (
        ("Colour of the digit above {letter}?", "{colour}"),
        ("What colour is the digit above {letter}?", "{colour}"),
        ("Card {letter}: which colour is the digit?", "{colour}"),
    ),
    "above": (
        ("Which digit is above {letter}?", "{digit}"),
        ("Which digit is over {letter}?", "{digit}"),
        ("Read the digit above {letter}.", "{digit}"),
    ),
    "far": (
        ("Which digit is on top of {letter}?", "{digit}"),
        ("Read the digit at the top of {letter}.", "{digit}"),
        ("Stack {letter}: which digit is on top?", "{digit}"),
    ),
    "follow1": _FOLLOW,
    "follow2": _FOLLOW,
    "follow3": _FOLLOW,
}
