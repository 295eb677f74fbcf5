"""The code and the commands of pages of docs/ run as they stand there, on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import doc_pages

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; runs/almanac_mini in it is a tiny run."""
    shutil.copytree(tiny_run, tmp_path / "runs" / "almanac_mini")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_add_a_benchmark(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doc_pages.run_page("add_a_benchmark.md")
    results = folder / "runs/almanac_mini/eval/of_receipts"
    result = json.loads((results / "test.json").read_text())
    lines = [json.loads(line) for line in (results / "test.predictions.jsonl").read_text().splitlines()]
    assert result["questions"] == {"asked": 8, "of": 8} and len(lines) == 8 * len(result["budgets"])
    assert set(result["budgets"]["full"]["metrics"]) == {"accuracy", "accuracy_total", "accuracy_date"}
    assert lines[0]["question"].startswith("What is the total of this receipt?\nAnswer the question")
    against = json.loads((results / "partial/test.json").read_text())["against"]["budgets"]
    assert against["full"]["hard"]["difference"] == 0 and set(against) == {"empty", "full"}
    assert "accuracy_date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("```python\na = 1\n```\ntext\n```bash\nls\n```\n", [("python", "a = 1\n"), ("bash", "ls\n")]),
        ("<!-- not run: network -->\n```bash\nhf download x\n```\n```bash\nls\n```\n", [("bash", "ls\n")]),
        ("```json\n{}\n```\n", []),
    ],
)
def test_blocks_of_a_page(page: str, expected: list[tuple[str, str]]) -> None:
    assert [(block.language, block.text) for block in doc_pages.blocks(page, "python", "bash")] == expected


def test_commands_of_a_block() -> None:
    assert [*doc_pages.commands("a b \\\n  c  # why\n\n# nothing\nd 'x # y'\n")] == ["a b    c  # why", "d 'x # y'"]
