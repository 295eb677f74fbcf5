"""Runs transformers' tests from a checkout of its repository, which the variable TRANSFORMERS_TESTS names.

The checkout's `tests` folder is imported, and the classes here pass our models to its mixins; no code is copied.
A release's source archive has only the files directly in `tests`; name it before a checkout of about the same date:
TRANSFORMERS_TESTS=transformers-5.24.0:checkout. Without the variable the tests are skipped. `not_applicable.toml` lists
the tests that do not apply to a VISOR model: class name, then test name or pattern, then the reason.
"""

import os
import re
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from packaging.specifiers import SpecifierSet

HERE = Path(__file__).parent


def folders() -> list[Path]:
    """Returns the `tests` folders that the variable names; of files in several folders, the first one counts."""
    named = [Path(name).expanduser() for name in os.environ.get("TRANSFORMERS_TESTS", "").split(os.pathsep) if name]
    for folder in named:
        if not (folder / "tests" / "test_modeling_common.py").is_file():
            raise pytest.UsageError(f"TRANSFORMERS_TESTS: {folder}: expected a checkout of transformers, with tests/")
    return [folder / "tests" for folder in named]


if folders():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests must not download anything
    # The checkout's files import each other as `tests`.
    package = sys.modules.setdefault("tests", ModuleType("tests"))
    package.__path__ = [*map(str, folders()), *getattr(package, "__path__", ())]
    sys.path.extend(str(folder.parent / "utils") for folder in folders())


def pytest_configure(config: pytest.Config) -> None:
    """Registers the pytest marks of the checkout's tests."""
    for file in [file for tests in folders() for pattern in ("*.py", "*/*.py") for file in tests.glob(pattern)]:
        for mark in set(re.findall(r"@(?:pytest\.)?mark\.(\w+)", file.read_text(encoding="utf-8"))):
            config.addinivalue_line("markers", f"{mark}: of transformers' tests")


class Entry(NamedTuple):
    """One line of `not_applicable.toml`; `versions`: the versions of transformers that have such a test."""

    case: str
    pattern: str
    why: str
    versions: SpecifierSet


def read_entries() -> list[Entry]:
    content = tomllib.loads((HERE / "not_applicable.toml").read_text(encoding="utf-8"))
    usual, entries = content.pop("versions"), []
    for case, patterns in content.items():
        for pattern, value in patterns.items():
            fields = value if isinstance(value, dict) else {"why": value}
            entries.append(Entry(case, pattern, fields["why"], SpecifierSet(fields.get("versions", usual))))
    return entries


@pytest.fixture
def entries() -> list[Entry]:
    return read_entries()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case = getattr(item, "cls", None)
        if case is None or HERE not in item.path.parents:
            continue
        for entry in read_entries():
            if entry.case == case.__name__ and fnmatch(item.name, entry.pattern):
                item.add_marker(pytest.mark.skip(reason=f"not applicable: {entry.why}"))


@pytest.fixture(autouse=True)
def no_gradients():
    """Enables gradients, which the other export tests disable, because these tests train."""
    with torch.enable_grad():
        yield
