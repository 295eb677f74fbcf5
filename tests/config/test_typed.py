"""Validated configurations are frozen dataclasses, and no parameter named `config` has type Any."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import visor_jax.errors
from visor_jax.config import Config, as_config, from_dict, load_config, stage_config, validate
from visor_jax.files.read_write import read_json, write_json
from visor_jax.testing import tiny_config
from visor_jax.workdir.folder import Workdir

PACKAGE = Path(visor_jax.errors.__file__).parent
CONFIGS = PACKAGE.parent / "configs"


def any_names(tree: ast.Module) -> set[str]:
    """Returns `Any` and its aliases in a module."""
    names = {"Any"}
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if value is not None and ast.unparse(value) in ("Any", "typing.Any"):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(target) for target in targets}
    return names


def test_no_parameter_named_config_is_any() -> None:
    mismatches = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        untyped = any_names(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for argument in (one for one in given if one.arg == "config"):
                if argument.annotation is None or ast.unparse(argument.annotation) in untyped:
                    mismatches.append(f"{path.relative_to(PACKAGE)}:{argument.lineno}: {node.name}")
    assert not mismatches, "\n".join(mismatches)


def test_validated_configurations_are_deeply_frozen() -> None:
    given = tiny_config()
    config = validate(given)
    assert isinstance(given, ConfigDict) and isinstance(config, Config)
    assert as_config(config) is config and as_config(given) == config
    for section in (config, config.model.text, config.data, config.train, stage_config(config, "policy")):
        name = dataclasses.fields(section)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, name, getattr(section, name))


def test_every_field_is_described() -> None:
    pending, count = [validate(tiny_config())], 0
    while pending:
        section = pending.pop()
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                pending.append(value)
            elif field.name not in ("stage_overrides", "fields"):
                count += 1
                assert field.metadata, f"{type(section).__name__}.{field.name}"
    assert count > 60


def test_a_workdir_of_the_untyped_configurations_is_claimed_again(tmp_path: Path) -> None:
    """Its `config.json` has the same fields and values; fields that were added later have their defaults."""
    config, workdir = tiny_config(), Workdir(tmp_path)
    workdir.create()
    workdir.claim(config)
    record = read_json(tmp_path / "config.json")
    for later in ("pattern", "head_layers"):
        del record["config"]["model"][later]
    write_json(tmp_path / "config.json", record)
    Workdir(tmp_path).claim(config)
    assert from_dict(Workdir(tmp_path).config()) == validate(config)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_shipped_config_states_its_command_and_expected_result(path: Path, shipped: Callable[[Path], str]) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert re.search(rf"visor (run|train) [^`]*--config=configs/{path.name}", text), "the command"
    assert "never run to the end" in text.lower() or "Expected: " in text, "time and result"
    assert load_config(shipped(path)).stages


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_shipped_config_reads_whole(path: Path) -> None:
    """It builds only on the defaults, so the file shows everything that it sets."""
    assert "config_from_file" not in path.read_text(encoding="utf-8")
