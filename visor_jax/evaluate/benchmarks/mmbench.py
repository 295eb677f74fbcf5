"""MMBench: multiple-choice questions, each asked again with its options rotated (Liu et al., 2024); English dev split.

Scored without a judge ("static"): the option is read from the answer by rules alone. A question counts as right if all
its rotations do. The index of a rotation is that of its question plus a multiple of a million.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from visor_jax.evaluate.benchmarks.base import LETTER, Benchmark, Item, Line, Row, Unit, mean
from visor_jax.evaluate.benchmarks.choices import named_letter

OPTIONS = "ABCD"
READ_LETTERS = "ABCDE"  # E is never right
HEADING = "There are several options:"
NEXT_ROTATION = 1_000_000
# What may stand around a letter that is a word of its own, in the order in which they are tried.
AROUND = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)


def is_given(text: str | None) -> bool:
    """Whether a row has this option or hint; the hub's table has "nan" where there is none."""
    return text is not None and text != "nan"


def item(row: Row) -> Item:
    """Makes the question of a row: hint, question, options and suffix."""
    options = {letter: row[letter] for letter in OPTIONS if is_given(row[letter]) and row[letter]}
    if row["answer"] not in options:
        raise ValueError(f"answer {row['answer']!r}; expected one of {', '.join(options)}")
    hint = f"{row['hint']} " if is_given(row["hint"]) else ""
    listed = "\n".join([HEADING, *(f"{letter}. {option}" for letter, option in options.items())])
    index = int(row["index"])
    facts = {"index": index, "category": row["category"], "l2_category": row["L2-category"]}
    prompt = f"{hint}{row['question']} {listed}\n{LETTER}"
    return Item(str(index), prompt, ["image"], row["answer"], {**facts, "options": options})


def chosen_option(answer: str, options: Mapping[str, str]) -> str:
    """Returns the letter of the option that an answer names; "" if it names none.

    In this order: a letter that is a word of its own (not "A" in more than three words, where it may be an article), a
    letter with a mark beside it, the only option whose text the answer holds, and `named_letter`.
    """
    words = answer.split()
    alone = [letter for letter in READ_LETTERS if letter in words]
    if len(alone) == 1 and not ("A" in words and len(words) > 3):
        return alone[0]
    for before, after in AROUND:
        marked = [letter for letter in READ_LETTERS if f"{before}{letter}{after}" in words]
        if len(marked) == 1:
            return marked[0]
    held = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return held[0] if len(held) == 1 else named_letter(answer, sorted(options))


def score(answer: str, item: Item) -> dict[str, float]:
    """Scores an answer to one rotation."""
    return {"accuracy": float(chosen_option(answer, item.facts["options"]) == item.reference)}


def answered_right(lines: Sequence[Line]) -> dict[int, float]:
    """Returns 1 for each question, by index, whose rotations are all right, and 0 for the others."""
    rotations: dict[int, list[Line]] = {}
    for line in lines:
        rotations.setdefault(line["facts"]["index"] % NEXT_ROTATION, []).append(line)
    right = {index: float(all(line["scores"]["accuracy"] for line in group)) for index, group in rotations.items()}
    asked = [line["facts"]["index"] for line in lines if line["facts"]["index"] < NEXT_ROTATION]
    return {index: right[index] for index in asked}


def units(lines: Sequence[Line]) -> list[Unit]:
    """Returns a unit for each question with its rotations."""
    return [Unit(str(index), "", value) for index, value in answered_right(lines).items()]


def report(lines: Sequence[Line]) -> dict[str, float]:
    """Returns the accuracy over questions, and by category, the coarser ones first."""
    right = answered_right(lines)
    asked = {line["facts"]["index"]: line["facts"] for line in lines if line["facts"]["index"] in right}
    result = {"accuracy": mean(right.values())}
    for level in ("l2_category", "category"):
        for name in dict.fromkeys(facts[level] for facts in asked.values()):
            result[name] = mean(right[index] for index, facts in asked.items() if facts[level] == name)
    return result


BENCHMARKS = (
    Benchmark(
        name="mmbench",
        repo="lmms-lab-encoder/MMBench",
        split="dev",
        files=("en/dev-*.parquet",),
        columns={
            "index": "number",
            "question": "text",
            "hint": "text",
            "answer": "text",
            **dict.fromkeys(OPTIONS, "text"),
            "category": "text",
            "L2-category": "text",
            "image": "picture",
        },
        level="easy",
        max_new_tokens=1024,
        item=item,
        score=score,
        report=report,
        headline="accuracy",
        questions_per_id=1,
        units=units,
        optional=("hint", *OPTIONS),
    ),
)
