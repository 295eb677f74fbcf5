"""The names that the data set draws and asks about: papers, bars, inks, and the words of the tables.

Every word of `content_words` is one token of the tokenizer, as are all words of the questions (`questions.TASKS`).
"""

from __future__ import annotations

import functools

from visor_jax.data.almanac.tables import all_tables

PAPERS = {
    "white": (250, 250, 250),
    "pink": (250, 205, 215),
    "blue": (190, 215, 250),
    "green": (200, 240, 200),
    "yellow": (250, 242, 180),
}
BARS = {
    "red": (205, 50, 50),
    "navy": (40, 60, 150),
    "lime": (60, 160, 60),
    "orange": (235, 140, 40),
    "purple": (140, 70, 170),
}
INKS = ((20, 20, 20), (20, 20, 90), (90, 20, 20), (60, 60, 60))
NONE = "none"  # the answer where a page has no title, no unit or no line below
TOTAL = "Total"  # the label below the items of a receipt
PICTURES = ("Bell", "Car", "Cat", "Dog", "Fish", "Heart", "Key", "Moon", "Star", "Tree")  # names of emoji
FEW_WORDS = ("Air", "Cat", "Dog", "Fog", "Key", "Mar", "Owl", "Tin")  # short content words that look different


@functools.cache
def content_words() -> tuple[str, ...]:
    """Returns every word that may be drawn as label, head or title, in a fixed order."""
    words: dict[str, None] = {}
    for table in all_tables():
        for word in (table.title, *table.labels, *(column.head for column in table.columns)):
            words.setdefault(word)
    return (*words, *PICTURES)


@functools.cache
def units() -> tuple[str, ...]:
    """Returns the units of the tables' columns, in a fixed order."""
    return tuple(dict.fromkeys(column.unit for table in all_tables() for column in table.columns if column.unit))
