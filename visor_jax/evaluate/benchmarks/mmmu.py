"""MMMU: questions of college exams in thirty subjects, multiple-choice and open (Yue et al., 2024); validation split.

Answers are read by the rules of the authors' evaluation, with one difference: where a multiple-choice answer names no
option, theirs draws one at random; here it is wrong.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from visor_jax.evaluate.benchmarks.base import (
    LETTER,
    LETTERS,
    SHORT_ANSWER,
    Benchmark,
    Item,
    Line,
    Reference,
    Row,
    checked_letter,
    checked_parts,
    mean,
    options_text,
    scores_of,
)

IMAGES = tuple(f"image_{number}" for number in range(1, 8))
MULTIPLE_CHOICE, OPEN = "multiple-choice", "open"
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy"),
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power"),
        *("Materials", "Mechanical_Engineering"),
    ),
}


def item(row: Row) -> Item:
    """Makes the question of a row; its pictures are those that question or options mention as `<image 1>` and so on."""
    kind, options = row["question_type"], texts_in(row["options"])
    if kind not in (MULTIPLE_CHOICE, OPEN):
        raise ValueError(f"question_type {kind!r}; expected {MULTIPLE_CHOICE} or {OPEN}")
    asked = row["question"]
    if kind == MULTIPLE_CHOICE:
        asked += f"\n{options_text(options)}"
    mentioned = {int(number) for number in re.findall(r"<image (\d+)>", asked)}
    if not mentioned <= {*range(1, len(IMAGES) + 1)}:
        raise ValueError(f"mentions <image {max(mentioned)}>; expected at most {len(IMAGES)}")
    subject = re.sub(r"^[^_]*_|_\d+$", "", row["id"])
    prompt = f"{asked}\n{LETTER if kind == MULTIPLE_CHOICE else SHORT_ANSWER}"
    facts = {"subject": subject, "question_type": kind, "options": options}
    pictures = [f"image_{number}" for number in sorted(mentioned)]
    return Item(row["id"], prompt, pictures, reference_of(row["answer"], kind, options), facts)


def reference_of(answer: str, kind: str, options: Sequence[str]) -> Reference:
    """Returns the letter of the right option, or the right answer or answers of an open question.

    Raises:
      ValueError: there are none.
    """
    if kind == OPEN:
        return checked_parts(texts_in(answer)) if answer.startswith("[") else answer
    if not options:
        raise ValueError(f"options {options!r} of a {MULTIPLE_CHOICE} question; expected at least one")
    return checked_letter(answer, LETTERS[: len(options)])


def texts_in(literal: str) -> list[str]:
    """Returns the texts of a list that is written in Python, as the hub's table has options and several answers.

    Raises:
      ValueError: it is no such list.
    """
    try:
        values = ast.literal_eval(literal)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        values = None
    if not isinstance(values, list):
        raise ValueError(f"{literal[:60]!r}; expected a list of texts")
    return [str(value) for value in values]


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer."""
    if item.facts["question_type"] == MULTIPLE_CHOICE:
        return {"accuracy": float(chosen_option(answer, item.facts["options"]) == item.reference)}
    return {"accuracy": float(holds_answer(answer, item.reference))}


def report(lines: Sequence[Line]) -> dict[str, float]:
    """Returns the accuracy over all questions, and over those of each domain."""
    result = {"mmmu_acc": mean(scores_of(lines, "accuracy"))}
    for domain, subjects in DOMAINS.items():
        if part := [line for line in lines if line["facts"]["subject"] in subjects]:
            result[domain] = mean(scores_of(part, "accuracy"))
    return result


# --- multiple choice --------------------------------------------------------------------------------------------------


def chosen_option(answer: str, options: Sequence[str]) -> str:
    """Returns the letter of the option that an answer names; "" if it names none.

    In this order: "(A)", "A ", "A.", and in answers of more than five words the text of an option. Of several the last
    one counts; of several "A." the first letter of the alphabet does.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text, letters = f" {answer} ", LETTERS[: len(options)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if named := [letter for letter in letters if form.format(letter) in text]:
            return max(named, key=lambda letter: text.rfind(place.format(letter)))
    lower = text.lower()
    if len(text.split()) > 5:
        held = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in lower]
        return max(held, key=lambda letter: lower.rfind(options[letters.index(letter)].lower()), default="")
    return ""


# --- open questions ---------------------------------------------------------------------------------------------------

INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
LAST_INDICATORS = (*INDICATORS, "=")  # the last line may be an equation
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def holds_answer(answer: str, references: str | Sequence[str]) -> bool:
    """Whether the part of an answer that states the result holds a reference: its text, or an equal number.

    Numbers are compared after rounding to two decimals. Lists of references: one of them is enough.
    """
    references = [references] if isinstance(references, str) else references
    wanted = [value for reference in references for value in normalized(reference)]
    stated = stated_results(answer)
    numbers = [number for part in stated for pattern in NUMBERS for number in pattern.findall(part)]
    found = [value for part in [*stated, *numbers] for value in normalized(part)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in wanted for value in found)


def stated_results(answer: str) -> list[str]:
    """Returns what follows words such as "answer" or "is" in each line, or else the whole answer; in lower case."""
    answer, results = answer.strip().strip(".").lower(), []
    lines = answer.split("\n")
    for number, line in enumerate(lines):
        shortest = ""
        for indicator in LAST_INDICATORS if number == len(lines) - 1 else INDICATORS:
            rest = line.rpartition(indicator)[2].strip()
            if indicator in line and (not shortest or len(rest) < len(shortest)):
                shortest = rest
        if shortest and shortest not in TRIVIAL:
            results.append(shortest)
    return results or [answer]


def normalized(text: str) -> list[str | float]:
    """Returns a number, rounded to two decimals, or the text in lower case.

    A single letter must stand beside a space, so that it does not match inside a word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


BENCHMARKS = (
    Benchmark(
        name="mmmu",
        repo="lmms-lab-encoder/MMMU",
        split="validation",
        files=("data/validation-*.parquet", "*/validation-*.parquet"),
        columns={
            "id": "text",
            "question": "text",
            "options": "text",
            "answer": "text",
            "question_type": "text",
            **dict.fromkeys(IMAGES, "picture"),
        },
        level="easy",
        max_new_tokens=128,
        item=item,
        score=score,
        report=report,
        headline="mmmu_acc",
        questions_per_id=1,
    ),
)
