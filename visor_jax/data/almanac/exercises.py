"""The exercises: which pictures each draws and how often it asks each task.

`data.path` names one; "" is `pages`. A base model learns them in this order: crops of one word or number, lists, bars
and small tables, pages. Small pictures come as sheets, several in one row of a batch. Evaluation asks the
tasks of an exercise equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from visor_jax.data.almanac.draw import Draws
from visor_jax.data.almanac.fonts import TRAINING_FACES, UNSEEN_FACES
from visor_jax.data.almanac.layout import MORE_KINDS, Look, Shape
from visor_jax.data.almanac.pages import Page, draw_page
from visor_jax.data.almanac.vega import VegaPage, draw_vega_page
from visor_jax.data.almanac.words import FEW_WORDS


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
      shape: what is drawn.
      weights: task -> how often it is asked, relative to the others that the picture can answer.
      read: probability that a picture's first turn is its transcription.
      faces: the fonts, unless `data.fonts` names others.
      draw: how its pictures are drawn.
      small: whether the pictures are smaller than a tile and come as sheets.
      least_text: text tokens that a small picture needs at least; bounds the pictures of a sheet.
    """

    shape: Shape
    weights: Mapping[str, float]
    read: float = 0.4
    faces: tuple[str, ...] = TRAINING_FACES
    draw: Callable[[Draws, Shape, Look], Page | VegaPage] = draw_page
    small: bool = True
    least_text: int = 16


_CROP = {"read": 6.0, "paper": 0.5, "bars": 0.8}  # colors are learned soon; reading takes long
_LINE = {"read": 8.0, "value": 0.7, "who": 0.7, "paper": 0.3}
_LIST = {
    "value": 2.5, "who": 4, "below": 2, "above": 1, "row": 1, "top": 2, "low": 1.5, "more": 3, "paper": 0.5,
    "count": 0.5,
}  # fmt: skip
_BARS = {**_LIST, "bars": 3, "kind": 0.5, "direction": 0.5}
_FROM_WORD = {"value": 4, "below": 3, "above": 1.5, "who": 0.5, "paper": 0.3}
_LOOK_UP = {"who": 4, "value": 4, "below": 3, "paper": 0.3}
_WHO = {"who": 6, "value": 1, "paper": 0.3}
_COMPARE = {"top": 2, "low": 2, "more": 7, "who": 1, "value": 0.5, "paper": 0.3}
_ONE_ROW = {"cell2": 3, "cell3": 3, "column": 3, "paper": 0.3}
_SMALL_TABLE = {"cell2": 6, "line": 1.5, "column": 3, "top": 1, "paper": 0.3, "row": 0.5, "below": 0.5}
_SMALL_COLUMNS = {"value": 3, "who": 3, "top": 0.5, "low": 0.5, "row": 0.5, "right": 0.5, "bars": 0.7, "paper": 0.3}
_PAGE = {
    "value": 2.5, "who": 4, "below": 1.7, "above": 0.8, "right": 1, "row": 1, "top": 2, "low": 1.7, "more": 2,
    "cell1": 6, "cell2": 6, "cell3": 6, "line": 1, "column": 1, "bars": 2, "paper": 0.5, "count": 0.5, "kind": 0.5,
    "direction": 0.4, "title": 0.7, "unit": 0.5, "two_step": 0.7, "below_top": 0.7,
}  # fmt: skip
_ALL = {
    **_PAGE, "series": 5, "legend": 1, "legend_of": 1, "total": 3, "column_unit": 1.5, "unit_step": 1.5, "trend": 1,
    "line_color": 1.5, "picture": 4,
}  # fmt: skip
_NARROW = (36, 48, 60)  # the least width that a word fits into is used

EXERCISES: dict[str, Exercise] = {
    "crops_short": Exercise(Shape(12, (36,), ("crop",)), _CROP, read=0.0, least_text=14),
    "crops": Exercise(Shape(12, _NARROW, ("crop",)), _CROP, read=0.0, least_text=14),
    "crops_tall": Exercise(Shape(24, _NARROW, ("crop",)), _CROP, read=0.0, least_text=14),
    "crops_line": Exercise(Shape(12, (60, 72), ("list",), rows=(1, 1)), _LINE, read=0.0, least_text=16),
    "crops_two_lines": Exercise(Shape(24, (60, 72), ("list",), rows=(2, 2)), _LINE, read=0.0, least_text=21),
    "lists": Exercise(Shape(48, (48, 48, 60), ("list",), rows=(1, 4)), _LIST),
    "lists_one_digit": Exercise(Shape(48, (48, 48, 60), ("list",), digits=1), _LIST),
    "lists_short": Exercise(Shape(48, (48, 48, 60), ("list",), rows=(2, 3)), _LOOK_UP, read=0.1),
    "lists_few_words": Exercise(Shape(48, (48, 48, 60), ("list",), vocabulary=FEW_WORDS), _FROM_WORD, read=0.0),
    "lists_from_word": Exercise(Shape(48, (48, 48, 60), ("list",)), _FROM_WORD, read=0.1),
    "lists_who": Exercise(Shape(48, (48, 48, 60), ("list",)), _WHO, read=0.0),
    "lists_compare": Exercise(Shape(48, (48, 48, 60), ("list",)), _COMPARE, read=0.0),
    "bars_small": Exercise(Shape(48, (72,), ("list",), barred=1.0), _BARS, read=0.1),
    "tables_one_row": Exercise(
        Shape(24, (96,), ("table",), rows=(1, 1), columns=(2, 3), titled=0.0, mixed=1.0), _ONE_ROW, read=0.2
    ),
    "tables_small": Exercise(
        Shape(48, (84,), ("table",), rows=(1, 3), columns=(2, 2), titled=0.0, mixed=1.0), _SMALL_TABLE, read=0.2
    ),
    "vbars_small": Exercise(
        Shape(48, (72,), ("columns",), rows=(2, 3), titled=0.0, mixed=1.0), _SMALL_COLUMNS, read=0.1
    ),
    "tables_few_words": Exercise(
        Shape(48, (84,), ("table",), (1, 3), (2, 2), titled=0.0, mixed=1.0, vocabulary=FEW_WORDS),
        _SMALL_TABLE,
        read=0.0,
    ),
    "vbars_few_words": Exercise(
        Shape(48, (72,), ("columns",), (2, 3), titled=0.0, mixed=1.0, vocabulary=FEW_WORDS), _SMALL_COLUMNS, read=0.0
    ),
    "pages_72": Exercise(Shape(72, (72,), columns=(1, 2), weights=(2, 1, 1)), _PAGE),
    "pages": Exercise(Shape(96, (96,), weights=(2, 1, 1)), _PAGE, small=False),
    "pages_all": Exercise(Shape(96, (96,), MORE_KINDS), _ALL, small=False),
    "pages_480": Exercise(Shape(480, (480,), rows=(6, 16), weights=(2, 1, 1)), _PAGE, small=False),
    "pages_unseen_fonts": Exercise(Shape(96, (96,), weights=(2, 1, 1)), _PAGE, faces=UNSEEN_FACES, small=False),
    "pages_vega": Exercise(Shape(96, (96,), weights=(2, 1, 1)), _PAGE, draw=draw_vega_page, small=False),
}
