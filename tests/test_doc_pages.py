"""The code and the commands of pages of docs/ run as they stand there, on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import doc_pages
from tests.evaluate.benchmarks import hub_tables
from visor_jax import testing
from visor_jax.evaluate.benchmarks import named_benchmark

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


@pytest.mark.slow
def test_choose_a_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(testing.random_picture(48, 48)).save("picture.png")
    names = doc_pages.run_page("choose_a_budget.md")
    output = capsys.readouterr().out
    assert "paired differences" in output and (folder / "runs/almanac_mini/report/index.html").exists()
    assert names["fixed"].budget == "0b01", "the viable budget with one slot"
    file = "runs/almanac_mini/eval/test.json"
    assert names["cheapest"](file, 100)[0] == "--budget=empty", "anything is good enough"


def test_the_cheapest_setting_is_good_enough_in_every_level(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    source, *_ = doc_pages.blocks((doc_pages.ROOT / "docs/choose_a_budget.md").read_text(), "python")
    exec(source.text.partition("\n\nfor ")[0], names)

    def row(hard: float, easy: float, cost: float, **more: float) -> dict[str, float]:
        return {"easy": easy, "hard": hard, "decoder_gflops": cost, **more}

    budgets = {"empty": row(0.2, 0.99, 1), "0b10": row(0.5, 0.9, 2), "full": row(0.52, 0.99, 4), "auto": row(0, 0, 0)}
    dials = [row(0.49, 0.99, 2.5, dial=-1.0), row(0.51, 0.99, 3, dial=2.0)]
    (tmp_path / "levels.json").write_text(json.dumps({"budgets": budgets, "dial": dials}))
    found = [names["cheapest"](tmp_path / "levels.json", points)[0] for points in (0.5, 2, 5, 10, 50)]
    assert found == ["--budget=full", "--dial=2", "--dial=-1", "--budget=0b10", "--budget=empty"]
    plain = {
        name: {"easy": None, "hard": None, "tasks": {"a": value, "b": 1.0}, "decoder_gflops": cost}
        for name, value, cost in (("empty", 0.5, 1), ("full", 0.8, 2))
    }
    (tmp_path / "plain.json").write_text(json.dumps({"budgets": plain}))
    assert names["cheapest"](tmp_path / "plain.json", 10) == ("--budget=full", {"all": 90.0}, 2)
    assert names["cheapest"](tmp_path / "plain.json", 20)[0] == "--budget=empty"


@pytest.mark.slow  # seven evaluations
def test_evaluate_your_checkpoint(folder: Path) -> None:
    from tests.hf.conftest import finish_folder, make_stock_model

    make_stock_model(False).save_pretrained(folder / "HF_DIR")
    finish_folder(folder / "HF_DIR")
    (folder / "runs/almanac_mini").rename("RUN")
    Path("A").symlink_to("RUN")
    for name in ("docvqa", "mme"):
        repo = named_benchmark(name).repo.rpartition("/")[2]
        hub_tables.write(name, folder / "hub" / repo, hub_tables.rows_of(name, 4))
    Path("mine").mkdir()
    records = []
    for number in range(4):
        Image.fromarray(testing.random_picture(28, 28, seed=number)).save(f"mine/{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": str(number)}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    Path("mine/test.json").write_text(json.dumps(records))
    doc_pages.run_page("evaluation.md")
    dense = json.loads(Path("DENSE/eval/of_docvqa/validation.json").read_text())
    assert list(dense["budgets"]) == ["full"], "a dense model has one budget"
    assert dense["budgets"]["full"]["decoder_gflops"] == dense["dense"]["decoder_gflops"]
    reduced = json.loads(Path("DENSE/eval/of_docvqa/partial/validation.json").read_text())
    assert reduced["budgets"]["full"]["decoder_gflops"] < dense["budgets"]["full"]["decoder_gflops"]
    assert reduced["dense"] == dense["dense"] and "against" in reduced
    for place in ("of_test/test.json", "of_docvqa/validation.json", "test.json"):
        assert "against" in json.loads((Path("RUN/eval") / place).read_text())


def test_add_a_reduction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of the package, because a method is a file and lines of the package."""
    for name in ("visor_jax", "tests/conftest.py", "pyproject.toml"):
        source, target = doc_pages.ROOT / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    monkeypatch.chdir(tmp_path)
    page = (doc_pages.ROOT / "docs/add_a_reduction.md").read_text(encoding="utf-8")
    (changes,) = doc_pages.blocks(page, "diff")
    subprocess.run(["git", "apply", "--unidiff-zero", "-p0", "-"], input=changes.text, text=True, check=True)
    doc_pages.run_page("add_a_reduction.md", tmp_path)


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
