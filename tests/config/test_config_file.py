"""Configuration files in JSON: data, read without running anything. `test_config.py` has those in Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from visor_jax.config import load_config, to_json
from visor_jax.errors import RequestError

ROOT = Path(__file__).parents[2]


def test_a_resolved_configuration_in_json_is_read_as_data(tmp_path: Path) -> None:
    """Also a workdir's own config.json, which holds no code."""
    config = load_config(ROOT / "configs/glyphs_mini.py", ["--config.train.steps=7"])
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
