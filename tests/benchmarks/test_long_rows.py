"""The figures of docs/scaling.md on long rows are those that `benchmarks/long_rows.py` prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def long_rows(script: Callable[[str], Any]) -> Any:
    return script("long_rows")


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_the_page_shows_what_is_printed(long_rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """To a fifth: the formulas of `visor plan` are refined more often than the page."""
    long_rows.main([])
    printed = cells(capsys.readouterr().out)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    shown = cells(page[page.index("| model, topology") :].split("\n\n")[0])
    assert [row[0] for row in shown] == [row[0] for row in printed]
    for mine, theirs in zip(shown[2:], printed[2:], strict=True):
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            assert float(a.split()[0]) == pytest.approx(float(b.split()[0]), rel=0.2), (mine, theirs)


def test_the_figures_decide_against_a_split(long_rows: Any) -> None:
    """One row fits on one chip, or on the chips that share its heads, which then hold less than a split would leave."""
    rows = [long_rows.figures(case) for case in long_rows.CASES]
    assert all(row["gib"] < row["gib_available"] for row in rows if row["mesh"]["replica"] == 1)
    whole, heads = rows[-2:]
    assert whole["topology"] == heads["topology"] and heads["gib"] < whole["gib_if_split"]
