"""Configuration files: Python with `get_config()`, and JSON, which is read without running anything."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from visor_jax.config import config_from_file, load_config, to_json, validate
from visor_jax.errors import RequestError

ROOT = Path(__file__).parents[2]

GET_CONFIG = """from visor_jax.config import default_config
def get_config():
    config = default_config()
    {}
    return config
"""


# --- Python -----------------------------------------------------------------------------------------------------------


def load_error(path: str | Path, **options: str) -> str:
    """Returns the one-line message with which a file is refused."""
    with pytest.raises(RequestError) as caught:
        load_config(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("config.train.stepz = 3", "train.stepz=3: unknown field; did you mean 'train.steps'?"),
        ("config.train.steps = 'ten'", "train.steps='ten': expected a whole number"),
        ("config.train.steps = None", "train.steps=None: expected a whole number"),
        ("config.train.learning_rate = float('nan')", "train.learning_rate=nan: expected a finite number"),
        ("config.model.text.num_heads = True", "model.text.num_heads=True: expected a whole number"),
        ("config.stage_overrides.search = dict(steps=3)", "stage_overrides.search"),
        ("config.train = 3", "train=3: unknown field"),
        ("del config.train.steps", "train.steps: missing"),
        ("1 / 0", "ZeroDivisionError in line 4: division by zero"),
        ("config.nothing.at_all = 3", "AttributeError in line 4"),
        ("return 3", "get_config() returned int, expected a ConfigDict"),
        ("raise SystemExit(5)", "SystemExit in line 4: 5"),
        ("return (", "SyntaxError in line"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, body, expected):
    path = tmp_path / "mine.py"
    path.write_text(GET_CONFIG.format(body))
    assert expected in load_error(path)


def test_files_that_cannot_be_taken(tmp_path):
    (tmp_path / "almanac_mini.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("hello\n")
    assert "defines no function get_config()" in load_error(tmp_path / "almanac_mini.py")
    assert "did you mean" in load_error(tmp_path / "almanac_mni.py")
    assert "no such file" in load_error(tmp_path / "nowhere" / "a.py")
    assert "expected a Python file" in load_error(tmp_path / "notes.txt")
    os.mkfifo(tmp_path / "fifo.py")
    assert "not a regular file" in load_error(tmp_path) and "not a regular file" in load_error(tmp_path / "fifo.py")
    assert "is code, which is executed; expected a local file" in load_error("gs://bucket/configs/a.py")
    assert "printable" in load_error("a\nb.py")
    assert "takes no argument" in load_error(f"{ROOT / 'configs' / 'almanac_large.py'}:x")


def test_code_in_a_workdir_is_not_executed(tmp_path):
    trap = tmp_path / "run" / "deep" / "mine.py"
    trap.parent.mkdir(parents=True)
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    assert "workdir" in load_error(trap, workdir=str(tmp_path / "run"))
    (tmp_path / "run" / "config.json").write_text('{"config": {}, "format": 1}')
    assert "workdir" in load_error(trap)
    (tmp_path / "link.py").symlink_to(trap)
    assert "workdir" in load_error(tmp_path / "link.py")
    assert not (tmp_path / "sprung").exists()


def test_a_config_file_may_start_from_another(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"from visor_jax.config import config_from_file\n"
        f"def get_config():\n"
        f"    config = config_from_file({str(ROOT / 'configs' / 'almanac_mini.py')!r})\n"
        f"    config.seed = 5\n"
        f"    return config\n"
    )
    ours = config_from_file(ROOT / "configs" / "almanac_mini.py")
    theirs = load_config(tmp_path / "mine.py")
    assert theirs.seed == 5
    assert dataclasses.replace(theirs, seed=ours.seed) == validate(ours)


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_a_resolved_configuration_in_json_is_read_as_data(tmp_path: Path) -> None:
    """Also a workdir's own config.json, which holds no code."""
    config = load_config(ROOT / "configs/almanac_mini.py", ["--config.train.steps=7"])
    (tmp_path / "plain.json").write_text(to_json(config))
    (tmp_path / "config.json").write_text(json.dumps({"config": json.loads(to_json(config)), "format": 1}))
    for name in ("plain.json", "config.json"):
        assert load_config(tmp_path / name) == config
        assert load_config(tmp_path / name, ["--config.train.steps=9"], str(tmp_path)).train.steps == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object of configuration fields"),
        ("{", "is not JSON|not valid JSON|JSON"),
        ('{"train": {"stepz": 1}}', "train.stepz"),
        ('{"train": {"steps": -1}}', "train.steps=-1"),
    ],
)
def test_a_wrong_configuration_in_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        load_config(tmp_path / "wrong.json")
    with pytest.raises(RequestError, match="takes no argument"):
        load_config(f"{tmp_path}/wrong.json:1")
    with pytest.raises(RequestError, match=r"missing\.json"):
        load_config(tmp_path / "missing.json")
