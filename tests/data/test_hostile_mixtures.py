"""Hostile YAML mixtures: one line that names the file, never another error, no code run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.data.sources.test_hostile_files import damaged, edits, read_everything
from visor_jax.config import as_config
from visor_jax.data.check import check
from visor_jax.data.from_config import make_source
from visor_jax.errors import RequestError, RunError
from visor_jax.testing import tiny_config

SOUND = """\
datasets:
- json_path: a.json
  sampling_strategy: first:50%
- path: sub/b*.jsonl
  source: llava
  sampling_strategy: end:3
"""
few = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    talk = [{"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": f"r{number}", "conversations": talk} for number in range(6)]
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "sub" / "b1.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def config_of(root: Path, **fields: Any) -> Any:
    data = {"root": str(root), "mixture": "mix.yaml", "test_fraction": 0.0, "text_length": 128, **fields}
    return as_config(tiny_config({"stages": ("full",)} | {f"data.{name}": value for name, value in data.items()}))


def read(root: Path, content: str | bytes) -> list[str]:
    (root / "mix.yaml").write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return read_everything(config_of(root))


def test_the_sound_one(root: Path) -> None:
    assert read(root, SOUND) == ["used"] * 6


@few
@given(changes=edits)
@example(changes=[("cut", 0.0, b"x")])
@example(changes=[("flip", 0.0, b"\x80\x04")])
@example(changes=[("insert", 0.3, b"\xff")])
def test_damaged_mixtures(root: Path, changes: list[tuple[str, float, bytes]]) -> None:
    read(root, damaged(SOUND.encode(), changes))


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["a.json", "sub/*.jsonl", "first:3", "random:50%", "end:-1", "first:1e9", "*", "../a.json", ""])
    | st.text(max_size=5)
)
names = st.sampled_from(
    ["path", "json_path", "sampling", "sampling_strategy", "source", "weight", "Path", "datasets"]
) | st.integers(0, 3)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner), max_leaves=6)
entries = st.dictionaries(names, values, max_size=4)


@few
@given(value=values | st.lists(entries | values, max_size=3) | st.fixed_dictionaries({"datasets": st.lists(entries)}))
def test_mixtures_of_any_values(root: Path, value: Any) -> None:
    read(root, yaml.safe_dump(value, allow_unicode=True))


HOSTILE = {
    "apply": '- !!python/object/apply:os.mkdir ["{canary}"]',
    "apply with arguments": 'datasets: !!python/object/apply:os.mkdir\n  args: ["{canary}"]',
    "apply as a value": '- json_path: !!python/object/apply:os.mkdir ["{canary}"]',
    "apply as a key": '- ? !!python/object/apply:os.mkdir ["{canary}"]\n  : a.json',
    "new": '- !!python/object/new:os.mkdir ["{canary}"]',
    "module": "- !!python/module:antigravity",
    "name": "- json_path: !!python/name:os.system",
    "tuple": "- !!python/tuple [a.json]",
    "long form": '- !<tag:yaml.org,2002:python/object/apply:os.mkdir> ["{canary}"]',
    "own prefix": '%TAG !p! tag:yaml.org,2002:python/object/apply:\n---\n- !p!os.mkdir ["{canary}"]',
    "own tag": "- !thing {{path: a.json}}",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\ndatasets: [*b, *b]",
    "alias of itself": "datasets: &a [*a]",
    "merge key": "- <<: {{json_path: a.json}}\n  weight: {{}}",
    "set": "- !!set {{a.json}}",
    "list as a key": "- ? [a]\n  : b",
    "binary": "- json_path: !!binary gASV",
    "wrong binary": "- json_path: !!binary '%'",
    "wrong number": "- weight: !!int x",
    "deep": "[" * 20_000,
    "deep and closed": "- " * 3_000 + "a",
    "two documents": "- json_path: a.json\n---\n- json_path: a.json",
    "number of 5,000 digits": "- weight: " + "9" * 5_000,
    "base 60": "- weight: " + "1:" * 300 + "1",
    "no time": "- json_path: 2026-13-45",
    "pickle": "\x80\x04\x95cos\nmkdir\n(S'{canary}'\ntR.",
    "NUL": "- json_path: a\0.json",
    "escaped NUL": '- json_path: "a\\0.json"',
    "escaped surrogate": '- json_path: "a\\ud800.json"',
    "line break in a name": '- json_path: "a\\n.json"',
    "above the root": "- json_path: ../a.json",
    "absolute": "- json_path: /etc/passwd",
    "home": "- json_path: ~/a.json",
    "URL": "- json_path: https://example.com/a.json",
    "pattern above the root": "- json_path: 'sub/../../*'",
    "shell": "- json_path: $(mkdir {canary})",
    "code as sampling": "- json_path: a.json\n  sampling_strategy: __import__('os').mkdir('{canary}')",
    "unknown source": "- json_path: a.json\n  source: os",
}


@pytest.mark.parametrize("name", [*HOSTILE])
def test_hostile_mixtures_are_refused(root: Path, name: str) -> None:
    """Python's own loader would run the first ones."""
    canary = root / "canary"
    content = HOSTILE[name].format(canary=canary)
    if name == "apply":
        yaml.unsafe_load(content)
        canary.rmdir()  # the canary is alive
    assert read(root, content) == ["2"]
    assert not canary.exists()


def test_check_counts_the_sources_of_a_mixture(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "mix.yaml").write_text(SOUND)
    config = config_of(root)
    result = check(config, {"all": make_source(config, "all")}, None, whole=True)
    sources = result["splits"]["all"]["sources"]
    assert {name: part["usable"] for name, part in sources.items()} == {"a": 3, "b": 3}
    assert result["splits"]["all"]["duplicate_ids"] == 0  # the same ids in another source
    (root / "sub" / "b1.jsonl").write_text('{"id": "x", "conversations": []}\n' * 4)
    with pytest.raises(RunError, match="b has no usable record"):
        check(config_of(root, max_skipped_fraction=1.0), {"all": make_source(config, "all")}, None, whole=True)
    (root / "sub" / "b1.jsonl").write_text("")
    with pytest.raises(RequestError, match=r"mix\.yaml line 4 .*is empty"):
        make_source(config, "all")
