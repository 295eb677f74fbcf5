"""The table of sources: its refusals, and a further source with one file and one line."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest

import visor_jax
from visor_jax.__main__ import main
from visor_jax.commands.recipe import evaluation_data, run_stages
from visor_jax.config import apply_overrides, as_config, default_config, from_dict
from visor_jax.data.check import Running, check
from visor_jax.data.from_config import make_source
from visor_jax.data.source_kind import SPLITS
from visor_jax.data.sources import SOURCES, check_source
from visor_jax.errors import RequestError, RunError
from visor_jax.evaluate.runner import evaluate
from visor_jax.files.read_write import read_json
from visor_jax.loading import load
from visor_jax.testing import tiny_config
from visor_jax.workdir.folder import Workdir
from visor_jax.workdir.results import Labels

PACKAGE = Path(visor_jax.__file__).parent
DOCS = PACKAGE.parent / "docs" / "your_data.md"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=lava"], "data.source='lava': expected one of .*'almanac', 'llava', .*; did you mean 'llava'"),
        (["data.source=llava", "stages=full"], "data.path='': expected the JSON file that data.source='llava' reads"),
    ],
)
def test_what_does_not_fit_a_source_is_refused(overrides: list[str], message: str) -> None:
    config = apply_overrides(default_config(), [f"--config.{override}" for override in overrides])
    with pytest.raises(RequestError, match=message):
        check_source(config)


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> str:
    """Adds the example of docs/your_data.md as a module, and its line in the table."""
    (code,) = re.findall(r"```python\n(# shades\.py\n.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    module = types.ModuleType("shades")
    monkeypatch.setitem(sys.modules, "shades", module)
    exec(compile(code, "shades.py", "exec"), vars(module))
    monkeypatch.setitem(SOURCES, "shades", "shades")
    return "shades"


@pytest.mark.slow
def test_a_third_source_trains_searches_labels_and_evaluates(third: str, tmp_path: Path) -> None:
    stages = ("warmup", "full", "search", "universal", "label", "policy")
    config = tiny_config(
        {"data.source": third, "stages": stages, "stage_overrides.warmup.init_from": "", "label.samples": 8},
        steps=2,
    )
    check_source(config)
    run_stages(config, str(tmp_path / "run"), stages)
    workdir = Workdir(tmp_path / "run")
    assert len(Labels.read(workdir).label) == 8
    subsets = read_json(workdir.path / "search" / "viable.json")["subsets"]
    assert all(row["easy"] is not None and row["hard"] is not None for row in subsets)
    result = evaluate(from_dict(workdir.config()), load(workdir.path), workdir)
    assert result["benchmark"] == third
    assert result["levels"] == {"brightness": "easy", "sides": "hard"}
    full = result["budgets"]["full"]
    assert full["easy"] is not None and full["hard"] is not None and set(full["tasks"]) == {"brightness", "sides"}


def test_a_third_source_is_checked(third: str, tmp_path: Path) -> None:
    """A source without stored records: its samples have a place and their own id; a missing split is a problem."""
    config = as_config(tiny_config({"data.source": third}))
    listing = tmp_path / "samples.jsonl"
    sources = {split: make_source(config, split) for split in SPLITS}
    result = check(config, sources, 2, whole=True, running=Running(listing=str(listing)))
    assert result["usable"] == 6 and result["problems"] == []
    entries = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    expected = [("shades[0]", "shades/0"), ("shades[1]", "shades/1"), ("shades[0]", "shades/64")]
    assert [(entry["place"], entry["id"]) for entry in entries[:3]] == expected
    with pytest.raises(RunError, match="split 'test': no file"):
        check(config, {split: sources[split] for split in SPLITS[:2]}, None, whole=True)


def test_a_third_source_is_a_benchmark(third: str) -> None:
    config = as_config(tiny_config())
    changed = evaluation_data(config, third, "")
    assert changed.data.source == third
    with pytest.raises(RequestError, match="takes no --data=x"):
        evaluation_data(config, third, "x.json")
    with pytest.raises(RequestError, match=r"expected .*almanac, shades, or llava or .* with --data=FILE"):
        evaluation_data(config, "docvqa", "")


def test_commands_refuse_an_unknown_source_before_anything_is_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PACKAGE.parent / "configs" / "almanac_mini.py"
    workdir = tmp_path / "run"
    assert main(["run", f"--config={config}", f"--workdir={workdir}", "--config.data.source=almanach"]) == 2
    complaint = capsys.readouterr().err
    assert "data.source='almanach': expected one of " in complaint
    assert "did you mean 'almanac'?" in complaint
    assert not workdir.exists()


def test_only_the_table_names_a_source() -> None:
    """Outside the table, a source is named only in its files and `testing/`; no code depends on which one it is."""
    allowed = re.compile(r"^(config/data_fields\.py|data/almanac/|data/sources/\w+\.py|testing/)")
    lines = []
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.j2")]):
        place = path.relative_to(PACKAGE).as_posix()
        if allowed.match(place):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            compared = re.search(r"data\.source\s*(==|!=|in\b)|isinstance\(.*LlavaSource", line)
            if re.search("""["']almanac["']|data[./]almanac""", line) or compared:
                lines.append(f"{place}:{number}: {line.strip()}")
    assert not lines, "\n".join(lines)
