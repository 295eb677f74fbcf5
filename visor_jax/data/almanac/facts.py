"""What a picture shows: the facts that its questions are answered from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What a picture shows; all questions are answered from these.

    Attributes:
      kind: "crop", "list", "table", "bars" (horizontal), "grouped" (two colors of them), "columns" (vertical bars),
        "line", "receipt" or "card".
      paper: name of the paper's color.
      bar: name of the color of the bars or of the line; "" without them or with several colors.
      title: the title's word; "" without title.
      unit: the unit that the title names; "" without one.
      labels: from top to bottom, or of columns from left to right.
      heads: of a table's columns.
      values: per label, one per head; one where there are no heads.
      units: printed below the heads, one per head; empty: none.
      colors: of the series that the legend names, one per head; empty: no legend.
      picture: the word for what a card's picture shows; "" without one.
      total: the number in the last line of a receipt; 0 without one.
      lines: the whole text, line by line.
    """

    kind: str
    paper: str
    bar: str = ""
    title: str = ""
    unit: str = ""
    labels: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    values: tuple[tuple[int, ...], ...] = ()
    units: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()
    picture: str = ""
    total: int = 0
    lines: tuple[str, ...] = ()
