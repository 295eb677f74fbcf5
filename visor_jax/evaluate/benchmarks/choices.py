"""Finds the option that a free answer to a multiple-choice question names.

In: an answer and the letters of the options. Out: one letter, or "" where the answer names none.
"""

from __future__ import annotations

from collections.abc import Sequence

OUTER_MARKS = ",.!?;:'\""
PHRASES = (
    "the answer is",
    "answer is",
    "the correct answer is",
    "correct answer is",
    "the best answer is",
    "best answer is",
    "the correct option is",
    "correct option is",
    "the best option is",
    "best option is",
    "the choice is",
    "choice is",
    "the correct choice is",
    "correct choice is",
    "i choose",
    "i select",
    "i pick",
    "my answer is",
    "my choice is",
)
# How a letter is marked, and how sure a sign that is.
MARKED = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
START, END, AFTER_PHRASE, ANYWHERE = 10, 9, 7, 0


def named_letter(answer: str, letters: Sequence[str]) -> str:
    """Returns the letter with the surest sign, the last one of several with the same; "" if no letter occurs.

    The signs in this order: the answer begins with the letter, it ends with it, a phrase such as "the answer is" comes
    before, then "(A)", "A.", "A:", "A)", "A " and last a letter anywhere. Letters are capital letters. This is the
    extraction of lmms-eval's MMStar, RealWorldQA and MMBench, without its phrases in languages other than English.
    """
    inner = answer.strip()
    for mark in OUTER_MARKS:
        inner = inner.strip(mark)
    text, inner = f" {inner} ", inner.strip()
    signs = [*_marked(text, letters), *_after_phrases(text, letters)]
    for letter in letters:
        if inner.startswith(letter) and not inner[1:2].isalpha():
            signs.append((START, 0, letter))
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            signs.append((END, len(text), letter))
    signs = signs or [(ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(signs)[2] if signs else ""


Sign = tuple[int, int, str]  # how sure, where, which letter


def _marked(text: str, letters: Sequence[str]) -> list[Sign]:
    forms = [(form.format(letter), sure, letter) for form, sure in MARKED for letter in letters]
    return [(sure, text.rfind(form), letter) for form, sure, letter in forms if form in text]


def _after_phrases(text: str, letters: Sequence[str]) -> list[Sign]:
    ends = [place + len(phrase) for phrase in PHRASES if (place := text.lower().find(phrase)) >= 0]
    found = [(text.find(letter, end), letter) for end in ends for letter in letters]
    return [(AFTER_PHRASE, place, letter) for place, letter in found if place >= 0]
