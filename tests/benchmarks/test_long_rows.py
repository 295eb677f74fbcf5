"""The figures of docs/scaling.md on long rows are those that `benchmarks/long_rows.py` prints."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def long_rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("long_rows")


def test_the_page_shows_what_is_printed(long_rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    long_rows.main([])
    table = capsys.readouterr().out.strip()
    assert table in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_one_row_fits_where_the_shipped_configurations_train(long_rows: Any) -> None:
    rows = [long_rows.figures(case) for case in long_rows.CASES]
    assert all(
        row["gib"] < row["gib_available"] for row in rows if row["mesh"]["tensor"] > 1 or "16x16" not in row["topology"]
    )
