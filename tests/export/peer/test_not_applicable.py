"""Every entry of the list of tests that do not apply matches an existing test of transformers."""

import re
import unittest
from fnmatch import fnmatch
from pathlib import Path

import pytest
import transformers


def cases(items: list[pytest.Item]) -> dict[str, type]:
    """Returns the collected test classes of this folder, by name."""
    here = Path(__file__).parent
    actual = {item.cls for item in items if isinstance(item, pytest.Function) and item.path.parent == here and item.cls}
    return {case.__name__: case for case in actual if issubclass(case, unittest.TestCase)}


def test_entries_are_of_our_classes(entries):
    here = Path(__file__).parent
    written = {
        case for file in here.glob("test_*.py") for case in re.findall(r"^class (Test\w+)", file.read_text(), re.M)
    }
    assert {entry.case for entry in entries} <= written
    assert all(entry.why for entry in entries)


def test_every_entry_matches_a_test(entries, request):
    """A mistyped or outdated name would match no test."""
    test_cases = cases(request.session.items)
    applicable = [entry for entry in entries if entry.case in test_cases and transformers.__version__ in entry.versions]
    if not applicable:
        pytest.skip("needs TRANSFORMERS_TESTS=DIR, and the other files of this folder, to compare names")
    without = [
        f"{entry.case}.{entry.pattern}"
        for entry in applicable
        if not any(fnmatch(name, entry.pattern) for name in dir(test_cases[entry.case]) if name.startswith("test"))
    ]
    assert not without, f"not_applicable.toml: no test of transformers {transformers.__version__} is called so"
