"""The entries of the paper: rows, columns and places fit together, and every command is one that the project has."""

from __future__ import annotations

import itertools
import re
import shlex
import string
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visor_jax.analysis.api import LAYER_ANALYSES
from visor_jax.commands import command_line
from visor_jax.commands.recipe import public_benchmarks
from visor_jax.config import load_config
from visor_jax.data.sources import check_source

Paper = Callable[[str], types.ModuleType]
ROOT = Path(__file__).parents[3]
EXPECTED = ("table1", "table2", "table3", "table4", "table5", "table8", "supplement", "figure1", "figure2", "figure3",
            "figure4", "figure6", "figure7", "figure10")  # fmt: skip


def test_there_is_an_entry_and_a_file_for_every_table_and_figure(paper: Paper) -> None:
    entries = {entry.name: entry for entry in paper("entries").ENTRIES}
    assert tuple(entries) == EXPECTED
    assert all(paper(name).ENTRY is entry for name, entry in entries.items())


def test_rows_columns_and_places_fit_together(paper: Paper) -> None:
    for entry in paper("entries").ENTRIES:
        columns, rows = [column.key for column in entry.columns], [row.key for row in entry.rows]
        assert len(set(columns)) == len(columns) and len(set(rows)) == len(rows), entry.name
        assert all(row.paper.keys() <= set(columns) for row in entry.rows), entry.name
        small_rows = {row.key for row in entry.small_rows or entry.rows}
        small_columns = {column.key for column in entry.small_columns or entry.columns}
        if small_places := getattr(entry.small, "places", {}):
            measured = {column for row in small_places.values() for column in row}
            assert measured == small_columns, f"{entry.name}: no column of the small table is always empty"
        for source, known in ((entry.paper, set(rows)), (entry.small, small_rows)):
            places = getattr(source, "places", {})
            assert places.keys() <= known, entry.name
            assert all(row.keys() <= set(columns) for row in places.values()), entry.name
        assert entry.stands_for.keys() <= set(rows), entry.name
        for row, cells in (entry.formula() if entry.formula else {}).items():
            assert row in rows and cells.keys() <= set(columns), entry.name


def test_tables_agree_about_numbers_of_the_paper(paper: Paper) -> None:
    """Rows that several entries share have the same accuracies; the paper gives VISOR's saving as 8.6x and 8.9x."""
    seen: dict[tuple[str, str], float] = {}
    shared = [entry for entry in paper("entries").ENTRIES if [c.key for c in entry.columns][:2] == ["easy", "hard"]]
    for entry, level in itertools.product(shared, ("easy", "hard")):
        for row in entry.rows:
            if level in row.paper:
                assert seen.setdefault((row.title, level), row.paper[level]) == row.paper[level], row.title
    assert seen["VISOR", "hard"] == 58.4 and seen["VISOR", "easy"] == 63.6


def test_savings_by_formula_come_near_the_paper(paper: Paper) -> None:
    """Except M3, which has no such scale here."""
    for name in ("table1", "table2"):
        entry = paper(name).ENTRY
        computed = entry.formula()
        known = {row.key: row.paper["saving"] for row in entry.rows if "saving" in row.paper and row.key != "m3"}
        assert len(known) >= 5 and known.pop("visor") == "8.6-8.9x" and 8.6 <= computed["visor"]["saving"] <= 8.9
        for row, saving in known.items():
            assert computed[row]["saving"] == pytest.approx(saving, rel=0.03), row
    assert paper("supplement").formula()["0p5b"]["added"] == pytest.approx(7.5, rel=0.05)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(paper: Paper) -> dict[str, list[list[str]]]:
    """Returns the commands of every entry as words, with the variables that they set and use in place."""
    found = {}
    for entry in paper("entries").ENTRIES:
        variables = {name: f"/{name.lower()}" for name in paper("runs").VARIABLES}
        lines = []
        for line in entry.paper.commands():
            line = string.Template(line).substitute(variables)
            if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[assignment[1]] = assignment[2]
            else:
                lines.append(shlex.split(line))
        found[entry.name] = lines
    return found


def arguments_of(words: list[str]) -> tuple[Any, list[str]]:
    """Parses a `visor` command as the project does, except that configurations are read from the repository."""
    module = command_line._command(words[1])
    parser = command_line._parser(words[1], module)
    args, rest = parser.parse_known_args(words[2:])
    assert all(word.startswith("--config.") for word in rest), words
    if getattr(args, "config", None):
        check_source(load_config(str(ROOT / args.config), rest, workdir=args.workdir or ""))
    else:
        assert not rest, words
    return args, rest


def test_every_command_is_one_that_the_project_has(paper: Paper) -> None:
    checked = set()
    for name, lines in commands(paper).items():
        for words in lines:
            if words[0] != "visor":
                assert words[:2] in (["hf", "download"], ["mkdir", "-p"], ["cp", "-r"]), (name, words)
                continue
            if tuple(words) in checked:
                continue
            checked.add(tuple(words))
            args, _ = arguments_of(words)
            if asked := getattr(args, "benchmark", ""):
                found = public_benchmarks(asked, args.data, None, args.workdir or "")
                assert [benchmark.name for benchmark in found] == asked.split(","), words
            if words[1] == "analyze":
                assert args.only in {analysis.name for analysis in LAYER_ANALYSES} | {"lengths"}, words
    assert {words[1] for words in checked} == {"import", "run", "evaluate", "analyze"}
    assert len(checked) > 40


def test_every_run_is_made_before_it_is_evaluated_or_continued(paper: Paper) -> None:
    for name, lines in commands(paper).items():
        made: set[str] = set()
        for words in lines:
            workdirs = [word.partition("=")[2] for word in words if word.startswith("--workdir=")]
            if words[:2] == ["visor", "import"] or words[0] == "mkdir":
                made.update(workdirs or words[2:])
            elif words[0] == "cp":
                assert {str(Path(word).parent) for word in words[2:-1]} | {words[-1]} <= made, (name, words)
            elif words[1] != "analyze":
                assert {*workdirs} <= made, (name, words)


def test_the_small_commands_name_variants_that_there_are(paper: Paper, tmp_path: Path) -> None:
    settings = paper("base").Settings([1, 2], 3.0, 64, tmp_path / "results", tmp_path / "runs", ["--config.seed=1"])
    for entry in paper("entries").ENTRIES:
        for line in entry.small.commands(settings):
            words = line.split()
            if words[0] == "visor":
                arguments_of(words)
            else:
                assert words[:2] == ["python", "benchmarks/claims.py"]
                assert words[-6:] == ["--seeds", "1", "2", "--steps-scale", "3", "--config.seed=1"]
                names = words[words.index("--only") + 1 : words.index("--seeds")]
                assert names and {*names} <= paper("small").VARIANTS.keys()
