"""Pages: text lies inside and apart, transcriptions are what is drawn, and every answer follows from the text alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visor_jax.data.almanac.draw import Draws
from visor_jax.data.almanac.exercises import EXERCISES
from visor_jax.data.almanac.facts import Facts
from visor_jax.data.almanac.fonts import FACES
from visor_jax.data.almanac.layout import MORE_KINDS, Look
from visor_jax.data.almanac.pages import Page, draw_page
from visor_jax.data.almanac.questions import TASKS, questions
from visor_jax.data.almanac.tables import Table, tables_of
from visor_jax.data.almanac.words import FEW_WORDS, NONE, content_words

keys = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**62))
exercises = st.sampled_from(sorted(set(EXERCISES) - {"pages_vega"}))


def draw(
    exercise: str, key: tuple[int, int], jitter: int = 3, kinds=(), split: str = "train", mixed: float = 0.3
) -> Page:
    return draw_page(Draws(*key), EXERCISES[exercise].shape.only(kinds), Look(split, FACES, jitter, mixed))


@settings(max_examples=300, deadline=None)
@given(exercises, keys, st.integers(0, 3))
def test_text_lies_inside_the_picture_and_does_not_overlap(exercise, key, jitter):
    page = draw(exercise, key, jitter)
    texts = page.canvas.texts
    for text in texts:
        assert 0 <= text.left < text.right <= page.canvas.width, text
        assert 0 <= text.top < text.bottom <= page.canvas.height, text
    for number, a in enumerate(texts):
        for b in texts[number + 1 :]:
            apart = a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top
            assert apart, (a, b)


@settings(max_examples=200, deadline=None)
@given(exercises, keys)
def test_the_transcription_holds_exactly_the_drawn_words(exercise, key):
    page = draw(exercise, key)
    drawn = Counter(word for text in page.canvas.texts for word in text.text.split())
    assert drawn == Counter(word for line in page.facts.lines for word in line.split())


@settings(max_examples=200, deadline=None)
@given(keys, st.sampled_from(["train", "validation", "test"]), st.integers(0, 3))
def test_without_mixed_content_every_page_shows_a_part_of_a_table_of_its_split(key, split, jitter):
    facts = draw("pages", key, jitter, split=split, mixed=0.0).facts
    assert any(is_part(facts, table) for table in tables_of(split))


def is_part(facts: Facts, table: Table) -> bool:
    """Whether every number stands in the table at its label, in the column of its head or in one and the same."""
    if not set(facts.labels) <= set(table.labels):
        return False
    rows = [table.labels.index(label) for label in facts.labels]
    heads = facts.heads or ("",) * len(facts.values[0])
    return all(
        any(
            column.head == (head or column.head)
            and all(column.values[row] == shown[place] for row, shown in zip(rows, facts.values, strict=True))
            for column in table.columns
        )
        for place, head in enumerate(heads)
    )


@pytest.mark.parametrize("kind", ["lists", "tables", "vbars"])
def test_pictures_of_few_words_show_all_of_these_and_no_others(kind):
    pages = [draw(f"{kind}_few_words", (0, key)) for key in range(200)]
    drawn = {word for page in pages for word in (*page.facts.labels, *page.facts.heads) if word}
    assert drawn == set(FEW_WORDS) <= set(content_words())


def parsed(page: Page) -> tuple[list[str], list[list[int]]]:
    """Reads labels and numbers out of the transcription."""
    labels, numbers = [], []
    for line in page.facts.lines:
        words = line.split()
        if len(words) > 1 and words[0] != "Total" and all(word.isdigit() for word in words[1:]):
            labels.append(words[0])
            numbers.append([int(word) for word in words[1:]])
    return labels, numbers


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(MORE_KINDS), keys)
def test_answers_follow_from_the_text(kind, key):
    page = draw("pages_all", key, kinds=(kind,))
    labels, numbers = parsed(page)
    if "Total" in page.facts.labels:  # a label of this name is no sum
        return
    assert labels == list(page.facts.labels)
    single = [row[0] for row in numbers]
    heads = list(page.facts.heads)
    for task, column in (("cell1", 0), ("cell2", 1), ("cell3", 2), ("series", 1)):
        for fields, answer in questions(task, page.facts):
            assert int(answer) == numbers[labels.index(fields["a"])][heads.index(fields["c"])], (task, column)
    for fields, answer in questions("value", page.facts):
        assert int(answer) == single[labels.index(fields["a"])]
    for fields, answer in questions("who", page.facts):
        assert single.count(int(fields["v"])) == 1 and single[labels.index(answer)] == int(fields["v"])
    for fields, answer in questions("row", page.facts):
        assert labels[int(fields["k"]) - 1] == answer
    for fields, answer in questions("more", page.facts):
        other = fields["b"] if answer == fields["a"] else fields["a"]
        assert single[labels.index(answer)] > single[labels.index(other)]
    for task, best in (("top", max), ("low", min)):
        for fields, answer in questions(task, page.facts):
            column = heads.index(fields["where"].removeprefix(" in ")) if fields["where"] else 0
            of_column = [row[column] for row in numbers]
            assert of_column[labels.index(answer)] == best(of_column) and of_column.count(best(of_column)) == 1
    for fields, answer in questions("above", page.facts):
        before = labels.index(fields["a"]) - 1
        assert answer == (labels[before] if before >= 0 else NONE)
    for fields, answer in questions("two_step", page.facts):
        of_column = [row[heads.index(fields["c"])] for row in numbers]
        row = of_column.index(max(of_column))
        assert int(answer) == numbers[row][heads.index(fields["d"])]
    for fields, answer in questions("unit_step", page.facts):
        row = numbers[labels.index(fields["a"])]
        assert answer == page.facts.units[row.index(max(row))]


@settings(max_examples=50, deadline=None)
@given(keys)
def test_the_total_of_a_receipt_is_the_sum_of_its_prices(key):
    page = draw("pages_all", key, kinds=("receipt",))
    items = [(line.split()[0], int(line.split()[1])) for line in page.facts.lines if line.split()[-1].isdigit()]
    name, total = items.pop()
    assert name == "Total" and total == sum(price for _, price in items) == page.facts.total


def test_every_task_is_asked_by_some_exercise_in_words_that_name_its_fields():
    asked = {task for exercise in EXERCISES.values() for task in exercise.weights} | {"read"}
    assert asked == set(TASKS)
    for seed in range(60):
        for task in TASKS:
            for fields, answer in questions(task, draw("pages_all", (seed, 1)).facts):
                assert answer
                for phrasing in TASKS[task].phrasings:
                    question = phrasing.format_map(fields)
                    named = [value in question for field, value in fields.items() if (task, field) != ("cell1", "c")]
                    assert all(named), question


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_pages_of_every_kind_are_drawn(kind):
    facts = draw("pages_all", (1, 2), kinds=(kind,)).facts
    assert facts.kind == ("table" if kind == "units" else kind)
