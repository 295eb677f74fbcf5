"""`--benchmark=FILE.py`: a benchmark of the user's, and files that are refused. docs/add_a_benchmark.md shows one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.benchmarks import hub_tables
from visor_jax.commands.recipe import public_benchmarks
from visor_jax.errors import RequestError
from visor_jax.evaluate.benchmarks import named_benchmark
from visor_jax.evaluate.benchmarks.base import Item
from visor_jax.evaluate.benchmarks.folder import Table
from visor_jax.evaluate.benchmarks.predictions import checked_scores

SOURCE = """
import dataclasses
from visor_jax.evaluate.benchmarks import named_benchmark

BENCHMARKS = (dataclasses.replace(named_benchmark("chartqa"), name="{name}", level="{level}"),)
"""


def write(folder: Path, name: str = "charts", level: str = "hard", more: str = "") -> str:
    (folder / "mine.py").write_text(SOURCE.format(name=name, level=level) + more)
    return str(folder / "mine.py")


def refusal(given: str, workdir: str = "") -> str:
    with pytest.raises(RequestError) as caught:
        public_benchmarks(given, "hub", None, workdir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_beside_a_name(tmp_path: Path) -> None:
    hub_tables.write("chartqa", tmp_path / "hub" / "ChartQA", hub_tables.rows_of("chartqa", 3))
    mine, docvqa = public_benchmarks(f"{write(tmp_path)}, docvqa", str(tmp_path / "hub"), 2)
    assert (mine.name, mine.level, docvqa) == ("charts", "hard", named_benchmark("docvqa")) and not docvqa.source
    assert len(Table(mine, str(tmp_path / "hub"))) == 3
    (other,) = public_benchmarks(write(tmp_path, more="# another prompt"), str(tmp_path / "hub"), None)
    assert len(mine.source) == 64 and other.source != mine.source, "answers of another file are not read"
    with pytest.raises(RequestError, match="needs --data=FOLDER, with the files of lmms-lab-encoder/ChartQA"):
        public_benchmarks(write(tmp_path), "", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "docvqa"}, "named 'docvqa'; expected a-z, 0-9 and _, a name that no other one has"),
        ({"name": "a/b"}, "named 'a/b'"),
        ({"level": "medium"}, "charts: level='medium'; expected one of easy, middle, hard"),
        ({"more": "BENCHMARKS *= 2"}, "named 'charts'"),
        ({"more": "BENCHMARKS = ()"}, "expected BENCHMARKS = (Benchmark(...), ...)"),
        ({"more": "BENCHMARKS = BENCHMARKS[0]"}, "expected BENCHMARKS = (Benchmark(...), ...)"),
        ({"more": "del BENCHMARKS"}, "expected BENCHMARKS = (Benchmark(...), ...)"),
        ({"more": "1 / 0"}, "mine.py: ZeroDivisionError in line 6: division by zero"),
        ({"more": "def"}, "mine.py: SyntaxError in line 6"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    assert message in refusal(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"relaxed": 85.0}, "relaxed is 85.0; expected a number from 0 to 1"),
        ({"relaxed": float("nan")}, "relaxed is nan"),
        ({"relaxed": None}, "relaxed is None"),
        ({"anls": 1.0, "exact": 0.0}, "has 2 scores, anls, exact; expected one, or a function `units`"),
        ({}, "has 0 scores, none; expected one"),
    ],
)
def test_scores_that_are_refused_with_the_first_answer(scores: dict[str, Any], message: str) -> None:
    chartqa = named_benchmark("chartqa")
    item = Item("", "?", (), "12", {})
    with pytest.raises(RequestError) as caught:
        checked_scores(dataclasses.replace(chartqa, score=lambda answer, item: scores), "12", item)
    assert message in str(caught.value) and "benchmark chartqa: score('12', ...)" in str(caught.value)
    several = dataclasses.replace(chartqa, score=lambda answer, item: {"a": 1, "b": 0.5}, units=list)
    assert checked_scores(several, "12", item) == {"a": 1, "b": 0.5}


def test_two_files_with_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert "defines 'charts' twice" in refusal(f"{write(tmp_path)},{write(tmp_path / 'other')}")


def test_files_that_are_not_there_or_not_to_be_executed(tmp_path: Path) -> None:
    write(tmp_path)
    assert "did you mean" in refusal(str(tmp_path / "mien.py"))
    assert "--benchmark=gs://bucket/mine.py: is code" in refusal("gs://bucket/mine.py")
    assert "a workdir's files are not executed" in refusal(str(tmp_path / "mine.py"), str(tmp_path))
    assert "or a Python file" in refusal(f"{tmp_path / 'mine.py'},zzz")
